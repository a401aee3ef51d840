"""A run of which a process is killed in the middle of a step goes on from its checkpoint as if nothing had happened."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import killed_training
import pytest
import torch
from distributed_cases import in_processes, torchrun
from torch.utils import _pytree as pytree

pytestmark = pytest.mark.slow

KILLED_AT = 4  # its checkpoint is not written, and the one before is of step 2


def undisturbed(folder, rank):
    """From the start, and from the checkpoint that the killed run left."""
    return killed_training.train(folder / "whole", rank), killed_training.train(folder / "resumed", rank)


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
