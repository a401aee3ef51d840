"""Gradient caching under DistributedDataParallel, on 2 processes with gloo: gradients of one plain DDP backward.

Run as a script it is one of the processes:  python test_cached_ddp.py RANK FOLDER [CASE ...]
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from contrastile import cached_backward
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

WORLD = 2
ROWS, FEATURES, DIM = 14, 7, 5
EXACT = 1e-12


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (
            nn.Sequential(nn.Linear(FEATURES, 9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, DIM)) for _ in range(2)
        )
        self.double()

    def forward(self, image: Tensor | None = None, text: Tensor | None = None):
        found = [
            None if rows is None else F.normalize(tower(rows), dim=1)
            for tower, rows in ((self.image, image), (self.text, text))
        ]
        return tuple(f for f in found if f is not None)


class WithScale(Towers):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.1, dtype=torch.float64))

    def forward(self, image=None, text=None, with_scale=False):
        found = super().forward(image, text)
        return (*found, self.log_scale.exp()) if with_scale else found


class OneSide(nn.Module):
    """One tower of a wrapped model, called through the wrapper."""

    def __init__(self, wrapped: DistributedDataParallel, side: str) -> None:
        super().__init__()
        self.wrapped, self.side = wrapped, side

    def forward(self, rows: Tensor) -> Tensor:
        return self.wrapped(**{self.side: rows})[0]


class Joined(nn.Module):
    """Plain DDP's one forward: every chunk of both towers within it."""

    def __init__(self, inner: nn.Module, sizes: tuple[int, int]) -> None:
        super().__init__()
        self.inner, self.sizes = inner, sizes

    def forward(self, image, text):
        x, y = (
            torch.cat([self.inner(**{side: rows[i : i + size]})[0] for i in range(0, len(rows), size)])
            for side, rows, size in (("image", image, self.sizes[0]), ("text", text, self.sizes[1]))
        )
        return x, y, *((self.inner.log_scale.exp(),) if isinstance(self.inner, WithScale) else ())


def dense_info_nce(x, y, scale=3.0):
    return F.cross_entropy(scale * x @ y.T, torch.arange(len(x)))


def counted(wrapper: DistributedDataParallel) -> list[int]:
    """Grows by one with every exchange of a bucket."""
    exchanges: list[int] = []

    def hook(_, bucket):
        exchanges.append(bucket.index())
        work = torch.distributed.all_reduce(bucket.buffer() / WORLD, async_op=True).get_future()
        return work.then(lambda done: done.value()[0])

    wrapper.register_comm_hook(None, hook)
    return exchanges


def run(case: str, rank: int) -> None:
    torch.manual_seed(0)
    model: nn.Module = WithScale() if case == "scale_within" else Towers()
    if case == "batch_norm":
        model.image[1], model.text[1] = (nn.BatchNorm1d(9).double() for _ in range(2))
    sizes = (4, 3) if rank == 0 or case != "unequal_chunks" else (13, 2)
    if case == "shared":
        model.text = model.image
    plain = DistributedDataParallel(Joined(copy.deepcopy(model), sizes))
    steps = 3
    batches = [[torch.randn(WORLD, ROWS, FEATURES, dtype=torch.float64)[rank] for _ in range(2)] for _ in range(steps)]

    if case in ("wrapper_each", "unequal_chunks", "accumulation", "batch_norm"):
        wrappers = [DistributedDataParallel(model.image), DistributedDataParallel(model.text)]
        encoders = [nn.Sequential(wrapper, Unit()) for wrapper in wrappers]
    elif case == "shared":
        wrappers = [DistributedDataParallel(model.image)]
        encoders = [nn.Sequential(wrappers[0], Unit())] * 2
    else:  # a wrapper around both: not every parameter takes part in its last forward
        wrappers = [DistributedDataParallel(model, find_unused_parameters=True)]
        encoders = [OneSide(wrappers[0], "image"), OneSide(wrappers[0], "text")]
    exchanges = [counted(wrapper) for wrapper in wrappers]
    scale = (model.log_scale,) if case == "scale_within" else ()

    for step, (images, texts) in enumerate(batches):
        waits = case == "accumulation" and step % 2 == 0
        torch.manual_seed(10 * step + rank)
        with Waiting([plain] if waits else []):
            dense_info_nce(*plain(images, texts)).backward()
        torch.manual_seed(10 * step + rank)
        with Waiting(wrappers if waits else []):
            cached_backward(
                lambda x, y: dense_info_nce(x, y, *(s.exp() for s in scale)),
                (encoders[0], images),
                (encoders[1], texts),
                chunk_size=sizes,
            )
        expected = dict(plain.module.inner.named_parameters())
        for name, parameter in model.named_parameters():
            error = (parameter.grad - expected[name].grad).abs().max() / expected[name].grad.abs().max()
            assert error <= EXACT, f"step {step}, {name}: relative error {error:.3g}"
        if not waits:
            both = [gathered(p.grad) for p in model.parameters()]
            assert all(torch.equal(a, b) for a, b in both), "ranks differ"
        buckets = [sorted(set(found)) for found in exchanges]
        assert [sorted(found) for found in exchanges] == ([[]] * len(buckets) if waits else buckets), exchanges
        assert waits or all(buckets), "nothing was exchanged"
        for found in exchanges:
            found.clear()
        if not waits:
            plain.zero_grad()
            model.zero_grad()
    if case == "batch_norm" and rank == 0:  # the others get the statistics of process 0 at the next forward
        truth = plain.module.inner.state_dict()
        assert all(torch.equal(truth[name], value) for name, value in model.state_dict().items() if "running" in name)
        assert model.image[1].num_batches_tracked == steps * 4


class Unit(nn.Module):
    def forward(self, rows):
        return F.normalize(rows, dim=1)


class Waiting:
    """no_sync of all wrappers, as for gradient accumulation."""

    def __init__(self, wrappers):
        self.contexts = [wrapper.no_sync() for wrapper in wrappers]

    def __enter__(self):
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error):
        for context in self.contexts:
            context.__exit__(*error)


def gathered(value: Tensor) -> list[Tensor]:
    found = [torch.empty_like(value) for _ in range(WORLD)]
    torch.distributed.all_gather(found, value)
    return found


CASES = (
    "wrapper_each",
    "unequal_chunks",
    "shared",
    "wrapper_around_both",
    "scale_within",
    "accumulation",
    "batch_norm",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict[str, str]]:
    """For each process what became of each case: "" or the traceback. After a failure the rest is not run."""
    folder = tmp_path_factory.mktemp("ddp")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=env) for rank in range(WORLD)]
    try:
        for process in processes:
            process.wait(timeout=240)
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_plain_backward(case, outcomes):
    for rank, found in enumerate(outcomes):
        assert found.get(case, "not run") == "", f"process {rank}: {found.get(case)}"


def main(rank: int, folder: Path, cases: Sequence[str]) -> None:
    torch.set_num_threads(1)
    store = (folder / "store").as_uri()
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    found: dict[str, str] = {}
    for case in cases:
        try:
            run(case, rank)
            found[case] = ""
        except Exception:
            found[case] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(found))
        if found[case]:
            os._exit(1)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort an orderly exit


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] or CASES)
