"""RobustContrastiveLoss over a group: losses, gradients, averages and temperatures are those of one process."""

from __future__ import annotations

import re

import contrastile as ct
import pytest
import torch
from contrastile.temperatures import SampleTemperatures
from distributed_cases import DIM, EXCHANGES, SHARES, assert_equal, in_processes
from support import unit_rows
from torch import distributed

WORLD, SAMPLES, STEPS = 2, 11, 3
SIZES = [*SHARES[WORLD], (0, 7)]
SIDES = [True, False]


def steps_of(sizes, rank, symmetric, **place):
    """Loss and gradients of each step in training, of one in evaluation, and what is remembered; all for rank None."""
    rows = sum(sizes)
    own = slice(0, rows) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    temperatures = SampleTemperatures(SAMPLES, rho=0.5, step=0.3, columns=symmetric)
    loss_fn = ct.RobustContrastiveLoss(SAMPLES, temperatures, symmetric=symmetric, init_scale=9.0, **place)
    found = []
    for step in range(STEPS + 1):
        loss_fn.train(step < STEPS)
        x, y = (unit_rows(rows, DIM, torch.float64, 2 * step + side)[own].clone() for side in range(2))
        index = torch.randint(SAMPLES, (rows,), generator=torch.Generator().manual_seed(step))[own]  # some twice
        loss = loss_fn(x.requires_grad_(), y.requires_grad_(), index if step < STEPS else None)
        loss.backward()
        found.append((loss.detach(), x.grad, y.grad))
    return found, {name: value.clone() for name, value in loss_fn.state_dict().items()}


def told(rank):
    group = distributed.group.WORLD
    loss_fn = ct.RobustContrastiveLoss(SAMPLES, SampleTemperatures(SAMPLES, rho=0.5), group=group)
    x, y, index = unit_rows(4, DIM), unit_rows(4, DIM, seed=1), torch.arange(4)
    calls = [lambda: loss_fn(x, y, index + SAMPLES * rank), lambda: loss_fn(x, y[: 4 - rank], index)]
    messages = []
    for call in calls:
        with pytest.raises((ValueError, RuntimeError)) as raised:
            call()
        messages.append(f"{raised.type.__name__}: {raised.value}")
    return messages


def all_of(rank):
    group = distributed.group.WORLD
    found = {
        (sizes, symmetric, exchange): steps_of(sizes, rank, symmetric, group=group, exchange=exchange)
        for sizes in SIZES
        for symmetric in SIDES
        for exchange in EXCHANGES
    }
    return found, told(rank)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return in_processes(WORLD, all_of, tmp_path_factory.mktemp("robust"))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("symmetric", SIDES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_step_is_that_of_one_process(results, sizes, symmetric, exchange):
    whole, state = steps_of(sizes, None, symmetric)
    parts = [found[sizes, symmetric, exchange] for found, _ in results]
    for step, (loss, *gradients) in enumerate(whole):
        for found, _ in parts:
            assert_equal(found[step][0], loss)
        for at, expected in enumerate(gradients, start=1):
            assert_equal(torch.cat([found[step][at] for found, _ in parts]) / WORLD, expected)
    for _, remembered in parts:
        assert remembered.keys() == state.keys()
        for name, value in state.items():  # in float32
            torch.testing.assert_close(remembered[name], value, msg=lambda m, n=name: f"{n}: {m}")
    for name in state:
        assert torch.equal(parts[0][1][name], parts[1][1][name])
    assert bool((state["temperatures.relative"] != 1).any())


EXPECTED = [
    r"(ValueError: index runs from 11 to 14|RuntimeError: .*rank 1 raised ValueError: index runs from 11 to 14)",
    r"(ValueError: x is \(4, 7\) but y is \(3, 7\)|RuntimeError: .*rank 1 raised ValueError: x is \(4, 7\))",
]


@pytest.mark.parametrize("number", range(len(EXPECTED)), ids=EXPECTED)
def test_every_process_is_told_what_does_not_fit(results, number):
    for _, messages in results:
        assert re.match(EXPECTED[number], messages[number]), messages[number]


def test_an_exchange_without_a_group_is_refused():
    loss_fn = ct.RobustContrastiveLoss(SAMPLES, SampleTemperatures(SAMPLES, rho=0.5), exchange="ring")
    with pytest.raises(ValueError, match="exchange is 'ring' without a group"):
        loss_fn(unit_rows(4, DIM), unit_rows(4, DIM, seed=1), torch.arange(4))
