"""Memories of log-normalisers over processes: spread they estimate as whole ones, and checkpoints fit any world."""

from __future__ import annotations

from functools import partial

import contrastile as ct
import pytest
import torch
from contrastile.normalizer import LogNormalizerMemory
from contrastile.sharded_normalizer import ShardedLogNormalizerMemory
from distributed_cases import in_processes
from support import unit_rows
from torch import distributed

SAMPLES = 25  # of 2 or 3 processes, the last has fewer
SIZES = {1: (12,), 2: (5, 7), 3: (4, 0, 8)}
KINDS = ("whole", "sharded")
STEPS = 4
BROKEN_STEP = 2  # an embedding that is not finite


def loss_of(kind, mode="mixed", samples=SAMPLES):
    torch.manual_seed(5)
    group = distributed.group.WORLD
    memory = {
        "whole": partial(LogNormalizerMemory, samples),
        "sharded": partial(ShardedLogNormalizerMemory, samples, group),
    }[kind]
    return ct.GammaContrastiveLoss(SAMPLES, mode=mode, shape=3.0, normalizer=memory(update_rate=0.6), group=group)


def batch(step, world, rank):
    """x, y, index and scale of a rank's rows; some samples come twice, in different processes too."""
    rows = sum(SIZES[world])
    x, y = (unit_rows(rows, 5, torch.float64, 2 * step + side) for side in (0, 1))
    if step == BROKEN_STEP:
        x[rows - 2, 1] = torch.inf
    index = torch.randint(SAMPLES, (rows,), generator=torch.Generator().manual_seed(step))
    first = sum(SIZES[world][:rank])
    own = slice(first, first + SIZES[world][rank])
    return x[own], y[own], index[own], 6.0 + step


def train(loss, steps, world, rank):
    return [loss(*batch(step, world, rank)) for step in steps]


def level_of(loss):
    level = loss.normalizer.state_dict()["level"]
    return (level.full_tensor() if hasattr(level, "full_tensor") else level).clone()


def after_one_sample(loss, rank):
    drift = loss.drift.clone()
    x, y, index, scale = batch(0, 3, rank)
    loss(x, y, torch.full_like(index, 3), scale)
    return {"level after one sample": level_of(loss), "drift": torch.stack([drift, loss.drift])}


def trained(rank):
    found = {}
    for kind in KINDS:
        for mode in ("mixed", "lagged"):
            loss = loss_of(kind, mode)
            found[kind, mode] = {
                "losses": torch.stack(train(loss, range(STEPS), 3, rank)),
                "level": level_of(loss),
                "visits": loss.normalizer.visits.clone(),
                "rejected": loss.normalizer.rejected.clone(),
                "seen": loss.stats()["seen"],
                "kept": torch.tensor(loss.normalizer.level.numel()),
            }
            found[kind, mode] |= after_one_sample(loss, rank)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return in_processes(3, trained, tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("mode", ["mixed", "lagged"])
def test_a_memory_spread_over_processes_estimates_as_a_whole_one_to_the_bit(found, mode):
    for of_rank in found:
        whole, sharded = of_rank["whole", mode], of_rank["sharded", mode]
        assert int(whole["rejected"]) > 0
        assert whole["losses"][[0, 1, 3]].isfinite().all()
        for key in ("losses", "level", "visits", "rejected"):
            assert torch.equal(sharded[key].nan_to_num(), whole[key].nan_to_num()), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["mixed", "lagged"])
def test_one_sample_in_the_rows_of_all_processes_teaches_nothing(found, mode, kind):
    for of_rank in found:
        after = of_rank[kind, mode]
        assert torch.equal(after["level after one sample"], after["level"])
        assert after["drift"][0] == after["drift"][1]


def test_a_process_keeps_its_share_and_one_entry(found):
    own = (slice(0, 9), slice(9, 18), slice(18, 25))
    for of_rank, part in zip(found, own, strict=True):
        assert int(of_rank["sharded", "mixed"]["kept"]) == 2 * (9 + 1)
        level = of_rank["whole", "mixed"]["level"]
        assert of_rank["sharded", "mixed"]["seen"] == (level[0, part] > -torch.inf).float().mean()


# Checkpoints

BEFORE, AFTER = range(2), range(3, 5)


def save(folder, rank):
    import torch.distributed.checkpoint as dcp

    found = {}
    for kind in KINDS:
        loss = loss_of(kind)
        train(loss, BEFORE, 2, rank)
        dcp.save({"loss": loss.state_dict()}, checkpoint_id=folder / kind)
        level = level_of(loss)
        found[kind] = level, torch.stack(train(loss, AFTER, 2, rank))
    return found


def load(folder, world, rank):
    import torch.distributed.checkpoint as dcp

    found = {}
    for kind in KINDS:
        for saved in KINDS:
            loss = loss_of(kind)
            loss.draws.seed.zero_()
            state = loss.state_dict()
            dcp.load({"loss": state}, checkpoint_id=folder / saved)
            loss.load_state_dict(state)
            level = level_of(loss)
            found[kind, saved] = level, torch.stack(train(loss, AFTER, world, rank))
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    saved = in_processes(2, partial(save, folder), tmp_path_factory.mktemp("saving"))
    loaded = {
        world: in_processes(world, partial(load, folder, world), tmp_path_factory.mktemp("loading")) for world in (1, 3)
    }
    return saved, loaded


@pytest.mark.slow
@pytest.mark.parametrize("saved", KINDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 3])
def test_a_checkpoint_of_two_processes_gives_the_same_estimates_in_another_number(checkpoints, world, kind, saved):
    of_two, loaded = checkpoints
    level, losses = of_two[0][saved]
    assert level.isfinite().any()
    for of_rank in loaded[world]:
        found, further = of_rank[kind, saved]
        assert torch.equal(found, level)
        torch.testing.assert_close(further, losses, rtol=1e-6, atol=0.0)  # draws and memory are float32


# What does not fit


def misuse(rank):
    loss = loss_of("sharded")
    found = {}

    def tried(name, function, *arguments):
        try:
            function(*arguments)
        except Exception as error:
            found[name] = type(error), str(error)

    state = loss_of("sharded", samples=SAMPLES + 1).state_dict()
    tried("another size", loss.load_state_dict, state)
    tried("no level", loss.load_state_dict, {key: value for key, value in state.items() if "level" not in key})
    plain = loss_of("whole")
    train(plain, BEFORE, 2, rank)
    loss.load_state_dict(plain.state_dict())
    found["plain tensor"] = torch.equal(level_of(loss), level_of(plain))
    loss.double()
    found["dtype"] = loss.normalizer.level.dtype, "normalizer.level" not in dict(loss.named_buffers())
    tried("a smaller one", loss_of, "sharded", "mixed", SAMPLES - 1)
    beyond = loss_of("sharded")
    beyond.normalizer.by_sample = False  # as where indices are on a device, and not looked at
    x, y, index, scale = batch(0, 2, rank)
    tried("an index beyond", beyond, x, y, index + SAMPLES, scale)
    tried("no samples", ShardedLogNormalizerMemory, 0, distributed.group.WORLD)
    loss.group = None
    tried("one process", train, loss, BEFORE, 2, rank)
    loss.group = distributed.new_group([0, 1])
    tried("another group", train, loss, BEFORE, 2, rank)
    few = ShardedLogNormalizerMemory(1, distributed.group.WORLD)  # the second process keeps nothing
    few.load_state_dict(few.state_dict())
    found["few"] = few.count
    return found


def test_messages_name_what_does_not_fit(tmp_path):
    wanted = {
        "another size": (RuntimeError, "normalizer.level is (2, 26): expected (2, 25)"),
        "no level": (RuntimeError, 'Missing key(s) in state_dict: "normalizer.level"'),
        "a smaller one": (
            ValueError,
            "normalizer is a ShardedLogNormalizerMemory of 24 samples, but num_samples is 25",
        ),
        "an index beyond": (IndexError, "out of"),
        "no samples": (ValueError, "num_samples is 0: expected at least 1"),
        "one process": (ValueError, "the batch is of one process, the memory of a group of 2: expected a loss with"),
        "another group": (ValueError, "the batch is of another group, the memory of a group of 2"),
    }
    for rank, found in enumerate(in_processes(2, misuse, tmp_path)):
        for name, (kind, message) in wanted.items():
            assert found[name][0] is kind, found[name]
            assert message in found[name][1]
        assert found["plain tensor"]
        assert found["dtype"] == (torch.float32, True)
        assert found["few"] == 1 - rank
