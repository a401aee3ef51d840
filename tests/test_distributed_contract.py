"""Gradients of training over several processes are those of one process that has the whole batch.

DistributedDataParallel averages gradients over its processes, FSDP2 does the same to its shards, and by hand one sums
and divides. The learned scale is a parameter like any other. All in float64, with shares that are not equal.
"""

from __future__ import annotations

import copy

import contrastile as ct
import pytest
import torch
import torch.nn.functional as F
from distributed_cases import EXCHANGES, in_processes
from support import error, largest
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

WORLD = 4
SIZES = (3, 0, 6, 5)
EVEN = (4, 4, 4, 4)
EXACT = 1e-12
WIDTH = 5


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6)
        self.log_scale = nn.Parameter(torch.full((1,), 1.3))  # FSDP2 takes no parameters ()

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = (F.normalize(tower(rows), dim=1) for tower, rows in ((self.image, images), (self.text, texts)))
        return x, y, self.log_scale.exp()


def towers() -> Towers:
    torch.manual_seed(4)
    return Towers().double()


def batch(sizes=SIZES, rank=None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images, texts = torch.randn(2, sum(sizes), WIDTH, generator=generator, dtype=torch.float64)
    first, last = (0, None) if rank is None else (sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return images[first:last], texts[first:last]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
    return found


# Each trains one step on a rank's share and gives what its gradients then are.


def data_parallel(rank, exchange):
    model = DistributedDataParallel(towers())
    loss = ct.ClipLoss(rank=rank, world_size=WORLD, exchange=exchange)(*model(*batch(rank=rank)))
    loss.backward()
    return loss.detach(), gradients(model)


def data_parallel_of_entries(rank, exchange):
    model = DistributedDataParallel(towers())
    x, y, scale = model(*batch(EVEN, rank))
    loss = ct.info_nce(x, y, scale[0], reduction="none", group=distributed.group.WORLD, exchange=exchange)
    loss.mean().backward()  # equal shares: the mean over processes is that of all rows
    return loss.detach(), gradients(model)


def fully_sharded(rank, exchange):
    from torch.distributed.fsdp import fully_shard

    model = towers()
    mesh = distributed.init_device_mesh("cpu", (WORLD,))
    for part in (model.image, model.text, model):
        fully_shard(part, mesh=mesh)
    x, y, scale = model(*batch(rank=rank))
    loss = ct.info_nce(x, y, scale[0], group=mesh.get_group(), exchange=exchange)
    loss.backward()
    return loss.detach(), gradients(model)


def by_hand(rank, exchange):
    model = towers()
    x, y, scale = model(*batch(rank=rank))
    loss = ct.info_nce(x, y, scale[0], group=distributed.group.WORLD, exchange=exchange)
    (3 * loss).backward(retain_graph=True)
    loss.backward()  # formed gradients serve once: these are formed anew, in a further lap
    found = gradients(model)
    for grad in found.values():
        distributed.all_reduce(grad)
        grad /= 4 * WORLD
    return loss.detach(), found


def gradient_caching(rank, exchange):
    model = towers()
    encoders = DistributedDataParallel(model.image), DistributedDataParallel(model.text)
    parts = batch(EVEN, rank)
    loss = ct.cached_backward(
        lambda x, y: ct.info_nce(x, y, 3.0, group=distributed.group.WORLD, exchange=exchange),
        *zip(encoders, parts, strict=True),
        chunk_size=3,
    )
    model.log_scale.grad = torch.zeros_like(model.log_scale)  # it takes no part
    return loss, gradients(model)


def halves(rank, exchange):
    groups = [distributed.new_group([0, 3]), distributed.new_group([1, 2])]
    model = DistributedDataParallel(towers())
    x, y, scale = model(*batch(rank=rank))
    loss = ct.info_nce(x, y, scale[0], group=groups[0 if rank in (0, 3) else 1], exchange=exchange)
    loss.backward()
    return loss.detach(), gradients(model)


def gamma(rank, exchange):
    model = DistributedDataParallel(towers())
    images, texts = batch(rank=rank)
    losses = []
    module = gamma_module("lagged", group=distributed.group.WORLD, exchange=exchange)
    for step in range(3):
        model.zero_grad()
        x, y, scale = model(images, texts)
        loss = module(x, y, samples(step, rank), scale[0])
        loss.backward()
        losses.append(loss.detach())
    module.eval()
    losses.append(module(x, y, None, scale[0]).detach())
    return torch.stack(losses), gradients(model) | state(module)


def gamma_mixed(rank, exchange):
    module = gamma_module("mixed", learnable_scale=True, group=distributed.group.WORLD, exchange=exchange).double()
    x, y, _ = towers()(*batch(rank=rank))
    losses = []
    for step in range(2):
        loss = module(x, y, samples(step, rank))
        losses.append(loss.detach())
    loss.backward()
    distributed.all_reduce(module.log_scale.grad)
    module.log_scale.grad /= WORLD
    return torch.stack(losses), gradients(module) | state(module)


def gamma_module(mode, **options):
    torch.manual_seed(8)
    return ct.GammaContrastiveLoss(40, mode=mode, shape=2.0, **options)


def samples(step, rank=None):
    """Indices of a step, some of them twice, in different processes."""
    index = torch.randint(20, (sum(SIZES),), generator=torch.Generator().manual_seed(step))
    return index if rank is None else index[sum(SIZES[:rank]) : sum(SIZES[: rank + 1])]


def state(module):
    return {"level": module.normalizer.level.clone(), **{f"stats {k}": v for k, v in module.stats().items()}}


def nt_xent(rank, exchange):
    model = DistributedDataParallel(towers())
    x, y, scale = model(*batch(rank=rank))
    loss = ct.NTXentLoss(0.3, gather_distributed=True, exchange=exchange)(x, y) + 0 * scale.sum()
    loss.backward()
    return loss.detach(), gradients(model)


# The same in one process


def truth_of(run):
    model = towers()
    images, texts = batch(EVEN if run in (data_parallel_of_entries, gradient_caching) else SIZES)
    if run is halves:
        first = [rows[[*range(3), *range(9, 14)]] for rows in (images, texts)]
        losses = [ct.info_nce(x, y, s[0]) for x, y, s in (model(*first), model(images[3:9], texts[3:9]))]
        (sum(losses) / 2).backward()  # the average over processes is that of the groups: they are of equal size
        return torch.stack([loss.detach() for loss in losses]), gradients(model)
    if run in (gamma, gamma_mixed):
        options = {"learnable_scale": True} if run is gamma_mixed else {}
        module = gamma_module("mixed" if run is gamma_mixed else "lagged", **options)
        module = module.double() if run is gamma_mixed else module
        losses = []
        for step in range(2 if run is gamma_mixed else 3):
            model.zero_grad()
            x, y, scale = model(images, texts)
            loss = module(x, y, samples(step), *([] if run is gamma_mixed else [scale[0]]))
            losses.append(loss.detach())
        loss.backward()
        found = gradients(module if run is gamma_mixed else model) | state(module)
        module.eval()
        if run is gamma:
            losses.append(module(x, y, None, scale[0]).detach())
        return torch.stack(losses), found
    x, y, scale = model(images, texts)
    if run is nt_xent:
        loss = ct.NTXentLoss(0.3)(x, y) + 0 * scale.sum()
    elif run is gradient_caching:
        loss = ct.info_nce(model.image(images), model.text(texts), 3.0) + 0 * scale.sum()
    else:
        loss = ct.info_nce(x, y, scale[0], reduction="none" if run is data_parallel_of_entries else "mean")
    loss.mean().backward()
    return loss.detach(), gradients(model)


RUNS = {
    run.__name__: run
    for run in (
        data_parallel,
        data_parallel_of_entries,
        fully_sharded,
        by_hand,
        gradient_caching,
        halves,
        gamma,
        gamma_mixed,
        nt_xent,
    )
}


def all_runs(rank):
    return {(name, exchange): run(rank, exchange) for name, run in RUNS.items() for exchange in EXCHANGES}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return in_processes(WORLD, all_runs, tmp_path_factory.mktemp("contract"))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", RUNS)
def test_gradients_of_every_process_are_those_of_one_process_with_the_whole_batch(found, name, exchange):
    loss, expected = truth_of(RUNS[name])
    for rank in range(WORLD):
        own, ours = copy.deepcopy(found[rank][name, exchange])
        wanted = loss
        if name == "halves":
            wanted = loss[0 if rank in (0, 3) else 1]
        if name == "data_parallel_of_entries":
            wanted = loss[4 * rank : 4 * rank + 4]
        assert error(own, wanted) <= EXACT * largest(wanted)
        assert ours.keys() == expected.keys()
        for key, value in expected.items():
            both = (ours[key], value) if value.is_floating_point() else (ours[key].double(), value.double())
            allowed = (EXACT if value.dtype == torch.float64 else 1e-6) * max(1, largest(value))
            assert error(*both) <= allowed, f"rank {rank}, {key}: error {error(*both):.3g}, allowed {allowed:.3g}"
