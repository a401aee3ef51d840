"""Triton backend: both sweeps on NVIDIA and AMD devices, by the kernels in contrastile.kernels.

    pair_stats  statistics kernel, window by window of pairs
    pair_grad   coefficients kernel into a strip of coefficients, then two products of that strip by the vendor's GEMM

Windows bound the memory for any N and M; the strip is at most half of the workspace. Nothing here waits for the
device, and no sum depends on the order in which programs run.

With TRITON_INTERPRET=1 the kernels run in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from contrastile.backends import workspace_bytes
from contrastile.kernels.coefficients import Strip, Weights, coefficients_kernel
from contrastile.kernels.merge import merge_kernel
from contrastile.kernels.moments import row_moments_kernel
from contrastile.kernels.plans import TilePlan, tile_plan, window_plan
from contrastile.kernels.positives import positives_kernel
from contrastile.kernels.statistics import statistics_kernel
from contrastile.kernels.tiles import Pairs, Sums, Window
from contrastile.pairs import GivenWeights, GradNeeds, PairGrads, PairProblem, PairStats, SoftmaxWeights
from contrastile.statistics import softmax_weights

NO_SUMS = Sums(None, None, None)
NO_STRIP = Strip(None, 0, None)
FLOAT16_EXPONENT = 14  # of the largest coefficient as float16 stores it: two powers of two below overflow
STRIP_SHARE = 2  # one part in so many of the workspace
PAIRS_OF_STATISTICS = 2**28  # of a window: 32 MiB of partial sums at 128 x 128
MERGE_BLOCK = 256
MOMENT_ROWS = 16


def unavailable_reason() -> str | None:
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"
    if not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return "torch 2.8 or newer is needed: products of 16-bit tensors with a float32 result"
    return None


@cache
def interpreting() -> bool:
    """Read once, as Triton itself reads it when the kernels are defined."""
    return bool(triton.knobs.runtime.interpret)


def pair_stats(problem: PairProblem, *, columns: bool = False, ranks: bool = False) -> PairStats:
    if ranks:
        problem = replace(problem, self_similarity=False)  # a rank needs the whole row
    sweep = _Sweep(problem)
    positive_logit = sweep.positives()
    row_rank = torch.zeros_like(problem.positives) if ranks and problem.positives is not None else None
    totals = _Totals.new(problem, rows=True, columns=columns, row_mass=False, col_mass=False)
    for window in sweep.windows(PAIRS_OF_STATISTICS):
        row_sums, col_sums = totals.partials(window, sweep.plan)
        sweep.launch_tiles(statistics_kernel, window, sweep.pairs, window, row_sums, col_sums, positive_logit, row_rank)
        sweep.merge(totals.parts(window), (row_sums, col_sums))
    return totals.stats(positive_logit, row_rank)


def pair_grad(problem: PairProblem, weights: GivenWeights | SoftmaxWeights, needs: GradNeeds) -> PairGrads:
    stats: PairStats | None = None
    if isinstance(weights, SoftmaxWeights):
        assert problem.positives is not None
        stats = pair_stats(problem, columns=weights.columns)
        gain = torch.full_like(stats.row_max, weights.gain)
        col_gain = gain if weights.columns else None
        given = softmax_weights(stats, problem.positives, gain, col_gain, problem.self_similarity)
        totals = _Totals(problem, False, NO_SUMS, NO_SUMS)
        largest = gain.amax() * 2
    else:
        given = weights
        columns = given.col_shift is not None
        totals = _Totals.new(
            problem,
            rows=needs.stats,
            columns=needs.stats and columns,
            row_mass=given.row_shift is not None,
            col_mass=columns,
        )
        largest = _largest_capped(given) if given.cap else None
    grads = _Gradients(problem, needs)
    sweep = _Sweep(problem)
    if grads.wanted or totals.wanted:
        _gradient_sweep(sweep, given, largest, grads, totals)
    if needs.stats and stats is None:
        stats = totals.stats(sweep.positives(), None)
    return PairGrads(
        dx=grads.dx if needs.dx else None,
        dy=grads.dy if needs.dy and not problem.self_similarity else None,
        row_moment=sweep.row_moments(grads.dx) if needs.moment else None,
        row_mass=totals.rows.mass,
        col_mass=totals.cols.mass if not problem.self_similarity else totals.rows.mass,
        stats=stats,
    )


def _gradient_sweep(
    sweep: _Sweep, weights: GivenWeights, largest: Tensor | None, grads: _Gradients, totals: _Totals
) -> None:
    """All windows of C into the strip, and from there into the gradients. `largest` bounds |C| where that is known."""
    strip = _Strip.new(sweep, largest) if grads.wanted else None
    kernel_weights = Weights(
        weights.row_shift, weights.row_gain, weights.col_shift, weights.col_gain, weights.positive_coeff
    )
    for window in sweep.windows(PAIRS_OF_STATISTICS if strip is None else strip.most_pairs):
        row_sums, col_sums = totals.partials(window, sweep.plan)
        into = NO_STRIP if strip is None else strip.of_window(window)
        sweep.launch_tiles(
            coefficients_kernel, window, sweep.pairs, window, kernel_weights, into, row_sums, col_sums, CAP=weights.cap
        )
        sweep.merge(totals.parts(window), (row_sums, col_sums))
        if strip is not None:
            grads.add(window, into.coefficients, strip.anchors, strip.candidates)
    if strip is not None and strip.factor is not None:
        grads.divide(strip.factor)


def _largest_capped(weights: GivenWeights) -> Tensor:
    """A bound of |C| under the cap, ()."""
    gains = [gain.amax() for gain in (weights.row_gain, weights.col_gain) if gain is not None]
    bound = torch.stack(gains).sum()
    return bound if weights.positive_coeff is None else torch.maximum(bound, weights.positive_coeff.abs().amax())


class _Sweep:
    """A problem made ready for launches: its plan, and what all of its kernels take."""

    def __init__(self, problem: PairProblem) -> None:
        self.problem = problem
        self.depth = problem.anchors.shape[1]
        self.target = _target(problem.anchors.device)
        bits = problem.anchors.element_size() * 8
        plan = tile_plan(self.target, bits, self.depth, _fits_descriptors(problem.anchors, problem.candidates))
        self.plan = plan
        self.pointers = Pairs(
            anchors=problem.anchors,
            candidates=problem.candidates,
            anchor_stride=problem.anchors.stride(0),
            candidate_stride=problem.candidates.stride(0),
            scale=problem.scale,
            positives=problem.positives,
            row_groups=problem.row_groups,
            col_groups=problem.col_groups,
            self_offset=problem.self_offset,
            rows=problem.rows,
            cols=problem.cols,
        )
        self.pairs = self.pointers
        if plan.descriptors:
            self.pairs = self.pointers._replace(
                anchors=TensorDescriptor.from_tensor(problem.anchors, [plan.block_rows, plan.block_depth]),
                candidates=TensorDescriptor.from_tensor(problem.candidates, [plan.block_cols, plan.block_depth]),
            )

    def windows(self, most_pairs: int) -> Iterator[Window]:
        problem = self.problem
        multiple = max(self.plan.block_rows, self.plan.block_cols)
        plan = window_plan(problem.rows, problem.cols, most_pairs, multiple, problem.self_similarity)
        return plan.windows(problem.rows, problem.cols, problem.self_similarity)

    def launch_tiles(self, kernel: Any, window: Window, *arguments: Any, **constants: Any) -> None:
        tile_rows, tile_cols = self.plan.tiles(window)
        self._launch(
            kernel,
            tile_rows * tile_cols,
            *arguments,
            GROUP_ROWS=self.plan.group_rows,
            DESCRIPTORS=self.plan.descriptors,
            **self._tile_constants(),
            **constants,
        )

    def merge(self, totals: tuple[Sums, Sums], partials: tuple[Sums, Sums]) -> None:
        for total, partial in zip(totals, partials, strict=True):
            lines = next((lines for lines in partial if lines is not None), None)
            if lines is not None:
                tiles, length = lines.shape
                programs = triton.cdiv(length, MERGE_BLOCK)
                self._launch(merge_kernel, programs, partial, total, tiles, length, BLOCK=MERGE_BLOCK)

    def positives(self) -> Tensor | None:
        """Logits of the positives, as the tiles compute them."""
        if self.problem.positives is None:
            return None
        found = torch.empty_like(self.problem.scale)
        programs = triton.cdiv(self.problem.rows, min(self.plan.block_rows, self.plan.block_cols))
        self._launch(positives_kernel, programs, self.pointers, found, **self._tile_constants())
        return found

    def row_moments(self, dx: Tensor | None) -> Tensor:
        assert dx is not None
        moments = torch.empty_like(self.problem.scale)
        self._launch(
            row_moments_kernel,
            triton.cdiv(self.problem.rows, MOMENT_ROWS),
            self.problem.anchors,
            dx,
            moments,
            self.problem.anchors.stride(0),
            self.problem.rows,
            DEPTH=self.depth,
            BLOCK_ROWS=MOMENT_ROWS,
            BLOCK_DEPTH=min(256, triton.next_power_of_2(self.depth)),
        )
        # One triangle: C holds every pair from both its ends, the loss once.
        return moments.div_(2) if self.problem.self_similarity else moments

    def _tile_constants(self) -> dict[str, Any]:
        return {
            "DEPTH": self.depth,
            "BLOCK_ROWS": self.plan.block_rows,
            "BLOCK_COLS": self.plan.block_cols,
            "BLOCK_DEPTH": self.plan.block_depth,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            "EMULATE_BF16": interpreting() and self.problem.anchors.dtype == torch.bfloat16,
        }

    def _launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        options = {"num_warps": self.plan.num_warps, "num_stages": self.plan.num_stages}
        with _on_device(self.problem.anchors.device):
            kernel[(programs,)](*arguments, **constants, **options)


@dataclass
class _Totals:
    """Running sums by row and by column. Of one triangle, a window's columns count as rows."""

    problem: PairProblem
    columns: bool  # wanted by column too
    rows: Sums  # of tensors (N,)
    cols: Sums  # of tensors (M,)

    @classmethod
    def new(cls, problem: PairProblem, *, rows: bool, columns: bool, row_mass: bool, col_mass: bool) -> _Totals:
        triangle = problem.self_similarity
        return cls(
            problem,
            columns,
            _new_sums(problem.scale, problem.rows, rows, row_mass),
            _new_sums(problem.scale, problem.cols, columns and not triangle, col_mass and not triangle),
        )

    @property
    def wanted(self) -> bool:
        return any(t is not None for t in (*self.rows, *self.cols))

    def partials(self, window: Window, plan: TilePlan) -> tuple[Sums, Sums]:
        """Room for the sums of a window's tiles."""
        tile_rows, tile_cols = plan.tiles(window)
        return (
            _partial_sums(self.rows, tile_cols, window.rows),
            _partial_sums(self._totals_of_columns(window), tile_rows, window.cols),
        )

    def parts(self, window: Window) -> tuple[Sums, Sums]:
        """The totals that a window adds to."""
        return (
            _part(self.rows, window.first_row, window.rows),
            _part(self._totals_of_columns(window), window.first_col, window.cols),
        )

    def stats(self, positive_logit: Tensor | None, row_rank: Tensor | None) -> PairStats:
        cols = self.rows if self.problem.self_similarity and self.columns else self.cols
        return PairStats(self.rows.max, self.rows.sum, cols.max, cols.sum, positive_logit, row_rank)

    def _totals_of_columns(self, window: Window) -> Sums:
        if not self.problem.self_similarity:
            return self.cols
        return NO_SUMS if window.first_row == window.first_col else self.rows


class _Gradients:
    """dX and dY in float32. A moment needs dX even where that is not asked for."""

    def __init__(self, problem: PairProblem, needs: GradNeeds) -> None:
        self.problem = problem
        self.dx = _zeros_like(problem.anchors) if needs.dx or needs.moment else None
        self.dy = _zeros_like(problem.candidates) if needs.dy and not problem.self_similarity else None

    @property
    def wanted(self) -> bool:
        return self.dx is not None or self.dy is not None

    def add(self, window: Window, coefficients: Tensor, anchors: Tensor, candidates: Tensor) -> None:
        rows = slice(window.first_row, window.first_row + window.rows)
        cols = slice(window.first_col, window.first_col + window.cols)
        if self.dx is not None:
            _add_product(self.dx[rows], coefficients, candidates[cols])
        by_column = self.dx if self.problem.self_similarity else self.dy
        is_diagonal = self.problem.self_similarity and window.first_row == window.first_col
        if by_column is not None and not is_diagonal:
            _add_product(by_column[cols], coefficients.T, anchors[rows])

    def divide(self, factor: Tensor) -> None:
        for gradient in (self.dx, self.dy):
            if gradient is not None:
                gradient.div_(factor)


@dataclass
class _Strip:
    """Room for the coefficients of one window, and the embeddings they are multiplied with, of the same dtype."""

    most_pairs: int  # of a window
    buffer: Tensor
    anchors: Tensor  # (N, D)
    candidates: Tensor  # (M, D)
    factor: Tensor | None  # (1,) float32 that the coefficients are multiplied with

    @classmethod
    def new(cls, sweep: _Sweep, largest: Tensor | None) -> _Strip:
        problem, factor = sweep.problem, None
        dtype = problem.anchors.dtype
        if dtype == torch.float16 and largest is None:
            dtype = torch.float32  # no bound is known by which to fit them into the range of float16
        elif dtype == torch.float16 and largest is not None:
            exponent = FLOAT16_EXPONENT - (largest * problem.scale.amax()).log2().floor()
            factor = exponent.clamp(-126, 126).exp2().reshape(1)
        pairs = workspace_bytes() // STRIP_SHARE // dtype.itemsize
        largest_window = max(window.rows * window.cols for window in sweep.windows(pairs))
        buffer = torch.empty(largest_window, dtype=dtype, device=problem.anchors.device)
        return cls(pairs, buffer, problem.anchors.to(dtype), problem.candidates.to(dtype), factor)

    def of_window(self, window: Window) -> Strip:
        coefficients = self.buffer[: window.rows * window.cols].view(window.rows, window.cols)
        return Strip(coefficients, window.cols, self.factor)


def _add_product(target: Tensor, coefficients: Tensor, embeddings: Tensor) -> None:
    """target += coefficients @ embeddings, in float32 whatever these two are."""
    if coefficients.dtype == torch.float32:
        target.addmm_(coefficients, embeddings)
    elif interpreting():
        target.addmm_(coefficients.float(), embeddings.float())  # no such product of 16-bit tensors on a CPU
    else:
        torch.addmm(target, coefficients, embeddings, out_dtype=torch.float32, out=target)


def _new_sums(like: Tensor, length: int, sums: bool, mass: bool) -> Sums:
    return Sums(
        max=like.new_full((length,), -torch.inf) if sums else None,
        sum=like.new_zeros(length) if sums else None,
        mass=like.new_zeros(length) if mass else None,
    )


def _partial_sums(totals: Sums, tiles: int, length: int) -> Sums:
    return Sums(*(None if total is None else total.new_empty(tiles, length) for total in totals))


def _part(totals: Sums, first: int, count: int) -> Sums:
    return Sums(*(None if total is None else total[first : first + count] for total in totals))


def _zeros_like(embeddings: Tensor) -> Tensor:
    return torch.zeros_like(embeddings, dtype=torch.float32, memory_format=torch.contiguous_format)


def _fits_descriptors(*embeddings: Tensor) -> bool:
    """Tensor descriptors need rows that start on 16 bytes."""
    return all(
        t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 and t.shape[1] * t.element_size() >= 16
        for t in embeddings
    )


@cache
def _target(device: torch.device) -> str:
    if interpreting():
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
