"""Triton backend: both sweeps on NVIDIA and AMD devices, by the kernels in contrastile.kernels.

    pair_stats  statistics kernel, window by window of pairs
    pair_grad   fused gradient kernel for at most 256 features, else a strip of coefficients and the vendor's GEMM

Windows bound the memory for any N and M; the strip is at most half of the workspace. Nothing here waits for the
device, and under torch.use_deterministic_algorithms no sum depends on the order in which programs run.

With TRITON_INTERPRET=1 the kernels run in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from contrastile.backends.triton_gradients import (
    PAIRS_WITHOUT_STRIP,
    Gradients,
    fits_one_direction,
    fused_sweep,
    largest_coefficient,
    one_direction_sweep,
    strip_sweep,
)
from contrastile.backends.triton_sums import Totals
from contrastile.backends.triton_sweep import Sweep, fused_plan, interpreting, statistics_plan, strip_plan
from contrastile.kernels.statistics import statistics_kernel
from contrastile.pairs import GivenWeights, GradNeeds, PairGrads, PairProblem, PairStats, SoftmaxWeights
from contrastile.statistics import softmax_weights

__all__ = ["interpreting", "pair_grad", "pair_stats", "positive_logits", "unavailable_reason"]


def unavailable_reason() -> str | None:
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"
    if not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return "torch 2.8 or newer is needed: products of 16-bit tensors with a float32 result"
    return None


def positive_logits(problem: PairProblem) -> Tensor:
    found = Sweep(problem, statistics_plan(problem)).positives()
    assert found is not None
    return found


def pair_stats(problem: PairProblem, *, columns: bool = False, ranks: bool = False) -> PairStats:
    if ranks:
        problem = replace(problem, self_similarity=False)  # a rank needs the whole row
    sweep = Sweep(problem, statistics_plan(problem))
    positive_logit = sweep.positives()
    row_rank = torch.zeros_like(problem.positives) if ranks and problem.positives is not None else None
    totals = Totals.of_statistics(problem, columns)
    for window in sweep.windows(PAIRS_WITHOUT_STRIP):
        partials = totals.partials(window, sweep.plan)
        sweep.launch_tiles(statistics_kernel, window, *partials, positive_logit, row_rank)
        sweep.merge(totals.parts(window), partials)
    return totals.stats(positive_logit, row_rank)


def pair_grad(problem: PairProblem, weights: GivenWeights | SoftmaxWeights, needs: GradNeeds) -> PairGrads:
    grads, totals = Gradients(problem, needs), Totals.none(problem)
    sweep, plan = Sweep(problem, strip_plan(problem)), None if problem.self_similarity else fused_plan(problem)
    stats: PairStats | None = None
    given: GivenWeights | None = None
    largest: Tensor | None = None
    if isinstance(weights, GivenWeights):
        totals = Totals.of_gradients(problem, weights, needs.stats)
        given, largest = weights, largest_coefficient(weights)
    elif plan is None and grads.wanted and not weights.columns and fits_one_direction(sweep):
        stats = one_direction_sweep(sweep, weights.gain, grads)
    else:
        assert problem.positives is not None
        stats = pair_stats(problem, columns=weights.columns)
        gain = torch.full_like(stats.row_max, weights.gain)
        col_gain = gain if weights.columns else None
        given = softmax_weights(stats, problem.positives, gain, col_gain, problem.self_similarity)
        largest = 2 * gain.amax()
    if given is not None and (grads.wanted or totals.wanted):
        unbounded = problem.anchors.dtype == torch.float16 and largest is None
        if plan is None or unbounded or not grads.wanted:
            strip_sweep(sweep, given, largest, grads, totals)
        else:
            fused_sweep(Sweep(problem, plan), given, largest, grads, totals)
    if needs.stats and stats is None:
        stats = totals.stats(sweep.positives())
    return PairGrads(
        dx=grads.dx if needs.dx else None,
        dy=grads.dy if needs.dy and not problem.self_similarity else None,
        row_moment=sweep.row_moments(grads.dx) if needs.moment and grads.dx is not None else None,
        row_mass=totals.rows.mass,
        col_mass=totals.col_mass,
        stats=stats,
    )
