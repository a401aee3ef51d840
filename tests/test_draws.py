"""Gamma draws follow their distribution and depend on seed and step alone."""

from __future__ import annotations

import math

import pytest
import torch
from contrastile.draws import GammaDraws

COUNT = 100_000


@pytest.mark.parametrize("shape", [1.0, 1.5, 4.0, 64.0])
def test_distribution_is_gamma_with_mean_one(shape):
    """By Kolmogorov and Smirnov's distance, whose 99.9 % point is 1.95 / sqrt(count), and by the moments."""
    draws = GammaDraws(shape, generator=torch.Generator().manual_seed(1))(COUNT).double().sort().values
    below = torch.special.gammainc(torch.full_like(draws, shape), draws * shape)
    ranks = torch.arange(COUNT, dtype=torch.float64) / COUNT
    assert (below - ranks).abs().max() < 1.95 / math.sqrt(COUNT) + 1 / COUNT
    assert abs(draws.mean() - 1) < 4 / math.sqrt(shape * COUNT)
    assert draws.min() > 0


def test_larger_shape_varies_less():
    for shape in (1.0, 4.0, 64.0):
        spread = GammaDraws(shape, generator=torch.Generator().manual_seed(1))(COUNT).std()
        assert abs(spread * math.sqrt(shape) - 1) < 0.03


@pytest.mark.parametrize("shape", [1.0, 2.0])
def test_entries_steps_and_seeds_are_uncorrelated(shape):
    draws = GammaDraws(shape, generator=torch.Generator().manual_seed(1))
    first, second = draws(COUNT), draws(COUNT)
    other = GammaDraws(shape, generator=torch.Generator().manual_seed(2))(COUNT)
    for a, b in ((first[1:], first[:-1]), (first[: COUNT // 2], first[COUNT // 2 :]), (first, second), (first, other)):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / math.sqrt(len(a))


@pytest.mark.parametrize("shape", [1.0, 2.0])
def test_seed_and_step_say_everything(shape):
    draws = GammaDraws(shape, generator=torch.Generator().manual_seed(1))
    draws(10)
    state = {name: value.clone() for name, value in draws.state_dict().items()}
    torch.manual_seed(9)
    resumed = GammaDraws(shape)
    resumed.load_state_dict(state)
    assert torch.equal(draws(10), resumed(10))
    assert set(state) == {"seed", "step"}


def test_seed_comes_from_the_generator_or_else_from_torch():
    def seed(generator=None):
        return int(GammaDraws(generator=generator).seed)

    assert seed(torch.Generator().manual_seed(1)) == seed(torch.Generator().manual_seed(1))
    assert seed(torch.Generator().manual_seed(1)) != seed(torch.Generator().manual_seed(2))
    torch.manual_seed(4)
    first, second = seed(), seed()
    assert first != second
    torch.manual_seed(4)
    assert seed() == first


@pytest.mark.parametrize("shape", [0.0, 0.5, math.inf, math.nan])
def test_shape_below_one_is_named(shape):
    with pytest.raises(ValueError, match=f"shape is {shape}: expected a finite number of at least 1"):
        GammaDraws(shape)
