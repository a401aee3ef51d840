"""Both sweeps, window by window of pairs.

    pair_stats  statistics kernel
    pair_grad   fused gradient kernel for few features, else a strip of coefficients and the vendor's GEMM

Windows bound the memory for any N and M; the strip is at most half of the workspace. Nothing here waits for the
device, and under torch.use_deterministic_algorithms no sum depends on the order in which programs run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from contrastile.backends.tiled.gradients import (
    MOST_PAIRS,
    Gradients,
    computes_both,
    fits_one_direction,
    fused_sweep,
    largest_coefficient,
    one_direction_sweep,
    strip_sweep,
)
from contrastile.backends.tiled.launches import Kernels, Sweep
from contrastile.backends.tiled.sums import Totals
from contrastile.kernels.plans import TilePlan
from contrastile.pairs import GivenWeights, GradNeeds, PairGrads, PairProblem, PairStats, SoftmaxWeights, WeightFunction


def positive_logits(kernels: Kernels, problem: PairProblem) -> Tensor:
    found = kernels.sweep(problem, kernels.statistics_plan(problem, ranks=False)).positives()
    assert found is not None
    return found


def pair_stats(kernels: Kernels, problem: PairProblem, columns: bool, ranks: bool) -> PairStats:
    if ranks:
        problem = replace(problem, self_similarity=False)  # a rank needs the whole row

    def run(plan: TilePlan) -> PairStats:
        return _pair_stats(kernels.sweep(problem, plan), columns, ranks)

    return run(kernels.tuned("statistics", problem, kernels.statistics_plan(problem, ranks), run))


def _pair_stats(sweep: Sweep, columns: bool, ranks: bool) -> PairStats:
    problem = sweep.problem
    positive_logit = sweep.positives()
    row_rank = torch.zeros_like(problem.positives) if ranks and problem.positives is not None else None
    totals = Totals.of_statistics(problem, columns)
    for window in sweep.windows(MOST_PAIRS):
        partials = totals.partials(window, sweep.plan)
        sweep.statistics(window, *partials, positive_logit, row_rank)
        totals.merge(sweep, window, partials)
    return totals.stats(positive_logit, row_rank)


def pair_grad(
    kernels: Kernels, problem: PairProblem, weights: GivenWeights | SoftmaxWeights, needs: GradNeeds
) -> PairGrads:
    sweep = kernels.sweep(problem, kernels.strip_plan(problem, sums=True))
    if isinstance(weights, GivenWeights):
        new_totals = partial(Totals.of_gradients, problem, weights, needs.stats, needs.row_weight)
        largest = largest_coefficient(weights) if problem.anchors.dtype == torch.float16 else None
        grads, totals = _given_grad(kernels, problem, weights, largest, needs, new_totals)
        stats = totals.stats(sweep.positives() if needs.positives else None) if needs.stats else None
    else:
        grads, stats = _softmax_grad(kernels, sweep, weights, needs)
        totals = Totals.none(problem)
    rows = grads.rows(kernels)
    if needs.late:
        return PairGrads(None, None, None, totals.rows.mass, totals.col_mass, stats, rows, totals.rows.weight)
    finished = rows.finish(problem.anchors, None, torch.float32, joined=False)
    return PairGrads(*finished, totals.rows.mass, totals.col_mass, stats, row_weight=totals.rows.weight)


def _softmax_grad(
    kernels: Kernels, sweep: Sweep, weights: SoftmaxWeights, needs: GradNeeds
) -> tuple[Gradients, PairStats]:
    problem = sweep.problem
    wanted = needs.dx or needs.dy or needs.moment
    is_fused = kernels.fused_plan(problem, sums=False, capped=False) is not None
    if wanted and not weights.columns and not is_fused and fits_one_direction(sweep):
        grads = Gradients(problem, needs)
        return grads, one_direction_sweep(sweep, weights.gain, grads)
    stats = pair_stats(kernels, problem, weights.columns, ranks=False)
    given, losses = kernels.softmax_weights(problem, stats, weights)
    largest = stats.row_max.new_full((), 2 * weights.gain) if problem.anchors.dtype == torch.float16 else None
    return _given_grad(kernels, problem, given, largest, needs, None)[0], replace(stats, row_loss=losses)


def _given_grad(
    kernels: Kernels,
    problem: PairProblem,
    weights: GivenWeights,
    largest: Tensor | None,  # bound of |C|, where it is known; for float16
    needs: GradNeeds,
    new_totals: Callable[[], Totals] | None,  # None: no sums on the way
) -> tuple[Gradients, Totals]:
    sums = new_totals is not None
    is_capped = weights.function is WeightFunction.CAPPED
    wanted, capped = needs.dx or needs.dy or needs.moment, is_capped and computes_both(needs)
    fused = kernels.fused_plan(problem, sums, capped) if wanted else None
    if problem.anchors.dtype == torch.float16 and largest is None:
        fused = None  # nothing tells how to fit the coefficients into float16

    def run(plan: TilePlan) -> tuple[Gradients, Totals]:
        grads = Gradients(problem, needs)
        totals = Totals.none(problem) if new_totals is None else new_totals()
        if grads.wanted or totals.wanted:
            by = strip_sweep if fused is None else fused_sweep
            by(kernels.sweep(problem, plan), weights, largest, grads, totals)
        return grads, totals

    if fused is not None:
        return run(kernels.tuned("fused gradient", problem, fused, run))
    return run(kernels.tuned("gradient", problem, kernels.strip_plan(problem, sums), run))
