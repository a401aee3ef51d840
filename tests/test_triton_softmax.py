"""The kernel of softmax weights, in Triton's interpreter: the formulas of contrastile/statistics.py, at every special
value. tests/test_triton_interpreter.py starts it.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from contrastile.pairs import PairProblem, PairStats, SoftmaxWeights
from contrastile.statistics import info_nce_values, softmax_weights
from support import BACKENDS_HERE, INTERPRETING
from test_triton_kernels import Guards, between_guards
from torch import Tensor

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="test_triton_interpreter.py runs these")
if "triton" in BACKENDS_HERE:
    from contrastile.backends import triton

LOGITS = (-math.inf, -200.0, -60.0, -1.0, 0.0, 3.0, 88.0, 1000.0, math.inf, math.nan)
SUMS = (0.0, 1e-30, 1.0, 17.5, math.inf, math.nan)
TOLERANCE = 4e-6  # of an exponential of -60, whose argument is rounded
GAIN = 0.25


def shuffled(values: Tensor, seed: int) -> Tensor:
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize(("columns", "self_similarity"), [(False, False), (True, False), (False, True)])
def test_weights_and_losses_are_those_of_the_formulas_at_every_special_value(
    columns: bool, self_similarity: bool
) -> None:
    cases = torch.tensor(list(itertools.product(LOGITS, SUMS, LOGITS)))
    count = len(cases)
    maximum, total, logit = cases.unbind(1)
    pairs = torch.arange(count).view(-1, 2).flip(1).reshape(-1)
    positives = pairs if self_similarity else shuffled(torch.arange(count), 1)
    by_column = (shuffled(maximum, 2), shuffled(total, 3)) if columns else (None, None)
    guards = Guards()
    with guards:
        given = [None if t is None else between_guards(t) for t in (maximum, total, *by_column, logit)]
        rows = torch.ones(count, 1)
        problem = PairProblem(rows, rows, torch.ones(count), positives, self_similarity=self_similarity)
        found, losses = triton.KERNELS.softmax_weights(problem, PairStats(*given), SoftmaxWeights(columns, GAIN))
    guards.check()
    stats, gain = PairStats(maximum, total, *by_column, logit), torch.full((count,), GAIN)
    expected = softmax_weights(stats, positives, gain, gain if columns else None, self_similarity)
    assert losses is not None
    torch.testing.assert_close(
        losses, info_nce_values(stats, positives, columns), rtol=TOLERANCE, atol=1e-37, equal_nan=True
    )
    for name in ("row_shift", "row_gain", "col_shift", "col_gain", "positive_coeff"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=1e-37, equal_nan=True, msg=name)


def test_a_confident_row_keeps_its_digits() -> None:
    gap = torch.tensor([-10.0, -16.0, -20.0, -40.0, -80.0])
    stats = PairStats(gap, torch.ones(5), None, None, torch.zeros(5))
    problem = PairProblem(torch.ones(5, 1), torch.ones(5, 1), torch.ones(5), torch.arange(5))
    found, losses = triton.KERNELS.softmax_weights(problem, stats, SoftmaxWeights(False, 1.0))
    share = gap.double().exp() / (1 + gap.double().exp())
    torch.testing.assert_close(losses.double(), gap.double().exp().log1p(), rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(found.positive_coeff.double(), -share, rtol=TOLERANCE, atol=0)


def test_what_nobody_looks_for_on_a_device_leaves_no_stale_memory() -> None:
    """Two rows with one positive: the other column is nobody's."""
    stats = PairStats(*[torch.ones(2)] * 5)
    problem = PairProblem(torch.ones(2, 1), torch.ones(2, 1), torch.ones(2), torch.tensor([1, 1]))
    guards = Guards()
    with guards:
        found, _ = triton.KERNELS.softmax_weights(problem, stats, SoftmaxWeights(True, 1.0))
    assert (found.col_shift[0], found.col_gain[0]) == (0, 0)
