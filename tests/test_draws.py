"""Gamma draws follow their distribution and depend on seed and step alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from contrastile.draws import GammaDraws, _mixed

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


@pytest.mark.parametrize("lag", [(0, 1), (1, 0), (1, 1), (0, 32), (2, 0)], ids=str)
def test_neighbouring_entries_and_steps_are_independent(lag):
    """Chi-square over 16 x 16 cells of pairs (entry, entry lag further on), as a standard normal deviate."""
    draws = GammaDraws(generator=torch.Generator().manual_seed(3))
    cells = (torch.stack([-draws(64) for _ in range(4000)]).double().exp() * 16).long()
    step, entry = lag
    pairs = cells[step:, entry:] * 16 + cells[: len(cells) - step, : 64 - entry]
    counts = torch.bincount(pairs.flatten(), minlength=256).double()
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert abs(chi_square - 255) / math.sqrt(2 * 255) < 4


def test_hash_of_32_bit_words_stays_within_them_and_matches_its_definition():
    def defined(word):
        for shift, factor in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
            word = (word ^ (word >> shift)) * factor % 2**32
        return word ^ (word >> 14)

    words = torch.cat([torch.randint(2**32, (1000,)), torch.tensor([0, 1, 2**31, 2**32 - 1])])
    assert _mixed(words).tolist() == [defined(word) for word in words.tolist()]


@pytest.mark.slow
def test_inductor_gives_the_same_draws_at_every_count():
    """A product of indices beyond int64, undefined in the generated C++, would end its loops early."""
    plain, traced = (GammaDraws(2.0, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    compiled = torch.compile(lambda like: traced(len(like)), fullgraph=True, dynamic=True)
    for count in (8, 5, 12, 3):
        torch.testing.assert_close(compiled(torch.empty(count)), plain(count), rtol=1e-5, atol=1e-6)


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


def test_every_bit_of_the_seed_counts():
    found = []
    for seed in (5, 4, 5 + 2**32, 5 + 2**61):
        draws = GammaDraws()
        draws.seed.fill_(seed)
        found.append(draws(64))
    assert all(abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.5 for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize("shape", [0.0, 0.5, math.inf, math.nan])
def test_shape_below_one_is_named(shape):
    with pytest.raises(ValueError, match=f"shape is {shape}: expected a finite number of at least 1"):
        GammaDraws(shape)
