"""Both sweeps in plain PyTorch, tile by tile: any device, any dtype.

    reads   anchors once per column tile, candidates once per row strip; 16-bit ones are widened in small chunks
    writes  tiles of logits and coefficients, all within one workspace
    work    the products of pairs.py, 1 exponential a pair and direction; SoftmaxWeights costs one product more
            than GivenWeights unless a tile already holds every logit that its normalisers need

A tile spans all columns where enough rows fit beside them; otherwise columns are cut as well and running
(max, sum) pairs are merged. Excluded pairs (positives, masked ones) are -inf in a tile of logits, hence 0 in every
sum and in every coefficient; the positives' coefficients are then written over theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import torch
from torch import Tensor

from contrastile.backends import workspace_bytes
from contrastile.pairs import (
    GivenWeights,
    GradNeeds,
    PairGrads,
    PairProblem,
    PairStats,
    SoftmaxWeights,
    WeightFunction,
)
from contrastile.statistics import finite, softmax_weights

FEWEST_ROWS = 64  # of a tile that spans all columns; below it, products become slow and columns are cut instead
WIDENED_BYTES = 2**20  # of a chunk of rows that meet their positives
OPERAND_SHARE = 8  # scaled anchors and widened candidates take at most one part in so many of the workspace each


def unavailable_reason() -> str | None:
    return None


def positive_logits(problem: PairProblem) -> Tensor:
    assert problem.positives is not None
    dtype, depth = problem.scale.dtype, problem.anchors.shape[1]
    found = torch.empty_like(problem.scale)
    step = max(1, WIDENED_BYTES // (depth * found.element_size()))
    for first in range(0, problem.rows, step):
        rows = slice(first, first + step)
        own = problem.candidates.index_select(0, problem.positives[rows]).to(dtype)
        torch.linalg.vecdot(problem.anchors[rows].to(dtype), own, out=found[rows])
    return found.mul_(problem.scale)


def pair_stats(problem: PairProblem, *, columns: bool = False, ranks: bool = False) -> PairStats:
    sweep = _Sweep(problem, buffers=2, all_columns=ranks)
    found = _Statistics(problem, columns)
    row_rank = torch.empty_like(problem.positives) if ranks and problem.positives is not None else None
    for rows in sweep.strips():
        anchors = sweep.scaled_anchors(rows)
        for cols in sweep.column_tiles():
            logits, spare = sweep.tiles(rows, cols)
            sweep.fill_logits(logits, anchors, cols)
            found.read_positives(logits, rows, cols)
            _exclude(logits, problem, rows, cols)
            if row_rank is not None and found.positive_logit is not None:
                row_rank[rows] = (~(logits <= found.positive_logit[rows, None])).sum(1)  # a NaN counts
            found.add(logits, spare, rows, cols)
    return found.result(row_rank)


def pair_grad(problem: PairProblem, weights: GivenWeights | SoftmaxWeights, needs: GradNeeds) -> PairGrads:
    softmax = isinstance(weights, SoftmaxWeights)
    columns = weights.columns if isinstance(weights, SoftmaxWeights) else weights.col_shift is not None
    two_terms = columns or problem.self_similarity
    has_primitive = isinstance(weights, GivenWeights) and weights.function is not WeightFunction.EXPONENTIAL
    sweep = _Sweep(problem, buffers=2 + two_terms + has_primitive)
    stats = None
    if isinstance(weights, SoftmaxWeights) and not sweep.holds_all_logits_of_normalizers(two_terms):
        stats = pair_stats(problem, columns=columns)
        weights = _softmax_weights(problem, stats, weights.gain)
    found = _Statistics(problem, columns) if stats is None and (needs.stats or softmax) else None

    dx = sweep.zeros(problem.anchors) if needs.dx else None
    dy = sweep.zeros(problem.candidates) if needs.dy and not problem.self_similarity else None
    row_moment = torch.zeros_like(problem.scale) if needs.moment else None
    mass = _Mass(problem, weights, needs) if isinstance(weights, GivenWeights) and not softmax else None
    for rows in sweep.strips():
        anchors = sweep.scaled_anchors(rows)
        for cols in sweep.column_tiles():
            logits, coeff, *spare = sweep.tiles(rows, cols)
            sweep.fill_logits(logits, anchors, cols)
            positive = _read_at(logits, _positives_of(problem, rows, cols))
            if found is not None:
                found.read_positives(logits, rows, cols)
            _exclude(logits, problem, rows, cols)
            if found is not None:
                found.add(logits, coeff, rows, cols)
            if isinstance(weights, GivenWeights):
                tile_weights = _weights_of_tile(weights, rows, cols)
            else:
                assert found is not None
                tile_weights = _softmax_weights(problem, found.of_strip(rows), weights.gain)
            _fill_coefficients(coeff, logits, tile_weights, spare, mass, rows, cols)
            at = _positives_of(problem, rows, cols)
            _write_at(coeff, at, tile_weights.positive_coeff)
            if row_moment is not None:
                logits.masked_fill_(logits == -torch.inf, 0.0)  # their coefficients are 0
                _write_at(logits, at, positive)
                row_moment[rows] += torch.bmm(coeff.unsqueeze(1), logits.unsqueeze(2)).reshape(-1)
            if dx is not None:
                sweep.add_product(dx[rows], coeff, cols)
            if dy is not None:
                dy[cols].addmm_(coeff.T, anchors)
        if dx is not None:
            dx[rows].mul_(problem.scale[rows, None])
    if row_moment is not None and problem.self_similarity:
        row_moment.div_(2)  # C holds every pair from both its ends, the loss once
    return PairGrads(
        dx=dx,
        dy=dy,
        row_moment=row_moment,
        row_mass=None if mass is None else mass.row,
        col_mass=None if mass is None else mass.col,
        stats=stats if found is None else found.result(),
        row_weight=None if mass is None else mass.row_weight,
    )


class _Sweep:
    """Shape of the tiles, their buffers, and the operands of the products."""

    def __init__(self, problem: PairProblem, buffers: int, all_columns: bool = False) -> None:
        self.problem = problem
        self.dtype = problem.scale.dtype
        rows, cols, depth = problem.rows, problem.cols, problem.anchors.shape[1]
        size = problem.scale.element_size()
        budget = workspace_bytes()
        operand_rows = max(1, budget // (OPERAND_SHARE * depth * size))
        # One byte a pair for a mask or a comparison.
        pairs = max(1, (budget - 2 * budget // OPERAND_SHARE) // (buffers * size + 1))
        most_rows = min(rows, operand_rows)
        if all_columns or pairs // cols >= min(most_rows, FEWEST_ROWS):
            self.rows, self.cols = max(1, min(most_rows, pairs // cols)), cols
        else:
            self.rows = min(most_rows, isqrt(pairs))
            self.cols = min(cols, pairs // self.rows)
        self.widens = problem.candidates.dtype != self.dtype
        self.chunk = operand_rows if self.widens else cols
        self.buffers = problem.scale.new_empty(buffers, self.rows * self.cols)

    def holds_all_logits_of_normalizers(self, of_columns: bool) -> bool:
        return self.cols == self.problem.cols and (self.rows == self.problem.rows or not of_columns)

    def strips(self) -> Iterator[slice]:
        return _slices(0, self.problem.rows, self.rows)

    def column_tiles(self) -> Iterator[slice]:
        return _slices(0, self.problem.cols, self.cols)

    def tiles(self, rows: slice, cols: slice) -> list[Tensor]:
        height, width = rows.stop - rows.start, cols.stop - cols.start
        return [buffer[: height * width].view(height, width) for buffer in self.buffers]

    def zeros(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like, dtype=self.dtype, memory_format=torch.contiguous_format)

    def scaled_anchors(self, rows: slice) -> Tensor:
        return self.problem.anchors[rows] * self.problem.scale[rows, None]

    def candidates(self, cols: slice) -> Iterator[tuple[slice, Tensor]]:
        """Candidates of a tile in the accumulation dtype, with their place in the tile."""
        for chunk in _slices(cols.start, cols.stop, self.chunk):
            place = slice(chunk.start - cols.start, chunk.stop - cols.start)
            yield place, self.problem.candidates[chunk].to(self.dtype)

    def fill_logits(self, logits: Tensor, anchors: Tensor, cols: slice) -> None:
        for place, candidates in self.candidates(cols):
            torch.mm(anchors, candidates.T, out=logits[:, place])

    def add_product(self, target: Tensor, coeff: Tensor, cols: slice) -> None:
        for place, candidates in self.candidates(cols):
            target.addmm_(coeff[:, place], candidates)


class _Statistics:
    """Running PairStats."""

    def __init__(self, problem: PairProblem, columns: bool) -> None:
        self.problem = problem
        new = problem.scale.new_full
        n, m = problem.rows, problem.cols
        self.row_max, self.row_sum = new((n,), -torch.inf), new((n,), 0.0)
        self.col_max = new((m,), -torch.inf) if columns else None
        self.col_sum = new((m,), 0.0) if columns else None
        self.positive_logit = new((n,), 0.0) if problem.positives is not None else None

    def read_positives(self, logits: Tensor, rows: slice, cols: slice) -> None:
        at = _positives_of(self.problem, rows, cols)
        here = _read_at(logits, at)
        if at is not None and here is not None and self.positive_logit is not None:
            inside = (at >= 0) & (at < logits.shape[1])
            self.positive_logit[rows] = torch.where(inside, here, self.positive_logit[rows])

    def add(self, logits: Tensor, spare: Tensor, rows: slice, cols: slice) -> None:
        """Takes in a tile whose excluded pairs are -inf; leaves it as it is."""
        _merge_sums(logits, spare, 1, self.row_max[rows], self.row_sum[rows])
        if self.col_max is not None and self.col_sum is not None:
            _merge_sums(logits, spare, 0, self.col_max[cols], self.col_sum[cols])

    def of_strip(self, rows: slice) -> PairStats:
        """Statistics of these rows alone; with columns, the strip is the whole problem."""
        positive_logit = None if self.positive_logit is None else self.positive_logit[rows]
        return PairStats(self.row_max[rows], self.row_sum[rows], self.col_max, self.col_sum, positive_logit)

    def result(self, row_rank: Tensor | None = None) -> PairStats:
        return PairStats(self.row_max, self.row_sum, self.col_max, self.col_sum, self.positive_logit, row_rank)


class _Mass:
    """Sums of phi over the negatives, by row and by column, and of f by row."""

    def __init__(self, problem: PairProblem, weights: GivenWeights, needs: GradNeeds) -> None:
        new = problem.scale.new_zeros
        self.row = new(problem.rows) if weights.row_shift is not None else None
        self.col = new(problem.cols) if weights.col_shift is not None else None
        self.row_weight = new(problem.rows) if needs.row_weight else None

    def add(self, dim: int, where: slice, weight: Tensor, mass: Tensor) -> None:
        """Sums over dim of a tile's f and phi."""
        if dim == 1 and self.row is not None:
            self.row[where].add_(mass)
            if self.row_weight is not None:
                self.row_weight[where].add_(weight)
        if dim == 0 and self.col is not None:
            self.col[where].add_(mass)


def _softmax_weights(problem: PairProblem, stats: PairStats, gain: float) -> GivenWeights:
    assert problem.positives is not None
    row_gain = torch.full_like(stats.row_max, gain)
    col_gain = None if stats.col_max is None else row_gain
    return softmax_weights(stats, problem.positives, row_gain, col_gain, problem.self_similarity)


def _merge_sums(logits: Tensor, spare: Tensor, dim: int, running_max: Tensor, running_sum: Tensor) -> None:
    """running_sum * exp(running_max) += sum of exp(logits) over dim, in place."""
    tile_max = logits.amax(dim)
    tile_sum = torch.sub(logits, finite(tile_max).unsqueeze(dim), out=spare).exp_().sum(dim)
    joint_max = torch.maximum(running_max, tile_max)
    shift = finite(joint_max)
    running_sum.mul_((running_max - shift).exp_()).add_(tile_sum.mul_((tile_max - shift).exp_()))
    running_max.copy_(joint_max)


def _fill_coefficients(
    coeff: Tensor,
    logits: Tensor,
    weights: GivenWeights,
    spare: list[Tensor],
    mass: _Mass | None,
    rows: slice,
    cols: slice,
) -> None:
    """C of the tile's negatives, 0 elsewhere; adds to the masses."""
    terms = []
    if weights.row_shift is not None and weights.row_gain is not None:
        terms.append((1, weights.row_shift, weights.row_gain))
    if weights.col_shift is not None and weights.col_gain is not None:
        terms.append((0, weights.col_shift, weights.col_gain))
    for place, (dim, shift, gain) in enumerate(terms):
        term = coeff if place == 0 else spare[0]
        torch.sub(logits, shift.unsqueeze(dim), out=term)
        if mass is None:  # softmax weights
            term.exp_()
        else:
            mass.add(dim, rows if dim == 1 else cols, *_weigh(term, weights.function, spare, dim))
        term.mul_(gain.unsqueeze(dim))
    if len(terms) == 2:
        coeff.add_(spare[0])


def _weigh(t: Tensor, function: WeightFunction, spare: list[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Turns t into f(t), and gives the sums of f(t) and of phi(t) over dim."""
    if function is WeightFunction.EXPONENTIAL:
        weight = t.exp_().sum(dim)
        return weight, weight
    if function is WeightFunction.CAPPED:
        above = torch.clamp(t, min=0, out=spare[-1]).sum(dim)
        weight = t.clamp_(max=0).exp_().sum(dim)
        return weight, above.add_(weight)
    mass = torch.logaddexp(t, t.new_zeros(()), out=spare[-1]).sum(dim)
    return t.sigmoid_().sum(dim), mass


def _weights_of_tile(weights: GivenWeights, rows: slice, cols: slice) -> GivenWeights:
    def part(vector: Tensor | None, where: slice) -> Tensor | None:
        return None if vector is None else vector[where]

    return GivenWeights(
        row_shift=part(weights.row_shift, rows),
        row_gain=part(weights.row_gain, rows),
        col_shift=part(weights.col_shift, cols),
        col_gain=part(weights.col_gain, cols),
        positive_coeff=part(weights.positive_coeff, rows),
        function=weights.function,
    )


def _positives_of(problem: PairProblem, rows: slice, cols: slice) -> Tensor | None:
    """The positives' places within a tile; outside of it where they lie in another."""
    return None if problem.positives is None else problem.positives[rows] - cols.start


def _exclude(logits: Tensor, problem: PairProblem, rows: slice, cols: slice) -> None:
    """Sets the tile's masked pairs and positives to -inf."""
    if problem.row_ceiling is not None:
        logits.masked_fill_(logits > problem.row_ceiling[rows, None], -torch.inf)
    if problem.row_groups is not None and problem.col_groups is not None:
        logits.masked_fill_(problem.row_groups[rows, None] == problem.col_groups[cols], -torch.inf)
    excluded = logits.new_full((1,), -torch.inf).expand(logits.shape[0])
    if problem.self_offset is not None:
        own = torch.arange(rows.start, rows.stop, device=logits.device) + (problem.self_offset - cols.start)
        _write_at(logits, own, excluded)
    _write_at(logits, _positives_of(problem, rows, cols), excluded)


def _read_at(tile: Tensor, cols: Tensor | None) -> Tensor | None:
    """Entry cols[i] of every row i; any entry where that lies outside the tile."""
    if cols is None:
        return None
    return tile.gather(1, cols.clamp(0, tile.shape[1] - 1).unsqueeze(1)).squeeze(1)


def _write_at(tile: Tensor, cols: Tensor | None, values: Tensor | None) -> None:
    """Sets entry cols[i] of every row i whose cols[i] lies within the tile; no list of such rows, which would sync."""
    if cols is None or values is None:
        return
    at = cols.clamp(0, tile.shape[1] - 1).unsqueeze(1)
    inside = ((cols >= 0) & (cols < tile.shape[1])).unsqueeze(1)
    tile.scatter_(1, at, torch.where(inside, values.unsqueeze(1), tile.gather(1, at)))


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
