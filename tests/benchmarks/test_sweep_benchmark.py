"""pytest-benchmark of the two sweeps: pytest tests/benchmarks --benchmark-enable. Run once each as plain tests."""

from __future__ import annotations

import pytest
import torch
from contrastile import backends
from contrastile.bench.cases import PRODUCTS
from contrastile.pairs import GivenWeights, GradNeeds, PairProblem, SoftmaxWeights, WeightFunction
from support import BACKENDS_HERE

ROWS, DIM = 1024, 256

pytestmark = [
    pytest.mark.parametrize("backend", BACKENDS_HERE),
    pytest.mark.benchmark(group="sweeps", warmup=True, warmup_iterations=1),
]


@pytest.fixture
def problem() -> PairProblem:
    x, y = (torch.nn.functional.normalize(torch.randn(ROWS, DIM), dim=1) for _ in range(2))
    return PairProblem(x, y, torch.full((ROWS,), 20.0), positives=torch.arange(ROWS))


def test_pair_stats(benchmark, backend: str, problem: PairProblem) -> None:
    benchmark.extra_info["flop"] = 2 * ROWS**2 * DIM
    stats = benchmark(backends.get(backend).pair_stats, problem, columns=True)
    assert stats.row_sum.shape == stats.col_sum.shape == (ROWS,)


def test_pair_grad_with_given_weights(benchmark, backend: str, problem: PairProblem) -> None:
    benchmark.extra_info["flop"] = 2 * PRODUCTS["gamma"] * ROWS**2 * DIM
    shift, gain = torch.full((ROWS,), 8.0), torch.full((ROWS,), 1 / ROWS)
    weights = GivenWeights(shift, gain, shift, gain, positive_coeff=-gain, function=WeightFunction.CAPPED)
    grads = benchmark(backends.get(backend).pair_grad, problem, weights, GradNeeds(dx=True, dy=True))
    assert grads.dx.shape == grads.dy.shape == (ROWS, DIM)


@pytest.mark.parametrize("columns", [False, True], ids=["one_direction", "symmetric"])
def test_pair_grad_with_softmax_weights(benchmark, backend: str, problem: PairProblem, columns: bool) -> None:
    benchmark.extra_info["flop"] = 2 * PRODUCTS["symmetric" if columns else "one_direction"] * ROWS**2 * DIM
    grads = benchmark(
        backends.get(backend).pair_grad, problem, SoftmaxWeights(columns), GradNeeds(dx=True, dy=True, stats=True)
    )
    assert grads.dx.shape == grads.dy.shape == (ROWS, DIM)
