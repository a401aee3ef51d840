"""Problems whose rows are spread over processes, and the processes to run them in, for test_distributed*.py.

A problem is a dictionary of global tensors. The same function computes a loss of all of it in one process, or of one
process's share over a group. Results go to files: `in_processes(world, function)` gives function(rank) of every rank.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import contrastile as ct
import pytest
import torch
from support import error, ids, largest, unit_rows
from torch import Tensor, distributed

DIM = 7
EXACT = 1e-12
EXCHANGES = ("gather", "ring")
# Rows of each process: unequal shares, a process without any, and a number that the world's size does not divide.
SHARES = {1: [(13,)], 2: [(5, 8), (6, 6)], 3: [(4, 0, 9), (5, 5, 5)], 4: [(3, 6, 1, 4), (0, 7, 2, 0)]}
MORE_COLUMNS = 2  # in each process, where there are more columns than rows


class Share(NamedTuple):
    """What a process holds: slices of the rows and the columns, and the column where they begin."""

    rows: slice
    cols: slice

    @classmethod
    def of(cls, sizes: tuple[int, ...], more: int, rank: int | None) -> Share:
        """Of one process; all of it for rank None."""
        if rank is None:
            return cls(slice(0, sum(sizes)), slice(0, sum(sizes) + more * len(sizes)))
        first, size = sum(sizes[:rank]), sizes[rank]
        return cls(slice(first, first + size), slice(first + more * rank, first + size + more * (rank + 1)))


class Case(NamedTuple):
    """A loss over a share. Its gradients are those of the losses' sum, against a ramp where it has entries."""

    evaluate: Callable[[dict[str, Tensor], Share, dict[str, Any]], Any]  # loss, or a tuple with it first
    leaves: tuple[str, ...] = ("x", "y", "scale")
    more_columns: int = 0
    by_row: bool = False  # the loss, and so its gradient, is not multiplied by the number of processes


def problem(sizes: tuple[int, ...], more: int, dtype: torch.dtype) -> dict[str, Tensor]:
    rows = sum(sizes)
    cols = rows + more * len(sizes)
    generator = torch.Generator().manual_seed(rows)

    def vector(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64).to(dtype)

    # A row's positive is anywhere among its own process's columns.
    own = [torch.randperm(size + more, generator=generator)[:size] for size in sizes]
    views = [torch.randperm(size, generator=generator) for size in sizes]
    partners = []
    for order in views:  # views are paired up in a random order
        partner = torch.empty_like(order)
        half = len(order) // 2  # of an odd share no case makes views
        partner[order[:half]], partner[order[half : 2 * half]] = order[half : 2 * half], order[:half]
        partners.append(partner)
    return {
        "x": unit_rows(rows, DIM, dtype, 1),
        "y": unit_rows(cols, DIM, dtype, 2),
        "scale": torch.tensor(9.0, dtype=dtype),
        "bias": torch.tensor(-4.0, dtype=dtype),
        "row_scale": 5 + 10 * vector(rows),
        "log_u": -3 * vector(rows),
        "log_v": -3 * vector(cols),
        "row_draws": 0.5 + vector(rows),
        "col_draws": 0.5 + vector(cols),
        "row_ids": ids(rows, max(1, rows // 3)),
        "col_ids": ids(cols, max(1, rows // 3)),
        "own_positives": torch.cat(own),
        "partners": torch.cat(partners),
        "starts": torch.cat([torch.full((s,), sum(sizes[:r]) + more * r) for r, s in enumerate(sizes)]),
    }


def _positives(p: dict[str, Tensor], share: Share, name: str = "own_positives") -> Tensor:
    """Within the share's own columns."""
    return (p[name] + p["starts"])[share.rows] - share.cols.start


def _info_nce(p, share, options, *, scale="scale", given=(), **fixed):
    groups = (p["row_ids"][share.rows], p["col_ids"][share.cols]) if "groups" in given else None
    positives = _positives(p, share)
    return ct.info_nce(p["x"], p["y"], p[scale], positives=positives, groups=groups, **fixed, **options)


def _plain(p, share, options):
    return ct.info_nce(p["x"], p["y"], p["scale"], **options)


def _gamma(p, share, options, *, both=True, given=(), **fixed):
    extra = {name: p[name][getattr(share, part)] for name, part in DRAWS.items() if name in given}
    groups = (p["row_ids"][share.rows], p["col_ids"][share.cols]) if "groups" in given else None
    log_v = p["log_v"][share.cols] if both else None
    positives = _positives(p, share)
    log_u = p["log_u"][share.rows]
    return ct.gamma_contrastive(
        p["x"], p["y"], p["scale"], log_u, log_v, positives=positives, groups=groups, **extra, **fixed, **options
    )


def _nt_xent(p, share, options, *, scale="scale", **fixed):
    return ct.nt_xent(p["x"], p[scale], positives=_positives(p, share, "partners"), **fixed, **options)


def _siglip(p, share, options, *, scale="scale", given=(), **fixed):
    groups = (p["row_ids"][share.rows], p["col_ids"][share.cols]) if "groups" in given else None
    positives = _positives(p, share)
    return ct.siglip(p["x"], p["y"], p[scale], p["bias"], positives=positives, groups=groups, **fixed, **options)


def _normalizers(p, share, options, *, with_positives=True, **fixed):
    positives = _positives(p, share) if with_positives else None
    row_lse, col_lse = ct.log_normalizers(p["x"], p["y"], p["scale"], positives=positives, **fixed, **options)
    return (row_lse, col_lse) if col_lse is not None else row_lse


DRAWS = {"row_draws": "rows", "col_draws": "cols"}
BY_ROW = ("x", "y", "row_scale")
CASES = {
    "info_nce": Case(partial(_info_nce)),
    "info_nce_sum_groups": Case(partial(_info_nce, reduction="sum", given=("groups",))),
    "info_nce_none": Case(partial(_info_nce, reduction="none"), by_row=True),
    "info_nce_scale_by_row": Case(partial(_info_nce, scale="row_scale"), BY_ROW),
    "info_nce_locked_y": Case(partial(_info_nce), ("x", "scale")),
    "info_nce_locked_x": Case(partial(_info_nce, symmetric=False), ("y",), 2),
    "one_direction": Case(partial(_info_nce, symmetric=False), more_columns=2),
    "one_direction_none_groups": Case(
        partial(_info_nce, symmetric=False, reduction="none", given=("groups",), scale="row_scale"), BY_ROW, 2, True
    ),
    "gamma_rows": Case(partial(_gamma, both=False, log_multiplier=0.4, given=("row_draws", "groups")), more_columns=2),
    "gamma": Case(partial(_gamma, log_multiplier=1.1, given=("row_draws", "col_draws"))),
    "gamma_uncapped_sum": Case(partial(_gamma, cap=False, reduction="sum", given=("groups",))),
    "gamma_none": Case(partial(_gamma, reduction="none"), by_row=True),
    "siglip": Case(partial(_siglip), ("x", "y", "scale", "bias"), 2),
    "siglip_none_groups": Case(
        partial(_siglip, reduction="none", given=("groups",), scale="row_scale"), (*BY_ROW, "bias"), 2, True
    ),
    "siglip_bias_alone": Case(partial(_siglip, reduction="sum"), ("bias",)),
    "log_normalizers": Case(partial(_normalizers, log_multiplier=-0.3), by_row=True),
    "log_normalizers_rows": Case(
        partial(_normalizers, with_positives=False, columns=False), more_columns=2, by_row=True
    ),
}
VIEWS = {  # an even number of rows in every share
    "nt_xent": Case(partial(_nt_xent), ("x", "scale")),
    "nt_xent_sum": Case(partial(_nt_xent, reduction="sum"), ("x",)),
    "nt_xent_none": Case(partial(_nt_xent, reduction="none"), ("x", "scale"), by_row=True),
    "nt_xent_scale_by_row": Case(partial(_nt_xent, scale="row_scale"), ("x", "row_scale")),
}
ALL_CASES = CASES | VIEWS


def sizes_for(name: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size + size % 2 for size in sizes) if name in VIEWS else sizes


def evaluate(
    name: str, sizes: tuple[int, ...], rank: int | None, dtype: torch.dtype = torch.float64, **options: Any
) -> dict[str, Tensor]:
    """Loss, further results and gradients of a rank's share, of all for None: "loss", "found1", "found2", "dx", ..."""
    case, sizes = ALL_CASES[name], sizes_for(name, sizes)
    share = Share.of(sizes, case.more_columns, rank)
    p = problem(sizes, case.more_columns, dtype)
    parts = {"x": share.rows, "y": share.cols, "row_scale": share.rows}
    for leaf, part in parts.items():
        p[leaf] = p[leaf][part]
    for leaf in case.leaves:
        p[leaf] = p[leaf].clone().requires_grad_()
    found = case.evaluate(p, share, options)
    found = found if isinstance(found, tuple) else (found,)
    loss, *more = [part for part in found if part is not None]
    differentiable = [part for part in (loss, *more) if part.requires_grad]
    for part in differentiable:
        place = share.rows if part is loss else share.cols
        total = sum(sizes) + case.more_columns * len(sizes)
        ramp = torch.linspace(0.5, 1.5, total, dtype=part.dtype)[place] if part.dim() else None
        part.backward(ramp, retain_graph=True)
    results = {"loss": loss, **{f"found{number}": part for number, part in enumerate(more)}}
    results = {key: value.detach() for key, value in results.items()}
    return results | {f"d{leaf}": p[leaf].grad for leaf in case.leaves}


def joined(name: str, found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What all processes have, as one process would have it, by the contract of gradients."""
    case, size = ALL_CASES[name], len(found)
    factor = 1 if case.by_row else size
    whole = {}
    for key in found[0]:
        parts = [part[key] for part in found]
        if key == "loss" and not case.by_row:
            assert all(torch.equal(part, parts[0]) for part in parts), "processes have different losses"
            whole[key] = parts[0]
        elif key in ("dscale", "dbias"):
            whole[key] = torch.stack(parts).sum(0) / factor
        else:
            whole[key] = torch.cat(parts) / (factor if key.startswith("d") else 1)
    return whole


def assert_equal(found: Tensor, expected: Tensor, what: object = "") -> None:
    """To rounding of float64."""
    assert found.shape == expected.shape, f"{what}: {found.shape}, expected {expected.shape}"
    wrong, allowed = error(found, expected), EXACT * max(1, largest(expected))
    assert wrong <= allowed, f"{what}: error {wrong:.3g}, allowed {allowed:.3g}"


# Processes


def in_processes(world: int, function: Callable[[int], Any], folder: Path, timeout: float = 120) -> list[Any]:
    """function(rank) in each of `world` processes, which form torch.distributed's default group over gloo.

    function and what it returns can be pickled, tensors among the latter. A server process that has imported
    everything is forked once for each.
    """
    _need_gloo()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["contrastile", "distributed_cases", "torch.distributed.fsdp"])
    processes = [
        context.Process(target=_process, args=(function, rank, world, str(folder)), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
    stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in stuck:
        processes[rank].kill()
    assert not stuck, f"processes {stuck} did not end within {timeout} s"
    silent = [rank for rank in range(world) if not (folder / f"{rank}.pt").exists()]
    assert not silent, f"processes {silent} ended without a result"
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    for rank, (_, failure) in enumerate(results):
        assert failure is None, f"process {rank}:\n{failure}"
    return [value for value, _ in results]


def _process(function: Callable[[int], Any], rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    value, error = None, None
    try:
        store = (Path(folder) / "store").as_uri()
        distributed.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        value = function(rank)
    except BaseException:
        error = traceback.format_exc()
    torch.save((value, error), Path(folder) / f"{rank}.pt")
    if error is None:
        distributed.barrier()
    os._exit(0)  # gloo's threads may abort an orderly exit


def torchrun(script: Path, *arguments: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """The script in two processes of this machine.

    With the launcher's store shared from restart to restart, a process that is early finds the addresses of the killed
    ones in it, and ends at once: https://github.com/pytorch/pytorch/issues/135712.
    """
    _need_gloo()
    if not sys.platform.startswith("linux"):
        pytest.skip("the loopback device has its name on Linux")
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 --monitor-interval 0.1"
    return subprocess.run(
        [sys.executable, *command.split(), f"--max-restarts={restarts}", str(script), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=150,
    )


def _need_gloo() -> None:
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch has no gloo")
