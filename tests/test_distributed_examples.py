"""examples/distributed: each script trains its towers on two processes; by DDP and FSDP2 as one process would."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import contrastile as ct
import pytest
import torch
from distributed_cases import in_processes, torchrun

FOLDER = Path(__file__).parents[1] / "examples" / "distributed"
WORLD = 2
SCRIPTS = ("train_ddp", "train_fsdp2")


def example(name):
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


def train_all(rank):
    return {name: example(name).train() for name in SCRIPTS}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return in_processes(WORLD, train_all, tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def of_one_process():
    toy = example("toy")
    model = toy.Towers()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for epoch in range(3):
        parts = [toy.batches(epoch, WORLD, rank) for rank in range(WORLD)]
        found = []
        for shares in zip(*parts, strict=True):
            x, y, scale = model(*(torch.cat(side) for side in zip(*shares, strict=True)))
            loss = ct.info_nce(x, y, scale[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        losses.append(float(torch.stack(found).mean()))
    return losses


@pytest.mark.parametrize("name", SCRIPTS)
def test_losses_are_those_of_one_process_with_the_batches_of_both(found, of_one_process, name):
    assert of_one_process[-1] < 0.5 * of_one_process[0]
    for of_rank in found:
        assert of_rank[name] == pytest.approx(of_one_process, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["lightning", "accelerate"])
def test_the_script_prints_losses_that_fall(library):
    pytest.importorskip(library)
    run = torchrun(FOLDER / f"train_{library}.py")
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"epoch \d: loss ([\d.]+)", run.stdout)]
    assert len(losses) == 3
    assert losses[-1] < 0.5 * losses[0]
