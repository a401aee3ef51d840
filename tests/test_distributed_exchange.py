"""What is sent, when, with which precision, and how much memory it takes."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import contrastile as ct
import pytest
import torch
import torch.nn.functional as F
from contrastile import backends, reference
from contrastile.distributed import GATHERED_BYTES, HEADER_BYTES, plans
from distributed_cases import EXCHANGES, in_processes
from support import (
    Shape,
    accumulation,
    assert_at_most,
    dense_torch_info_nce,
    dense_torch_nt_xent,
    error,
    gradients_of,
    rounding_floor,
    rounding_of,
    scalar,
    towers,
)
from torch import distributed

# Bytes


@contextmanager
def counted(rank: int, world: int) -> Iterator[dict[str, int]]:
    """Bytes that this process sends, by operation: collectives as a ring of processes sends them."""
    sent = {"header": 0, "gather": 0, "scatter": 0, "pass": 0, "sum": 0}
    names = ("all_gather_single", "all_gather_into_tensor", "all_to_all_single", "batch_isend_irecv", "all_reduce")
    real = {name: getattr(distributed, name) for name in names if hasattr(distributed, name)}

    def all_gather(name, found, local, **options):
        kind = "header" if local.numel() == HEADER_BYTES else "gather"
        sent[kind] += (world - 1) * local.nbytes
        return real[name](found, local, **options)

    def all_to_all_single(found, local, found_rows, local_rows, **options):
        sent["scatter"] += local.nbytes - local[: local_rows[rank]].nbytes
        return real["all_to_all_single"](found, local, found_rows, local_rows, **options)

    def batch_isend_irecv(operations):
        sent["pass"] += sum(op.tensor.nbytes for op in operations if op.op is distributed.isend)
        return real["batch_isend_irecv"](operations)

    def all_reduce(tensor, **options):
        sent["sum"] += 2 * (world - 1) * tensor.nbytes // world
        return real["all_reduce"](tensor, **options)

    replaced: dict[str, Callable[..., Any]] = {
        "all_to_all_single": all_to_all_single,
        "batch_isend_irecv": batch_isend_irecv,
        "all_reduce": all_reduce,
    } | {name: partial(all_gather, name) for name in names[:2] if name in real}
    try:
        for name, function in replaced.items():
            setattr(distributed, name, function)
        yield sent
    finally:
        for name, function in real.items():
            setattr(distributed, name, function)


SIZES = (5, 0, 9, 4)
DIM = 6
LOSSES = ("info_nce", "one_direction", "gamma", "nt_xent", "info_nce_locked_y")


def formula(loss: str, exchange: str, rank: int, sizes: tuple[int, ...], dim: int, feature: int) -> dict[str, int]:
    """docs/distributed.md, for shares of any size. feature: bytes of one; sums take 4."""
    sums, world = 4, len(sizes)
    total, own, following = sum(sizes), sizes[rank], sizes[(rank + 1) % world]
    two_laps = exchange == "ring" and loss != "gamma"
    # A row or column of the gradient lap: shift and gain go with the features; what comes home is dY and, for the
    # gamma loss, a sum of weights and the statistics.
    weights = 0 if loss == "one_direction" else 2 * sums
    columns = loss in ("info_nce", "info_nce_locked_y")
    home = {"gamma": dim * sums + 3 * sums, "nt_xent": 0, "info_nce_locked_y": 0}.get(loss, dim * sums)
    statistics = 2 * sums if columns else 0
    found = {"header": (world - 1) * HEADER_BYTES, "gather": 0, "scatter": 0, "pass": 0}
    found["sum"] = 2 * (world - 1) * sums // world
    if exchange == "gather":
        found["gather"] = (world - 1) * max(sizes) * (dim * feature + weights)
        found["scatter"] = (total - own) * (statistics + home)
    else:
        laps = 2 if two_laps else 1
        found["pass"] = (total - following) * (laps * dim * feature + weights) + (total - own) * (statistics + home)
    return found


def loss_of(name, x, y, scale, **options):
    if name == "gamma":
        weights = torch.zeros(len(x))
        return ct.gamma_contrastive(x, y, scale, weights, weights, **options).loss
    if name == "nt_xent":
        return ct.nt_xent(x, scale, **options)
    return ct.info_nce(x, y, scale, symmetric=name != "one_direction", **options)


def count(rank):
    group, found = distributed.group.WORLD, {}
    rows = sum(SIZES[:rank]), sum(SIZES[: rank + 1])
    for name in LOSSES:
        for exchange in EXCHANGES:
            for dtype in (torch.float32, torch.bfloat16):
                x, y = (side[slice(*rows)].clone().requires_grad_() for side in towers(Shape(18, 18, DIM), dtype))
                if name == "nt_xent":  # an even number of views
                    x = torch.cat([x.detach(), x.detach()]).requires_grad_()
                if name == "info_nce_locked_y":
                    y = y.detach()
                with counted(rank, len(SIZES)) as sent:
                    loss_of(name, x, y, 5.0, group=group, exchange=exchange).backward()
                found[name, exchange, dtype] = dict(sent)
    return found


PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"


def test_the_pages_comparison_is_that_of_the_formulas():
    processes, rows, dim, feature, sums = 8, 4096, 512, 2, 4
    total, others = processes * rows, (processes - 1) * rows

    def sent(exchange):
        found = formula("info_nce", exchange, 0, (rows,) * processes, dim, feature)
        return found["gather"] + found["scatter"] + found["pass"]

    workspace = backends.DEFAULT_WORKSPACE_MB * 2**20
    wanted = {
        "contrastile, `gather`": (sent("gather"), total * dim * (feature + 2 * sums), workspace),
        "contrastile, `ring`": (sent("ring"), rows * dim * (2 * feature + 6 * sums), workspace),
        "memeff 0.3.1, distributed CLIP": (others * (dim * (feature + 4) + 8), total * dim * (feature + 4), None),
        "open_clip 3.3, `local_loss`, `gather_with_grad`": (
            4 * others * dim * feature,
            4 * total * dim * feature,
            2 * rows * total * feature,
        ),
        "open_clip 3.3, `gather_with_grad` alone": (
            4 * others * dim * feature,
            4 * total * dim * feature,
            total**2 * feature,
        ),
        "open_clip 3.3, neither": (2 * others * dim * feature, 2 * total * dim * feature, total**2 * feature),
    }
    for name, numbers in wanted.items():
        row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |"))
        printed = [re.findall(r"[\d.]+$", cell.strip()) for cell in row.split("|")[2:5]]
        assert printed == [[] if number is None else [f"{number / 1e6:.1f}"] for number in numbers], row


# Order


def ordered(rank):
    """What a ring does, one after the other, waits in a row as one."""
    events, real = [], distributed.batch_isend_irecv

    class Transfer:
        def __init__(self, transfer):
            self.transfer = transfer

        def wait(self):
            events.append("wait")
            self.transfer.wait()

    def batch_isend_irecv(operations):
        events.append("start")
        return [Transfer(transfer) for transfer in real(operations)]

    backend = backends.get(backends.resolve(None, "cpu"))
    sweeps = {name: getattr(backend, name) for name in ("pair_stats", "pair_grad")}

    def swept(name, *arguments, **options):
        events.append("sweep")
        return sweeps[name](*arguments, **options)

    distributed.batch_isend_irecv = batch_isend_irecv
    for name in sweeps:
        setattr(backend, name, partial(swept, name))
    try:
        x, y = towers(Shape(8, 8, DIM))
        part = slice(2 * rank, 2 * rank + 2)
        x, y = (side[part].clone().requires_grad_() for side in (x, y))
        ct.info_nce(x, y, 5.0, group=distributed.group.WORLD, exchange="ring")
    finally:
        distributed.batch_isend_irecv = real
        for name, function in sweeps.items():
            setattr(backend, name, function)
    return [event for at, event in enumerate(events) if event != events[at - 1] or event == "sweep"]


# Precision

PRECISE = Shape(130, 130, 48)
PRECISE_SIZES = (50, 0, 62, 18)


def precise_inputs(dtype):
    x, y = towers(PRECISE, dtype)
    return {"x": x, "y": y, "scale": scalar(20.0, dtype)}


def precise(rank):
    rows = slice(sum(PRECISE_SIZES[:rank]), sum(PRECISE_SIZES[: rank + 1]))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        whole = precise_inputs(dtype)
        inputs = {"x": whole["x"][rows], "y": whole["y"][rows], "scale": whole["scale"]}
        for exchange in EXCHANGES:
            options = {"group": distributed.group.WORLD, "exchange": exchange}
            found["info_nce", dtype, exchange] = gradients_of(partial(ct.info_nce, **options), inputs)
            again = gradients_of(partial(ct.info_nce, **options), inputs)
            found["same bits", dtype, exchange] = all(
                torch.equal(value, again[key]) for key, value in found["info_nce", dtype, exchange].items()
            )
            views = {"z": inputs["x"], "scale": inputs["scale"]}
            found["nt_xent", dtype, exchange] = gradients_of(partial(ct.nt_xent, **options), views)
    return found


def half_way_partners():
    """nt_xent's default positives of each share, of all rows."""
    starts = [sum(PRECISE_SIZES[:rank]) for rank in range(len(PRECISE_SIZES))]
    return torch.cat(
        [torch.arange(size).roll(-(size // 2)) + start for size, start in zip(PRECISE_SIZES, starts, strict=True)]
    )


def everything(rank):
    return {"bytes": count(rank), "order": ordered(rank), "precise": precise(rank)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return in_processes(4, everything, tmp_path_factory.mktemp("exchange"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", LOSSES)
def test_every_process_sends_the_bytes_of_the_formula(found, name, exchange, dtype):
    sizes = tuple(2 * size for size in SIZES) if name == "nt_xent" else SIZES
    for rank in range(len(SIZES)):
        sent = found[rank]["bytes"][name, exchange, dtype]
        assert sent == formula(name, exchange, rank, sizes, DIM, dtype.itemsize), f"rank {rank}"


def test_a_rings_sweeps_run_beside_its_transfers(found):
    lap = ["start", "sweep", "wait"] * 4 + ["start", "wait"]  # sums of the last block go home after its sweep
    assert [found[rank]["order"] for rank in range(4)] == [2 * lap] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", ["info_nce", "nt_xent"])
def test_gradients_are_as_exact_as_dense_torch(found, name, exchange, dtype):
    inputs, truth, dense = precise_inputs(dtype), reference.info_nce, dense_torch_info_nce
    if name == "nt_xent":
        partners = half_way_partners()
        inputs = {"z": inputs["x"], "scale": inputs["scale"]}
        truth, dense = (partial(f, positives=partners) for f in (reference.nt_xent, dense_torch_nt_xent))
    parts = [found[rank]["precise"][name, dtype, exchange] for rank in range(len(PRECISE_SIZES))]
    ours = {"loss": parts[0]["loss"], "dscale": torch.stack([part["dscale"] for part in parts]).mean(0)}
    for key in parts[0].keys() - ours.keys():
        ours[key] = torch.cat([part[key] for part in parts]) / len(parts)
    exact = gradients_of(truth, inputs, torch.float64)
    plain = gradients_of(dense, inputs)
    floor = rounding_floor(lambda moved: gradients_of(truth, moved, torch.float64), inputs, dtype, exact)
    for key, value in exact.items():
        kept = dtype if key not in ("loss", "dscale") else accumulation(dtype)
        assert_at_most(ours[key], value, 2 * error(plain[key], value) + floor[key] + rounding_of(kept, value), key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_two_runs_give_the_same_bits(found, exchange, dtype):
    assert all(found[rank]["precise"]["same bits", dtype, exchange] for rank in range(len(PRECISE_SIZES)))


# The choice of a plan


@pytest.mark.parametrize(("rows", "wanted"), [(0, plans.GatherPlan), (1, plans.RingPlan)])
def test_the_ring_is_chosen_where_gathered_features_and_sums_pass_the_bound(rows, wanted):
    class Four:
        rank, size = 0, 4

    depth, bytes_a_feature = 64, 2 + 2 * 4
    most = GATHERED_BYTES // (4 * depth * bytes_a_feature)
    assert isinstance(plans.chosen_plan(Four(), None, [most + rows] * 4, depth, 2, 4), wanted)
    assert isinstance(plans.chosen_plan(Four(), "ring", [1] * 4, depth, 2, 4), plans.RingPlan)
    assert isinstance(plans.chosen_plan(Four(), "gather", [10**9] * 4, depth, 2, 4), plans.GatherPlan)


# Memory

WORKSPACE_MIB = 8


def status_kib(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def extra_mib(rows: int, dim: int, exchange: str, rank: int) -> float:
    """Peak beyond inputs and gradients of one process, of rows in all."""

    def step(rows):
        x, y = (F.normalize(torch.randn(rows // 4, dim), dim=1).requires_grad_() for _ in range(2))
        distributed.barrier()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status_kib("VmRSS")
        ct.info_nce(x, y, 20.0, group=distributed.group.WORLD, exchange=exchange).backward()
        return (status_kib("VmHWM") - before) / 1024 - 2 * x.nbytes / 2**20

    backends.set_workspace(WORKSPACE_MIB * 2**20)
    step(400)
    return step(rows)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the high-water mark cannot be reset")
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_ring_takes_a_few_shares_of_memory_and_a_gather_a_few_batches(tmp_path, exchange):
    rows, dim = 8192, 512
    share, whole = (count * dim * 4 / 2**20 for count in (rows // 4, rows))
    mib = in_processes(4, partial(extra_mib, rows, dim, exchange), tmp_path)
    room = WORKSPACE_MIB + 8  # vectors of N, and what an allocator keeps
    if exchange == "ring":
        assert max(mib) <= 8 * share + room, f"{mib} MiB, a share has {share}"
    else:
        assert 2 * whole <= max(mib) <= 4 * whole + room, f"{mib} MiB, the batch has {whole}"
