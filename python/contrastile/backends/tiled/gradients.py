"""Gradients from the coefficients of pairs, in three ways to the same result.

fused_sweep           the fused kernel: logits, coefficients and products in one launch a window
strip_sweep           coefficients into a strip, and two products of that strip by the vendor's GEMM
one_direction_sweep   likewise, and the normalisers of the rows from the same strip: softmax weights by row alone
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from contrastile.backends import workspace_bytes
from contrastile.backends.tiled.launches import Kernels, Sweep
from contrastile.backends.tiled.rows import RowSums
from contrastile.backends.tiled.sums import NO_SUMS, Totals
from contrastile.kernels import arguments
from contrastile.kernels.arguments import Strip, Weights, Window
from contrastile.pairs import GivenWeights, GradNeeds, PairProblem, PairStats, WeightFunction
from contrastile.statistics import denominators

NO_STRIP = Strip(None, 0, None)
FLOAT16_EXPONENT = 14  # of the largest coefficient as float16 stores it: two powers of two below overflow
ROW_ALIGNMENT = 16  # bytes
STRIP_SHARE = 2  # one part in so many of the workspace
MOST_PAIRS = 2**26  # of a window: 24 MiB of partial sums in tiles of 64 x 64, and launches long enough to hide the host
# A strip of whole rows adds to all of dY: 8 D bytes a column against 2 D flop for each of its rows.
FEWEST_WHOLE_ROWS = 1024
LARGEST_MISS = 40.0  # of a guessed shift below the log-sum-exp: a tile's may be 40 below it, and exp(80) is finite


class Gradients:
    """dX and dY in float32, up to factors. A moment needs dX even where that is not asked for."""

    def __init__(self, problem: PairProblem, needs: GradNeeds) -> None:
        self.problem = problem
        self.needs = needs
        self.factor: Tensor | None = None  # (1,) that both are to be multiplied with
        self.row_factors: Tensor | None = None  # (N,) likewise of dX alone
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

    def rows(self, kernels: Kernels) -> RowSums:
        """What the last pass over them takes."""
        return RowSums(
            kernels,
            self.dx,
            self.dy,
            self.needs.dx,
            self.needs.moment,
            self.problem.self_similarity,
            self.factor,
            self.row_factors,
        )


def largest_coefficient(weights: GivenWeights) -> Tensor | None:
    """A bound of |C|, (), where the function of the weights has one."""
    if weights.function is WeightFunction.EXPONENTIAL:
        return None
    gains = [_largest(gain) for gain in (weights.row_gain, weights.col_gain) if gain is not None]
    bound = torch.stack(gains).sum()
    return bound if weights.positive_coeff is None else torch.maximum(bound, _largest(weights.positive_coeff))


def _largest(values: Tensor) -> Tensor:
    """Magnitude, (), of those that are finite: what is not reaches its own results, and no factor of all."""
    return values.abs().nan_to_num(nan=0.0, posinf=0.0).amax()


def computes_both(needs: GradNeeds) -> bool:
    """Whether one launch of the fused kernel has both gradients; the second one's additions are not deterministic."""
    return (needs.dx or needs.moment) and needs.dy and not torch.are_deterministic_algorithms_enabled()


def fused_sweep(sweep: Sweep, weights: GivenWeights, largest: Tensor | None, grads: Gradients, totals: Totals) -> None:
    """By the fused kernel; the sums come with the first launch of a window."""
    problem = sweep.problem
    factor = _factor_of_float16(problem, largest) if problem.anchors.dtype == torch.float16 else None
    targets = [arguments.Gradients(grads.dx, grads.dy, factor)]
    if grads.dx is not None and grads.dy is not None and not computes_both(grads.needs):
        targets = [arguments.Gradients(grads.dx, None, factor), arguments.Gradients(None, grads.dy, factor)]
    kernel_weights = _kernel_weights(weights)
    for window in sweep.windows(MOST_PAIRS):
        partials = totals.partials(window, sweep.plan)
        for target, sums in zip(targets, (partials, (NO_SUMS, NO_SUMS)), strict=False):
            sweep.gradient(window, kernel_weights, target, *sums, weights.function)
        totals.merge(sweep, window, partials)
    if factor is not None:
        grads.factor = factor.reciprocal()  # exact: a power of two


def strip_sweep(sweep: Sweep, weights: GivenWeights, largest: Tensor | None, grads: Gradients, totals: Totals) -> None:
    """All windows of C into the strip, and from there into the gradients. `largest` bounds |C| where that is known."""
    strip = _Strip.new(sweep, grads.needs, largest) if grads.wanted else None
    kernel_weights = _kernel_weights(weights)
    for window in sweep.windows(MOST_PAIRS if strip is None else strip.most_pairs):
        partials = totals.partials(window, sweep.plan)
        into = NO_STRIP if strip is None else strip.of_window(window)
        sweep.coefficients(window, kernel_weights, into, *partials, weights.function)
        totals.merge(sweep, window, partials)
        if strip is not None:
            grads.add(window, into.coefficients, strip.anchors, strip.candidates)
    if strip is not None and strip.factor is not None:
        grads.factor = strip.factor.reciprocal()


def fits_one_direction(sweep: Sweep) -> bool:
    """Whether strips of whole rows are high enough, and hold float32: 16 bits leave a guessed shift too few digits."""
    problem = sweep.problem
    if problem.self_similarity:
        return False
    fewest = min(problem.rows, FEWEST_WHOLE_ROWS)
    return problem.anchors.dtype == torch.float32 and _whole_rows(sweep) >= fewest


def one_direction_sweep(sweep: Sweep, gain: float, grads: Gradients) -> PairStats:
    """Gradients of gain * sum_i (logsumexp_j s_ij - s_i,pos), and the statistics of the rows, from three products.

    A strip of whole rows holds E_ij = scale_i exp(s_ij - shift_i), for a shift that is guessed: the positive's logit.
    The sums of the rows then give the normalisers, and dX = (E Y) / Z, dY = E^T (X / Z). Where a guess turns out too
    far from the log-sum-exp, the tiles of such rows are computed again with a better shift; for the others that launch
    ends at once.
    """
    problem = sweep.problem
    positive_logit = sweep.positives()
    assert problem.positives is not None
    assert positive_logit is not None
    totals = Totals.of_statistics(problem, columns=False)
    shift = positive_logit.clone()
    is_miss = torch.zeros_like(shift, dtype=torch.bool)
    weight = torch.empty_like(shift)
    weights = Weights(shift, torch.ones_like(shift), None, None, torch.zeros_like(shift))
    buffer = problem.anchors.new_empty(_whole_rows(sweep) * aligned_length(problem.cols, problem.anchors.dtype))
    for window in _windows_of_whole_rows(sweep):
        rows = slice(window.first_row, window.first_row + window.rows)
        into = strip_of(buffer, window, None)
        partials = totals.partials(window, sweep.plan)
        sweep.coefficients(window, weights, into, *partials, WeightFunction.EXPONENTIAL)
        totals.merge(sweep, window, partials)

        found = denominators(totals.rows.max[rows], totals.rows.sum[rows], positive_logit[rows])
        is_miss[rows] = ~((found.log() - shift[rows]).abs() <= LARGEST_MISS)  # a NaN is one
        shift[rows] = torch.where(is_miss[rows], found.shift, shift[rows])
        sweep.coefficients(window, weights, into._replace(rows=is_miss), NO_SUMS, NO_SUMS, WeightFunction.EXPONENTIAL)
        unit = (found.shift - shift[rows]).exp()  # of the sums found, in that of the strip
        weight[rows] = found.over(torch.full_like(unit, gain)) / unit
        at_positive = -problem.scale[rows] * found.negative * unit
        into.coefficients.scatter_(1, problem.positives[rows, None], at_positive[:, None].to(buffer.dtype))
        if grads.dx is not None:
            _add_product(grads.dx[rows], into.coefficients, problem.candidates)
        if grads.dy is not None:
            weighted = (problem.anchors[rows] * weight[rows, None]).to(buffer.dtype)
            _add_product(grads.dy, into.coefficients.T, weighted)
    grads.row_factors = weight
    return totals.stats(positive_logit)


def _whole_rows(sweep: Sweep) -> int:
    """Rows of a strip that spans all columns."""
    problem = sweep.problem
    rows = workspace_bytes() // STRIP_SHARE // problem.anchors.element_size() // problem.cols
    return problem.rows if rows >= problem.rows else rows // sweep.multiple * sweep.multiple


def _windows_of_whole_rows(sweep: Sweep) -> Iterator[Window]:
    step = _whole_rows(sweep)
    for first in range(0, sweep.problem.rows, step):
        yield Window(first, 0, min(step, sweep.problem.rows - first), sweep.problem.cols)


@dataclass
class _Strip:
    """Room for the coefficients of one window, and the embeddings they are multiplied with, of the same dtype."""

    most_pairs: int  # of a window
    buffer: Tensor
    anchors: Tensor  # (N, D)
    candidates: Tensor  # (M, D)
    factor: Tensor | None  # (1,) float32 that the coefficients are multiplied with

    @classmethod
    def new(cls, sweep: Sweep, needs: GradNeeds, largest: Tensor | None) -> _Strip:
        problem, factor = sweep.problem, None
        dtype = problem.anchors.dtype
        if dtype == torch.float16 and largest is None:
            dtype = torch.float32  # no bound is known by which to fit them into the range of float16
        elif dtype == torch.float16:
            factor = _factor_of_float16(problem, largest)
        pairs = _strip_bytes(problem, needs) // dtype.itemsize
        largest_window = max(window.rows * aligned_length(window.cols, dtype) for window in sweep.windows(pairs))
        buffer = torch.empty(largest_window, dtype=dtype, device=problem.anchors.device)
        return cls(pairs, buffer, problem.anchors.to(dtype), problem.candidates.to(dtype), factor)

    def of_window(self, window: Window) -> Strip:
        return strip_of(self.buffer, window, self.factor)


def _strip_bytes(problem: PairProblem, needs: GradNeeds) -> int:
    """A share of the workspace, or as much as rounded gradients will take: they are allocated when the strip is gone.
    Fewer, larger windows launch less, and give the vendor's products enough tiles for every multiprocessor.
    """
    x, y = problem.anchors, problem.candidates
    results = x.numel() * needs.dx + y.numel() * (needs.dy and not problem.self_similarity)
    later = min(results, MOST_PAIRS) * x.element_size() if x.dtype != torch.float32 else 0
    return max(workspace_bytes() // STRIP_SHARE, later)


def strip_of(buffer: Tensor, window: Window, factor: Tensor | None) -> Strip:
    stride = aligned_length(window.cols, buffer.dtype)
    rows = buffer[: window.rows * stride].view(window.rows, stride)
    return Strip(rows[:, : window.cols], stride, factor)


def aligned_length(elements: int, dtype: torch.dtype) -> int:
    """Of a row, so that the next one starts on 16 bytes as well."""
    together = ROW_ALIGNMENT // dtype.itemsize
    return -(-elements // together) * together


def unavailable_products() -> str | None:
    """Why coefficients cannot be multiplied with embeddings here."""
    if hasattr(torch.ops.aten.addmm, "dtype_out"):
        return None
    return "torch 2.8 or newer is needed: products of 16-bit tensors with a float32 result"


def _factor_of_float16(problem: PairProblem, largest: Tensor | None) -> Tensor:
    """(1,) power of two that moves coefficients of at most `largest` to the upper end of float16's range. Where that is
    0 it is at most what keeps the scales finite that it is multiplied with.
    """
    assert largest is not None
    scale = _largest(problem.scale)
    exponent = FLOAT16_EXPONENT - (largest * scale).log2().floor()
    highest = 126 - scale.log2().ceil().clamp(min=0)
    return exponent.clamp(min=-126).minimum(highest).exp2().reshape(1)


def _kernel_weights(weights: GivenWeights) -> Weights:
    """Kernels take no strides of vectors: what is a view, as from a process group's block, is copied."""
    vectors = (weights.row_shift, weights.row_gain, weights.col_shift, weights.col_gain, weights.positive_coeff)
    return Weights(*(None if vector is None else vector.contiguous() for vector in vectors))


def _add_product(target: Tensor, coefficients: Tensor, embeddings: Tensor) -> None:
    """target += coefficients @ embeddings, in float32 whatever these two are."""
    if coefficients.dtype == torch.float32:
        target.addmm_(coefficients, embeddings)
    elif not coefficients.is_cuda:
        target.addmm_(coefficients.float(), embeddings.float())  # no such product of 16-bit tensors on a CPU
    else:
        torch.addmm(target, coefficients, embeddings, out_dtype=torch.float32, out=target)


def _zeros_like(embeddings: Tensor) -> Tensor:
    return torch.zeros_like(embeddings, dtype=torch.float32, memory_format=torch.contiguous_format)
