"""A run of which a process is killed in the middle of a step goes on from its checkpoint as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import killed_training
import pytest
import torch
from distributed_cases import in_processes
from torch import distributed
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.slow

KILLED_AT = 4  # its checkpoint is not written, and the one before is of step 2


def torchrun(script: Path, *arguments: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """The script in two processes of this machine.

    With the launcher's store shared from restart to restart, a process that is early finds the addresses of the killed
    ones in it, and ends at once: https://github.com/pytorch/pytorch/issues/135712.
    """
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 --monitor-interval 0.1"
    return subprocess.run(
        [sys.executable, *command.split(), f"--max-restarts={restarts}", str(script), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=150,
    )


def undisturbed(folder, rank):
    """From the start, and from the checkpoint that the killed run left."""
    return killed_training.train(folder / "whole", rank), killed_training.train(folder / "resumed", rank)


@pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the loopback device has its name on Linux")
def test_a_killed_run_ends_in_the_bits_of_an_undisturbed_one(tmp_path):
    killed = tmp_path / "killed"
    killed.mkdir()
    run = torchrun(Path(killed_training.__file__), killed, KILLED_AT, restarts=1)
    assert run.returncode == 0, run.stderr
    assert "exitcode: -9" in run.stderr

    before = killed_training.checkpoint(2)
    shutil.copytree(killed / before, tmp_path / "resumed" / before)
    for rank, (whole, resumed) in enumerate(in_processes(2, partial(undisturbed, tmp_path), tmp_path)):
        ended = torch.load(killed / f"end{rank}.pt", weights_only=False)
        assert (whole.pop("resumed from"), resumed["resumed from"], ended["resumed from"]) == (0, 2, 2)
        assert_same_bits(ended, resumed)
        ended.pop("resumed from")
        assert_same_bits(ended, whole)


def assert_same_bits(found, expected):
    found, expected = (pytree.tree_flatten_with_path(tree)[0] for tree in (found, expected))
    assert [path for path, _ in found] == [path for path, _ in expected]
    for (path, ours), (_, theirs) in zip(found, expected, strict=True):
        same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
        assert same, f"{pytree.keystr(path)} is {ours}, expected {theirs}"
