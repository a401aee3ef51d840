"""Launches of the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from contrastile.backends.float32 import float32_products
from contrastile.backends.tiled.gradients import aligned_length
from contrastile.backends.tiled.launches import Sweep
from contrastile.backends.triton_start import blocks_of, form, start
from contrastile.backends.triton_tuning import tuned
from contrastile.kernels.arguments import Gradients, Pairs, RowPass, Strip, Sums, Weights, Window
from contrastile.kernels.coefficients import coefficients_kernel
from contrastile.kernels.gradient import gradient_kernel
from contrastile.kernels.merge import merge_kernel
from contrastile.kernels.plans import TilePlan, gradient_plan, tile_plan
from contrastile.kernels.positives import positives_kernel
from contrastile.kernels.rows import finish_rows_kernel
from contrastile.kernels.softmax import softmax_weights_kernel
from contrastile.kernels.statistics import statistics_kernel
from contrastile.pairs import GivenWeights, PairProblem, PairStats, SoftmaxWeights, WeightFunction


@cache
def interpreting() -> bool:
    """Read once, as Triton itself reads it when the kernels are defined."""
    return bool(triton.knobs.runtime.interpret)


class TritonSweep(Sweep):
    def __init__(self, problem: PairProblem, plan: TilePlan) -> None:
        super().__init__(problem, plan)
        problem = self.problem
        self.pairs = Pairs(
            anchors=problem.anchors,
            candidates=problem.candidates,
            anchor_stride=problem.anchors.stride(0),
            candidate_stride=problem.candidates.stride(0),
            scale=problem.scale,
            positives=problem.positives,
            row_groups=problem.row_groups,
            col_groups=problem.col_groups,
            row_ceiling=problem.row_ceiling,
            self_offset=problem.self_offset,
            rows=problem.rows,
            cols=problem.cols,
        )
        self.embeddings = (self.pairs, *blocks_of(problem.anchors, problem.candidates, plan))
        self.form_of_embeddings = tuple(map(form, self.embeddings))

    def statistics(
        self, window: Window, row_sums: Sums, col_sums: Sums, positive_logit: Tensor | None, row_rank: Tensor | None
    ) -> None:
        self._launch_tiles(statistics_kernel, window, row_sums, col_sums, positive_logit, row_rank)

    def coefficients(
        self, window: Window, weights: Weights, strip: Strip, row_sums: Sums, col_sums: Sums, function: WeightFunction
    ) -> None:
        self._launch_tiles(coefficients_kernel, window, weights, strip, row_sums, col_sums, FUNCTION=function.value)

    def gradient(
        self,
        window: Window,
        weights: Weights,
        gradients: Gradients,
        row_sums: Sums,
        col_sums: Sums,
        function: WeightFunction,
    ) -> None:
        tile_rows, tile_cols = self.plan.tiles(window)
        owns_candidates = gradients.anchors is None
        arguments = (window, weights, gradients, row_sums, col_sums)
        programs = tile_cols if owns_candidates else tile_rows
        self._launch(
            gradient_kernel,
            programs,
            *arguments,
            FUNCTION=function.value,
            OWNS_CANDIDATES=owns_candidates,
        )

    def merge(self, tiles: Sums, totals: Sums) -> None:
        lines, length = next(lines for lines in tiles if lines is not None).shape
        programs = triton.cdiv(length, MERGE_BLOCK)
        self._start(merge_kernel, programs, (tiles, totals, lines, length), {"BLOCK": MERGE_BLOCK})

    def positives(self) -> Tensor | None:
        if self.problem.positives is None:
            return None
        found = torch.empty_like(self.problem.scale)
        programs = triton.cdiv(self.problem.rows, min(self.plan.block_rows, self.plan.block_cols))
        self._start(positives_kernel, programs, (self.pairs, found), self._tile_constants())
        return found

    def _launch_tiles(self, kernel: Any, window: Window, *arguments: Any, **constants: Any) -> None:
        """One program a tile."""
        tile_rows, tile_cols = self.plan.tiles(window)
        constants |= {"GROUP_ROWS": self.plan.group_rows, "PARTS": self.plan.parts}
        self._launch(kernel, tile_rows * tile_cols, window, *arguments, **constants)

    def _launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        arguments = (*self.embeddings, *arguments)
        constants |= self._tile_constants() | {"ROW_LANES": self.plan.row_lanes}
        self._start(kernel, programs, arguments, constants, self.form_of_embeddings)

    def _tile_constants(self) -> dict[str, Any]:
        return {
            "DEPTH": self.problem.anchors.shape[1],
            "BLOCK_ROWS": self.plan.block_rows,
            "BLOCK_COLS": self.plan.block_cols,
            "BLOCK_DEPTH": self.plan.block_depth,
            "PRECISION": self._float32_products(),
            "EMULATE_BF16": interpreting() and self.problem.anchors.dtype == torch.bfloat16,
        }

    def _float32_products(self) -> str:
        x = self.problem.anchors
        return float32_products(_target(x.device)) if x.dtype == torch.float32 else "ieee"

    def _start(
        self,
        kernel: Any,
        programs: int,
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        known_forms: tuple[Any, ...] = (),
    ) -> None:
        options = launch_options(self.plan.num_warps, self.plan.num_stages)
        device = self.problem.anchors.device
        with on_device(device):
            start(kernel, programs, arguments, constants, options, device, known_forms)


def launch_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """What every launch tells the compiler. Fusion of multiplications with additions is what the kernels' bounds and
    errors were found with; what Triton does unasked depends on its version.
    """
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


MERGE_BLOCK = 256
SOFTMAX_BLOCK = 256
ENTRIES = 1024  # of rows, that a program of their last pass holds at a time; with twice as many some forms spill
MOST_FEATURES = 256  # of them, of one row
ROW_OPTIONS = launch_options(num_warps=4, num_stages=1)


class TritonKernels:
    """contrastile.backends.tiled.launches.Kernels."""

    def sweep(self, problem: PairProblem, plan: TilePlan) -> TritonSweep:
        return TritonSweep(problem, plan)

    def statistics_plan(self, problem: PairProblem, ranks: bool) -> TilePlan:
        return tile_plan("statistics", *_described(problem), crowded=ranks)

    def strip_plan(self, problem: PairProblem, sums: bool) -> TilePlan:
        return tile_plan("gradient", *_described(problem), crowded=sums)

    def fused_plan(self, problem: PairProblem, sums: bool, capped: bool) -> TilePlan | None:
        if problem.self_similarity:
            return None
        masked = problem.row_groups is not None or problem.row_ceiling is not None
        return gradient_plan(*_described(problem), crowded=sums or masked, capped=capped)

    def tuned(self, sweep: str, problem: PairProblem, plan: TilePlan, run: Callable[[TilePlan], object]) -> TilePlan:
        return tuned(sweep, problem, plan, run)

    def softmax_weights(
        self, problem: PairProblem, stats: PairStats, weights: SoftmaxWeights
    ) -> tuple[GivenWeights, Tensor | None]:
        assert problem.positives is not None
        rows, by_column = problem.rows, weights.columns and not problem.self_similarity
        # 0 stays where a column is no row's positive, which on a device nobody looks for.
        found = stats.row_max.new_zeros(6, aligned_length(rows, torch.float32))[:, :rows]
        row_shift, row_gain, positive_coeff, losses, col_shift, col_gain = found
        into = Weights(row_shift, row_gain, col_shift, col_gain, positive_coeff)
        columns = (stats.col_max, stats.col_sum) if by_column else (None, None)
        given = (stats.row_max, stats.row_sum, *columns, stats.positive_logit, problem.positives, weights.gain)
        constants = {"SELF": problem.self_similarity, "BLOCK": SOFTMAX_BLOCK}
        programs, device = triton.cdiv(rows, SOFTMAX_BLOCK), problem.anchors.device
        with on_device(device):
            start(softmax_weights_kernel, programs, (*given, into, losses, rows), constants, ROW_OPTIONS, device)
        if problem.self_similarity:
            return GivenWeights(row_shift, row_gain, row_shift, row_gain, positive_coeff), losses
        if not by_column:
            return GivenWeights(row_shift, row_gain, None, None, positive_coeff), losses
        return GivenWeights(row_shift, row_gain, col_shift, col_gain, positive_coeff), losses

    def finish_rows(self, rows: RowPass) -> None:
        count, depth = rows.sums.shape
        constants = row_constants(depth)
        strides = (0, 0) if rows.embeddings is None else rows.embeddings.stride()
        emulates = interpreting() and rows.gradient is not None and rows.gradient.dtype == torch.bfloat16
        constants |= {"EMULATE_BF16": emulates}
        programs, device = triton.cdiv(count, constants["BLOCK_ROWS"]), rows.sums.device
        with on_device(device):
            start(finish_rows_kernel, programs, (*rows, *strides, count), constants, ROW_OPTIONS, device)


def row_constants(depth: int) -> dict[str, Any]:
    block_depth = int(min(MOST_FEATURES, triton.next_power_of_2(depth)))
    return {"DEPTH": depth, "BLOCK_ROWS": ENTRIES // block_depth, "BLOCK_DEPTH": block_depth}


def _described(problem: PairProblem) -> tuple[str, int, int, bool]:
    """What a plan depends on: target, bits of an element, features, whether tensor descriptors can be used."""
    x, y = problem.anchors, problem.candidates
    return _target(x.device), x.element_size() * 8, x.shape[1], _fits_descriptors(x, y)


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


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
