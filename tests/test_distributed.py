"""Losses over a group are those of one process, in float64, whatever the world's size, the shares and the exchange."""

from __future__ import annotations

from functools import partial

import pytest
from contrastile.distributed import plans
from distributed_cases import ALL_CASES, DIM, EXCHANGES, SHARES, assert_equal, evaluate, in_processes, joined
from torch import distributed

IN_PIECES = "ring, two columns at a time"  # and one, and none, as shares differ


def all_cases(world, rank):
    group, whole = distributed.group.WORLD, plans.PIECE_BYTES
    found = {}
    for exchange in (*EXCHANGES, IN_PIECES):
        plans.PIECE_BYTES = 2 * DIM * 8 if exchange == IN_PIECES else whole
        for name in ALL_CASES:
            for sizes in SHARES[world]:
                options = {"group": group, "exchange": exchange.split(",")[0]}
                found[name, sizes, exchange] = evaluate(name, sizes, rank, **options)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    worlds = {}

    def of(world):
        if world not in worlds:
            worlds[world] = in_processes(world, partial(all_cases, world), tmp_path_factory.mktemp(f"world{world}"))
        return worlds[world]

    return of


def assert_all_equal(ours, truth):
    assert ours.keys() == truth.keys()
    for key, value in truth.items():
        assert_equal(ours[key], value, key)


@pytest.mark.parametrize("exchange", [*EXCHANGES, IN_PIECES])
@pytest.mark.parametrize("name", ALL_CASES)
@pytest.mark.parametrize("world", SHARES)
def test_values_and_gradients_are_those_of_one_process(found, world, name, exchange):
    for sizes in SHARES[world]:
        ours = joined(name, [results[name, sizes, exchange] for results in found(world)])
        assert_all_equal(ours, evaluate(name, sizes, None))
