"""The new options over a group are those of one process with the whole batch; what does not work is refused."""

from __future__ import annotations

import re

import contrastile as ct
import pytest
import torch
from distributed_cases import DIM, EXCHANGES, SHARES, Share, assert_equal, in_processes, problem
from support import unit_rows
from torch import distributed

WORLD = 2
EVERY_DIRECTION = ("xy", "yx", "xx", "yy")
CASES = {  # function, options by name; "own", "shared", "groups" and "prior" by row are the problem's
    "own": ("info_nce", {"hard_negatives": "own", "prior": 0.05, "label_smoothing": 0.2}),
    "shared": ("info_nce", {"hard_negatives": "shared", "prior": "by row", "label_smoothing": 0.2}),
    "groups": ("info_nce", {"hard_negatives": "shared", "prior": 0.05, "groups": "ids"}),
    "smoothed": ("info_nce", {"hard_negatives": "shared", "label_smoothing": 0.2, "groups": "ids"}),
    "smoothed rows": (
        "info_nce",
        {"symmetric": False, "label_smoothing": 0.3, "scale": "row_scale", "groups": "ids", "reduction": "none"},
    ),
    "smoothed apart": (
        "directional_info_nce",
        {"directions": EVERY_DIRECTION, "partition": "per_direction", "label_smoothing": 0.2, "groups": "ids"},
    ),
    "rows": ("info_nce", {"symmetric": False, "label_smoothing": 0.2, "scale": "row_scale", "prior": 0.1}),
    "none": ("info_nce", {"hard_negatives": "own", "label_smoothing": 0.2, "reduction": "none"}),
    "locked": ("info_nce", {"hard_negatives": "own", "label_smoothing": 0.2, "locked": True}),
    "sum": ("nt_xent", {"hard_negatives": "own", "prior": 0.05, "label_smoothing": 0.2, "reduction": "sum"}),
    "qwen3": ("directional_info_nce", {"hard_negatives": "own", "prior": 0.05, "label_smoothing": 0.2}),
    "gte": ("directional_info_nce", {"hard_negatives": "shared", "directions": EVERY_DIRECTION, "groups": "ids"}),
    "apart": ("directional_info_nce", {"directions": EVERY_DIRECTION, "partition": "per_direction", "prior": 0.1}),
    "margin": ("info_nce", {"hard_negatives": "shared", "false_negative_margin": -0.1, "groups": "ids"}),
    "margins": ("directional_info_nce", {"directions": EVERY_DIRECTION, "false_negative_margin": -0.2}),
    "matryoshka": ("matryoshka", {"prior": 0.05, "label_smoothing": 0.2}),
}


def sizes_of(name: str) -> list[tuple[int, ...]]:
    """Shares of both processes; views come in pairs, and one process may have no rows."""
    shares = [*SHARES[WORLD], (0, 7)]
    return [tuple(size + size % 2 for size in sizes) if CASES[name][0] == "nt_xent" else sizes for sizes in shares]


def evaluate(name: str, sizes: tuple[int, ...], rank: int | None, **place) -> dict[str, torch.Tensor]:
    """Loss and gradients of a rank's share, of all for None."""
    function, options = CASES[name][0], dict(CASES[name][1])
    p, share = problem(sizes, 0, torch.float64), Share.of(sizes, 0, rank)
    rows = sum(sizes)
    p["own"] = unit_rows(3 * rows, DIM, torch.float64, 5).reshape(rows, 3, DIM)
    p["shared"] = unit_rows(rows, DIM, torch.float64, 6)
    p["by row"] = torch.linspace(0, 0.5, rows, dtype=torch.float64)
    scale = options.pop("scale", "scale")
    leaves = {name: p[name][share.rows].clone().requires_grad_() for name in ("x", "y")}
    leaves["scale"] = (p[scale][share.rows] if p[scale].dim() else p[scale]).clone().requires_grad_()
    if "hard_negatives" in options:
        leaves["hard_negatives"] = p[options.pop("hard_negatives")][share.rows].clone().requires_grad_()
    if options.get("prior") == "by row":
        options["prior"] = p["by row"][share.rows]
    if options.pop("groups", None):
        options["groups"] = p["row_ids"][share.rows], p["col_ids"][share.rows]
    if options.pop("locked", False):
        leaves["y"].requires_grad_(False)
    options |= {key: value for key, value in leaves.items() if key not in ("x", "y")}
    if function == "nt_xent":
        positives = (p["partners"] + p["starts"])[share.rows] - share.rows.start
        leaves.pop("y")
        loss = ct.nt_xent(leaves["x"], positives=positives, **options, **place)
    elif function == "matryoshka":
        loss = ct.matryoshka(ct.info_nce, leaves["x"], leaves["y"], dims=(3, DIM), **options, **place)
    else:
        loss = getattr(ct, function)(leaves["x"], leaves["y"], **options, **place)
    ramp = torch.linspace(0.5, 1.5, rows, dtype=torch.float64)[share.rows] if loss.dim() else None
    loss.backward(ramp)
    return {"loss": loss.detach()} | {f"d{key}": leaf.grad for key, leaf in leaves.items() if leaf.requires_grad}


def refusals(rank: int) -> list[str]:
    """What each process is told."""
    group = distributed.group.WORLD
    x, y = unit_rows(4, DIM), unit_rows(4, DIM)
    calls = [
        lambda: ct.info_nce(x, y, 9.0, label_smoothing=0.1 * rank, prior=0.1, group=group),
        lambda: ct.info_nce(x, y, 9.0, hard_negatives=unit_rows(4, DIM)[: 4 - rank, None], group=group),
        lambda: ct.info_nce(x, y, 9.0, hard_negatives=x[None].expand(4, 4, DIM) if rank else x, group=group),
        lambda: ct.directional_info_nce(x, y, 9.0, directions=("xy", "xx")[: 1 + rank], group=group),
    ]
    told = []
    for call in calls:
        try:
            call()
        except (ValueError, RuntimeError) as found:
            told.append(f"{type(found).__name__}: {found}")
    return told


def all_results(rank: int):
    group = distributed.group.WORLD
    found = {
        (name, sizes, exchange): evaluate(name, sizes, rank, group=group, exchange=exchange)
        for name in CASES
        for sizes in sizes_of(name)
        for exchange in EXCHANGES
    }
    return found, refusals(rank)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return in_processes(WORLD, all_results, tmp_path_factory.mktemp("objectives"))


def joined(name: str, found: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """By the contract of gradients: a loss that is the batch's counts once for each process."""
    by_row = CASES[name][1].get("reduction") == "none"
    whole = {}
    for key in found[0]:
        parts = [part[key] for part in found]
        if key == "loss" and not by_row:
            assert all(torch.equal(part, parts[0]) for part in parts)
            whole[key] = parts[0]
            continue
        whole[key] = torch.cat(parts) if parts[0].dim() else torch.stack(parts).sum(0)
        if key != "loss" and not by_row:
            whole[key] = whole[key] / WORLD
    return whole


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_one_process(results, name, exchange):
    for sizes in sizes_of(name):
        ours = joined(name, [found[name, sizes, exchange] for found, _ in results])
        truth = evaluate(name, sizes, None)
        assert ours.keys() == truth.keys()
        for key, value in truth.items():
            assert_equal(ours[key], value, (sizes, key))


EXPECTED = [
    r"ValueError: label_smoothing differs between the processes of the group: 0.0 on rank 0, 0.1 on rank 1",
    r"(ValueError: hard_negatives has shape \(3, 1, 7\)|RuntimeError: .*rank 1 raised ValueError: hard_negatives has)",
    r"ValueError: hard_negatives differs between the processes of the group: shared on rank 0, by row on rank 1",
    r"ValueError: directions differs between the processes of the group: xy on rank 0, xy,xx on rank 1",
]


@pytest.mark.parametrize("number", range(len(EXPECTED)), ids=EXPECTED)
def test_every_process_is_told_what_does_not_fit(results, number):
    for _, told in results:
        assert len(told) == len(EXPECTED)
        assert re.match(EXPECTED[number], told[number]), told[number]
