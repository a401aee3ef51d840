"""The pairwise operations over own rows and the columns of all processes, as one more backend.

    pair_stats   of own rows over all columns, and of own columns over all rows        one lap
    pair_grad    dX of own rows, dY of own columns, summed over all processes' rows    one lap for GivenWeights

The problem that it is given holds own rows and columns only, with positives among them, so that the algebra of a loss
is that of one process. A backend of this process does the work, block by block.

Where logits are symmetric, C_ij is known from both its ends: a process forms dX of its rows alone, and no sums travel.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from contrastile import backends
from contrastile.distributed.plans import Columns, GatherPlan, Plan, Sums
from contrastile.pairs import GivenWeights, GradNeeds, PairGrads, PairProblem, PairStats, SoftmaxWeights
from contrastile.statistics import softmax_weights


class GroupSweeps:
    """A contrastile.pairs.Backend over a group. Every process of the group makes the same calls.

    pair_grad gives masses by column with the statistics only: what nobody asks for does not travel.

    Args:
        plan: how columns are met.
        backend: name of the backend that sweeps.
    """

    def __init__(self, plan: Plan, backend: str) -> None:
        self.plan = plan
        self.local = backends.get(backend)

    def unavailable_reason(self) -> str | None:
        return None

    def positive_logits(self, problem: PairProblem) -> Tensor:
        return self.local.positive_logits(problem) if problem.rows else torch.empty_like(problem.scale)

    def pair_stats(self, problem: PairProblem, *, columns: bool = False, ranks: bool = False) -> PairStats:
        held = self.plan.hold(_columns_of(problem))
        return self._ranks(problem, held) if ranks else self._statistics(problem, held, columns)

    def pair_grad(self, problem: PairProblem, weights: GivenWeights | SoftmaxWeights, needs: GradNeeds) -> PairGrads:
        held = self.plan.hold(_columns_of(problem))
        if isinstance(weights, GivenWeights):
            return self._gradients(problem, held, weights, needs)
        if isinstance(self.plan, GatherPlan) and not weights.columns and not problem.self_similarity:
            return self._gradients(problem, held, weights, needs)  # all logits of a row are here at once
        stats = self._statistics(problem, held, weights.columns)
        assert problem.positives is not None
        gain = torch.full_like(problem.scale, weights.gain)
        col_gain = gain if weights.columns else None
        given = softmax_weights(stats, problem.positives, gain, col_gain, problem.self_similarity)
        return replace(self._gradients(problem, held, given, replace(needs, stats=False)), stats=stats)

    def _ranks(self, problem: PairProblem, held: Columns) -> PairStats:
        """Of own rows alone. A rank needs its positive's logit beside every column, which only gathering gives."""
        assert isinstance(self.plan, GatherPlan)
        part = _block_problem(problem, held, self.plan.offset)
        if part.rows:
            return self.local.pair_stats(part, ranks=True)
        none = torch.empty_like(problem.scale)
        return PairStats(none, none, None, None, none, none.to(torch.int64))

    def _statistics(self, problem: PairProblem, held: Columns, columns: bool) -> PairStats:
        rows = Sums(top=_nothing(problem.scale), total=torch.zeros_like(problem.scale))
        positive = torch.zeros_like(problem.scale) if problem.positives is not None else None

        def visit(block: Columns, own_at: int | None) -> Sums:
            part = _block_problem(problem, block, own_at)
            if not part.rows or not part.cols:
                return _no_sums(part, columns=columns)
            found = self.local.pair_stats(part, columns=columns)
            rows.add(Sums(top=found.row_max, total=found.row_sum))
            if positive is not None and own_at is not None and found.positive_logit is not None:
                positive.copy_(found.positive_logit)
            return Sums(top=found.col_max, total=found.col_sum)

        cols = self.plan.lap(held, {}, visit, "statistics")
        assert rows.top is not None
        assert rows.total is not None
        return PairStats(rows.top, rows.total, cols.top, cols.total, positive)

    def _gradients(
        self, problem: PairProblem, held: Columns, weights: GivenWeights | SoftmaxWeights, needs: GradNeeds
    ) -> PairGrads:
        given = weights if isinstance(weights, GivenWeights) else None
        by_column = given is not None and given.col_shift is not None
        symmetric = problem.self_similarity
        needs = replace(needs, dy=needs.dy and not symmetric, late=False)
        sums_columns = by_column and not symmetric and needs.stats
        new = torch.zeros_like
        rows = Sums(
            grad=new(problem.anchors, dtype=problem.scale.dtype, memory_format=torch.contiguous_format)
            if needs.dx
            else None,
            mass=new(problem.scale) if given is not None and given.row_shift is not None else None,
            moment=new(problem.scale) if needs.moment else None,
            weight=new(problem.scale) if needs.row_weight else None,
            top=_nothing(problem.scale) if needs.stats else None,
            total=new(problem.scale) if needs.stats else None,
        )
        positive = new(problem.scale) if needs.stats and problem.positives is not None else None

        def visit(block: Columns, own_at: int | None) -> Sums:
            part = _block_problem(problem, block, own_at)
            if not part.rows or not part.cols:
                return _no_sums(part, dy=needs.dy, mass=sums_columns, columns=sums_columns)
            found = self.local.pair_grad(part, _block_weights(weights, block, own_at), needs)
            stats = found.stats if needs.stats else None
            of_rows = (None, None) if stats is None else (stats.row_max, stats.row_sum)
            rows.add(Sums(found.dx, found.row_mass, found.row_moment, found.row_weight, *of_rows))
            if positive is not None and own_at is not None and stats is not None and stats.positive_logit is not None:
                positive.copy_(stats.positive_logit)
            of_cols = (None, None) if stats is None or not sums_columns else (stats.col_max, stats.col_sum)
            return Sums(found.dy, found.col_mass if sums_columns else None, None, None, *of_cols)

        vectors: Columns = {}
        if given is not None and given.col_shift is not None and given.col_gain is not None:
            vectors = {"weights": torch.stack([given.col_shift, given.col_gain], 1)}
        cols = self.plan.lap(held, vectors, visit, "gradient")
        stats = None
        if needs.stats:
            assert rows.top is not None
            assert rows.total is not None
            stats = PairStats(rows.top, rows.total, cols.top, cols.total, positive)
        moment = rows.moment
        if symmetric and moment is not None:
            moment = moment.div_(2)  # C holds every pair from both its ends, the loss once
        return PairGrads(rows.grad, cols.grad, moment, rows.mass, cols.mass, stats, row_weight=rows.weight)


def _columns_of(problem: PairProblem) -> Columns:
    columns = {"candidates": problem.candidates}
    return columns if problem.col_groups is None else columns | {"groups": problem.col_groups}


def _block_problem(problem: PairProblem, block: Columns, own_at: int | None) -> PairProblem:
    """Own rows against a block of columns, where positives and the rows themselves are from own_at on."""
    positives = None if problem.positives is None or own_at is None else problem.positives + own_at
    return replace(
        problem,
        candidates=block["candidates"],
        positives=positives,
        col_groups=block.get("groups"),
        self_offset=None if problem.self_offset is None or own_at is None else problem.self_offset + own_at,
        self_similarity=False,
    )


def _block_weights(
    weights: GivenWeights | SoftmaxWeights, block: Columns, own_at: int | None
) -> GivenWeights | SoftmaxWeights:
    if isinstance(weights, SoftmaxWeights):
        return weights
    shift, gain = block["weights"].unbind(1) if "weights" in block else (None, None)
    coeff = None if own_at is None else weights.positive_coeff
    return replace(weights, col_shift=shift, col_gain=gain, positive_coeff=coeff)


def _no_sums(problem: PairProblem, *, dy: bool = False, mass: bool = False, columns: bool = False) -> Sums:
    """Those of a block without pairs."""
    new = problem.scale.new_zeros
    return Sums(
        grad=new(problem.candidates.shape) if dy else None,
        mass=new(problem.cols) if mass else None,
        top=new(problem.cols).fill_(-torch.inf) if columns else None,
        total=new(problem.cols) if columns else None,
    )


def _nothing(like: Tensor) -> Tensor:
    """The maximum of no elements."""
    return torch.full_like(like, -torch.inf)
