"""Losses of latent structure and retrieval ranks over a group are those of one process with the whole batch."""

from __future__ import annotations

import re

import contrastile as ct
import pytest
import torch
from distributed_cases import DIM, EXCHANGES, SHARES, assert_equal, in_processes
from support import ids, permutation, unit_rows
from torch import distributed

WORLD = 2
CASES = {  # function, options; "time" by row is the problem's
    "four ways": ("four_way_contrastive", {}),
    "four ways as printed": ("four_way_contrastive", {"printed_denominators": True}),
    "separation": ("feature_separation", {}),
    "separation as printed": ("feature_separation", {"printed_denominators": True}),
    "separation without augmentation": ("feature_separation", {"printed_denominators": True, "bare": True}),
    "separation of long rows": ("feature_separation", {"length": 5.0}),
    "bridge": ("brownian_bridge", {}),
    "bridge by row": ("brownian_bridge", {"time": "by row", "likelihood_weight": True, "reduction": "sum"}),
    "bridge none": ("brownian_bridge", {"time": "by row", "reduction": "none"}),
}
ARGUMENTS = {"four_way_contrastive": 4, "feature_separation": 6, "brownian_bridge": 3}
MODULES = {
    "four_way_contrastive": ct.FourWayContrastiveLoss,
    "feature_separation": ct.FeatureSeparationLoss,
    "brownian_bridge": ct.BrownianBridgeLoss,
}
SIZES = [*SHARES[WORLD], (0, 7)]


def own_rows(sizes, rank):
    return slice(0, sum(sizes)) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def evaluate(name, sizes, rank, exchange=None, **place):
    """Loss and gradients of a rank's share, of all for None."""
    function, options = CASES[name][0], dict(CASES[name][1])
    rows, own = sum(sizes), own_rows(sizes, rank)
    count = 4 if options.pop("bare", False) else ARGUMENTS[function]
    length = options.pop("length", 1.0)
    leaves = [
        (length * unit_rows(rows, DIM, torch.float64, seed)[own]).clone().requires_grad_() for seed in range(count)
    ]
    if options.get("time") == "by row":
        options["time"] = torch.linspace(0.1, 0.9, rows, dtype=torch.float64)[own]
    if function != "brownian_bridge":
        options |= {"scale": torch.tensor(9.0, dtype=torch.float64, requires_grad=True), "exchange": exchange}
    if exchange == "ring" and "time" not in options:  # the module, for once
        forward = {"scale": options.pop("scale")} if "scale" in options else {}
        loss = MODULES[function](**options, **place)(*leaves, **forward)
        options |= forward
    else:
        loss = getattr(ct, function)(*leaves, **options, **place)
    loss.backward(torch.linspace(0.5, 1.5, rows, dtype=torch.float64)[own] if loss.dim() else None)
    scale = options.get("scale")
    return loss.detach(), [leaf.grad for leaf in leaves], None if scale is None else scale.grad


def ranked(sizes, rank, **place):
    rows, own = sum(sizes), own_rows(sizes, rank)
    x, y = unit_rows(rows, DIM, torch.float64, 1)[own], unit_rows(rows, DIM, torch.float64, 2)[own]
    within = torch.cat([permutation(size) + sum(sizes[:r]) for r, size in enumerate(sizes)])[own] - own.start
    groups = ids(rows, 4)[own], ids(rows + 1, 4)[:rows][own]
    return [ct.retrieval_ranks(x, y, **place), ct.retrieval_ranks(x, y, within, groups=groups, **place)]


def refusals(rank):
    """What each process is told."""
    group = distributed.group.WORLD
    rows = [unit_rows(4, DIM, seed=seed) for seed in range(6)]
    other = unit_rows(4, DIM + rank)
    calls = [
        lambda: ct.brownian_bridge(*rows[:3], time=0.5 + rank, group=group),
        lambda: ct.brownian_bridge(*rows[:2], other, group=group),
        lambda: ct.four_way_contrastive(other, other, other, other, 9.0, group=group),
        lambda: ct.feature_separation(*rows[: 6 - 2 * rank], scale=9.0, printed_denominators=True, group=group),
        lambda: ct.feature_separation(*(t[: 1 - rank] for t in rows), scale=9.0, group=group),
        lambda: ct.retrieval_ranks(rows[0], other, group=group),
        lambda: ct.brownian_bridge(*rows[:3], backend="tpu" if rank else None, group=group),
    ]
    told = []
    for call in calls:
        with pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
            call()
        told.append(f"{raised.type.__name__}: {raised.value}")
    return told


def all_of(rank):
    group = distributed.group.WORLD
    found = {
        (name, sizes, exchange): evaluate(name, sizes, rank, exchange, group=group)
        for name in CASES
        for sizes in SIZES
        for exchange in EXCHANGES
    }
    return found, {sizes: ranked(sizes, rank, group=group) for sizes in SIZES}, refusals(rank)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return in_processes(WORLD, all_of, tmp_path_factory.mktemp("structure"))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_one_process(results, name, exchange):
    for sizes in SIZES:
        loss, gradients, dscale = evaluate(name, sizes, None)
        parts = [found[name, sizes, exchange] for found, *_ in results]
        by_row = bool(loss.dim())
        losses = [torch.cat([part[0] for part in parts])] if by_row else [part[0] for part in parts]
        for found in losses:
            assert_equal(found, loss)
        factor = 1 if by_row else WORLD  # gradients are those of the sum of all processes' losses
        for at, expected in enumerate(gradients):
            assert_equal(torch.cat([part[1][at] for part in parts]) / factor, expected)
        if dscale is not None:
            assert_equal(sum(part[2] for part in parts) / factor, dscale)


def test_ranks_are_those_of_one_process(results):
    for sizes in SIZES:
        for at, expected in enumerate(ranked(sizes, None)):
            found = torch.cat([ranks[sizes][at] for _, ranks, _ in results])
            assert torch.equal(found, expected)
            assert bool(expected.any())


EXPECTED = [
    r"(ValueError: time is 1.5: expected|RuntimeError: .*rank 1 raised ValueError: time is 1.5)",
    r"(ValueError: v_aug is \(4, 7\) but t is \(4, 8\)|RuntimeError: .*rank 1 raised ValueError: v_aug is)",
    r"ValueError: features differs between the processes of the group: 7 on rank 0, 8 on rank 1",
    r"ValueError: augmented differs between the processes of the group: True on rank 0, False on rank 1",
    r"ValueError: v is \([01], 7\): the uniformity of one row is undefined",
    r"(ValueError: x is \(4, 7\) but y is \(4, 8\)|RuntimeError: .*rank 1 raised ValueError: x is)",
    r"(ValueError: backend is 'tpu'|RuntimeError: .*rank 1 raised ValueError: backend is 'tpu')",
]


@pytest.mark.parametrize("number", range(len(EXPECTED)), ids=EXPECTED)
def test_every_process_is_told_what_does_not_fit(results, number):
    for *_, told in results:
        assert re.match(EXPECTED[number], told[number]), told[number]
