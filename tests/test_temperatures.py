"""Temperatures of samples: where a visit moves them, what it leaves alone, what is refused."""

from __future__ import annotations

import pytest
import torch
from contrastile.normalizer import count_of_equals, mean_of_equals
from contrastile.temperatures import SampleTemperatures
from support import default_dtype


def slopes(rows: int, seed: int = 0):
    return torch.randn(2, rows, generator=torch.Generator().manual_seed(seed))


def test_visits_move_a_sample_by_its_averaged_slope_within_bounds():
    temperatures = SampleTemperatures(5, rho=1.0, step=0.4, slope_rate=0.75, lowest=0.8, highest=1.1)
    relative, momentum = torch.ones(2, 5, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)
    for seed in range(4):
        index = torch.tensor([[3, 1, 0], [1, 3, 4]][seed % 2])
        temperatures.update(index, slopes(3, seed))
        momentum[:, index] = 0.25 * momentum[:, index] + 0.75 * slopes(3, seed).double()
        relative[:, index] = (relative[:, index] - 0.4 * momentum[:, index]).clamp(0.8, 1.1)
        torch.testing.assert_close(temperatures.relative.double(), relative, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(temperatures(index).double(), relative[:, index], rtol=1e-6, atol=1e-6)
    at_bounds = (relative == 0.8) | (relative == 1.1)
    assert 0 < at_bounds.sum() < 8
    stats = temperatures.stats()
    assert stats["at_lowest"] + stats["at_highest"] == at_bounds.float().mean()
    assert stats["temperature"] == pytest.approx(relative.mean().item())
    assert bool((temperatures.relative[:, 2] == 1).all())


def test_a_repeated_sample_moves_once_by_the_mean_of_its_slopes():
    once, repeated = (SampleTemperatures(4, rho=1.0, step=0.01) for _ in range(2))
    found = slopes(4)
    repeated.update(torch.tensor([3, 0, 3, 3]), found)
    mean = found[:, [0, 2, 3]].mean(1)
    once.update(torch.tensor([3, 0]), torch.stack([mean, found[:, 1]], 1))
    torch.testing.assert_close(repeated.relative, once.relative)
    torch.testing.assert_close(repeated.momentum, once.momentum)


def test_equals_are_counted_and_distinct_values_kept_bit_for_bit():
    index = torch.tensor([7, 2, 7, 0, 7, 2])
    assert count_of_equals(index).tolist() == [3, 2, 3, 1, 3, 2]
    values = slopes(6)
    assert torch.equal(mean_of_equals(torch.randperm(6), values), values)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_slopes_that_are_not_finite_move_nothing(bad):
    temperatures, index = SampleTemperatures(3, rho=1.0, step=0.1), torch.tensor([0, 2])
    temperatures.update(index, slopes(2))
    before = temperatures.relative.clone(), temperatures.momentum.clone()
    found = slopes(2, 1)
    found[0, 1] = bad
    temperatures.update(index, found)
    for buffer, old in zip((temperatures.relative, temperatures.momentum), before, strict=True):
        assert buffer[0, 2] == old[0, 2]
        assert buffer[0, 0] != old[0, 0]
        assert buffer[1, 2] != old[1, 2]


def test_casting_the_model_leaves_temperatures_in_float32():
    temperatures = SampleTemperatures(3, rho=1.0).half()
    assert temperatures.relative.dtype == temperatures.momentum.dtype == torch.float32


def test_temperatures_are_created_and_loaded_in_float32_whatever_the_default_and_the_state():
    with default_dtype(torch.bfloat16):
        temperatures = SampleTemperatures(3, rho=1.0, step=1e-3)
    temperatures.update(torch.arange(3), torch.ones(2, 3))
    torch.testing.assert_close(temperatures.relative, torch.full((2, 3), 1 - 9e-4))
    narrow = {name: value.half() for name, value in temperatures.state_dict().items()}
    temperatures.load_state_dict(narrow, assign=True)
    for name, value in narrow.items():
        assert torch.equal(temperatures.state_dict()[name], value.float())


def test_sixteen_bytes_a_sample_hold_both_sides():
    assert sum(buffer.nbytes for buffer in SampleTemperatures(1000, rho=1.0).buffers()) == 16_000
    assert sum(buffer.nbytes for buffer in SampleTemperatures(1000, rho=1.0, columns=False).buffers()) == 8_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0: expected at least 1"),
        ({"rho": -1.0}, "rho is -1.0: expected a finite number of at least 0"),
        ({"rho": float("nan")}, "rho is nan: expected a finite number of at least 0"),
        ({"step": -0.1}, "step is -0.1: expected a finite number of at least 0"),
        ({"slope_rate": 0.0}, "slope_rate is 0.0: expected a number above 0, at most 1"),
        ({"lowest": 0.0}, "lowest is 0.0 and highest 5.0: expected 0 < lowest <= 1 <= highest"),
        ({"highest": 0.9}, "lowest is 0.5 and highest 0.9: expected 0 < lowest <= 1 <= highest"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SampleTemperatures(**{"num_samples": 3, "rho": 1.0, **options})
