"""What goes wrong in one process is an error in all of them, and none of them waits for ever."""

from __future__ import annotations

import time
from datetime import timedelta

import contrastile as ct
import pytest
import torch
from contrastile.distributed import plans
from distributed_cases import EXCHANGES, in_processes
from support import unit_rows
from torch import distributed

WORLD = 3
ODD_ONE = 1  # the process that does it differently
TIMEOUT = 1.5  # seconds
WORLD_GROUP = object()  # stands for the default group, which only processes have


def features(rank, rows=4, dim=5, dtype=torch.float64, offset=0):
    return unit_rows(rows, dim, dtype, seed=10 * rank + offset)


def info_nce(rank, **options):
    arguments = {"x": features(rank), "y": features(rank, offset=1), "scale": 3.0, "group": WORLD_GROUP} | options
    arguments["group"] = distributed.group.WORLD if arguments["group"] is WORLD_GROUP else arguments["group"]
    return ct.info_nce(**arguments)


def narrow(rank):
    return info_nce(rank, x=features(rank, dim=4), y=features(rank, dim=4))


def float32(rank):
    return info_nce(rank, x=features(rank, dtype=torch.float32), y=features(rank, dtype=torch.float32))


def unequal_towers(rank):
    return info_nce(rank, y=features(rank, dim=6))


def not_a_tensor(rank):
    return info_nce(rank, x=[1.0])


def gamma_function(rank):
    return ct.gamma_contrastive(features(rank), features(rank), 3.0, torch.zeros(4).double(), group=default())


def gamma_module(rank, index=None, mode="mixed"):
    module = ct.GammaContrastiveLoss(20, mode=mode, group=default())
    return module(features(rank), features(rank), torch.arange(4) if index is None else index, 3.0)


def views(rank, rows=4, out1=None, **options):
    loss = ct.NTXentLoss(0.5, gather_distributed=True, **options)
    return loss(features(rank, rows), features(rank, rows) if out1 is None else out1)


def default():
    return distributed.group.WORLD


# What all do, what the odd one does, and the error of the odd one and of the others.
DISAGREE = "differs between the processes of the group: "
FAULTS = {
    "features": (info_nce, narrow, *[(ValueError, f"features {DISAGREE}5 on rank 0 and 2, 4 on rank 1")] * 2),
    "dtype": (info_nce, float32, *[(TypeError, f"dtype {DISAGREE}float64 on rank 0 and 2, float32 on rank 1")] * 2),
    "scale": (
        info_nce,
        lambda rank: info_nce(rank, scale=3.001),
        *[(ValueError, f"scale {DISAGREE}3 on rank 0 and 2, 3.001 on rank 1")] * 2,
    ),
    "scale by row": (
        info_nce,
        lambda rank: info_nce(rank, scale=torch.full((4,), 3.0)),
        *[(ValueError, f"scale {DISAGREE}one on rank 0 and 2, by row on rank 1")] * 2,
    ),
    "function": (
        info_nce,
        gamma_function,
        *[(ValueError, f"function {DISAGREE}info_nce on rank 0 and 2, gamma_contrastive on rank 1")] * 2,
    ),
    "direction": (
        info_nce,
        lambda rank: info_nce(rank, symmetric=False),
        *[(ValueError, f"symmetric {DISAGREE}True on rank 0 and 2, False on rank 1")] * 2,
    ),
    "exchange": (
        info_nce,
        lambda rank: info_nce(rank, exchange="ring"),
        *[(ValueError, f"exchange {DISAGREE}None on rank 0 and 2, ring on rank 1")] * 2,
    ),
    "gradients": (
        info_nce,
        lambda rank: info_nce(rank, x=features(rank).requires_grad_()),
        *[(ValueError, f"gradients {DISAGREE} on rank 0 and 2, x on rank 1")] * 2,
    ),
    "refused": (
        info_nce,
        unequal_towers,
        (ValueError, "x is (4, 5) but y is (4, 6): both need the same feature dimension"),
        (RuntimeError, "rank 1 raised ValueError: x is (4, 5) but y is (4, 6)"),
    ),
    "no tensor": (
        info_nce,
        not_a_tensor,
        (TypeError, "x is list: expected a tensor"),
        (RuntimeError, "rank 1 raised TypeError: x is list"),
    ),
    "backend": (
        info_nce,
        lambda rank: info_nce(rank, backend="abacus"),
        (ValueError, "backend is 'abacus'"),
        (RuntimeError, "rank 1 raised ValueError: backend is 'abacus'"),
    ),
    "unknown exchange": (
        lambda rank: info_nce(rank, exchange="post"),
        lambda rank: info_nce(rank, exchange="post"),
        *[(ValueError, "exchange is 'post': expected None or one of 'gather', 'ring'")] * 2,
    ),
    "no rows": (
        lambda rank: info_nce(rank, x=features(0, 0), y=features(0, 0)),
        lambda rank: info_nce(rank, x=features(0, 0), y=features(0, 0)),
        *[(ValueError, "no process of the group has rows of x, or of y")] * 2,
    ),
    "odd views": (
        lambda rank: ct.nt_xent(features(rank), 2.0, group=default()),
        lambda rank: ct.nt_xent(features(rank, 3), 2.0, group=default()),
        (ValueError, "z is (3, 5): two views of each sample need an even number of rows"),
        (RuntimeError, "rank 1 raised ValueError: z is (3, 5)"),
    ),
    "unequal views": (
        views,
        lambda rank: views(rank, out1=features(rank, 3)),
        (ValueError, "out0 is (4, 5) and out1 is (3, 5)"),
        (RuntimeError, "rank 1 raised ValueError: out0 is (4, 5)"),
    ),
    "memory bank": (
        lambda rank: views(rank, memory_bank_size=(8, 5)),
        lambda rank: views(rank, memory_bank_size=(8, 5)),
        *[(NotImplementedError, "memory_bank_size (8, 5) over a group")] * 2,
    ),
    "index": (
        gamma_module,
        lambda rank: gamma_module(rank, torch.arange(4) + 18),
        (ValueError, "index runs from 18 to 21"),
        (RuntimeError, "rank 1 raised ValueError: index runs from 18 to 21"),
    ),
    "mode": (
        gamma_module,
        lambda rank: gamma_module(rank, mode="lagged"),
        *[(ValueError, f"mode {DISAGREE}mixed on rank 0 and 2, lagged on rank 1")] * 2,
    ),
    "log_multiplier": (
        lambda rank: ct.log_normalizers(features(rank), features(rank), 1.0, group=default()),
        lambda rank: ct.log_normalizers(features(rank), features(rank), 1.0, log_multiplier=0.5, group=default()),
        *[(ValueError, f"log_multiplier {DISAGREE}0.0 on rank 0 and 2, 0.5 on rank 1")] * 2,
    ),
    "world_size": (
        lambda rank: ct.ClipLoss(world_size=2)(features(rank), features(rank), 1.0),
        lambda rank: ct.ClipLoss(world_size=2)(features(rank), features(rank), 1.0),
        *[(ValueError, "world_size is 2, but torch.distributed has 3 processes")] * 2,
    ),
    "group": (
        lambda rank: info_nce(rank, group="world"),
        lambda rank: info_nce(rank, group=distributed.GroupMember.NON_GROUP_MEMBER),
        (ValueError, "this process does not belong to"),
        (TypeError, "group is str: expected a torch.distributed.ProcessGroup"),
    ),
}


def fault(rank, name):
    usual, odd, *_ = FAULTS[name]
    try:
        (odd if rank == ODD_ONE else usual)(rank)
    except Exception as error:
        return type(error), str(error)
    return None


def losses_with_nan(rank, exchange):
    """NaN in one feature of one process."""
    x, y = features(rank).requires_grad_(), features(rank, offset=1)
    if rank == ODD_ONE:
        y[2, 3] = torch.nan
    options = {"group": default(), "exchange": exchange}
    log_u = torch.zeros(4).double()
    found = [
        ct.info_nce(x, y, 3.0, **options),
        ct.info_nce(x, y, 3.0, symmetric=False, **options),
        ct.gamma_contrastive(x, y, 3.0, log_u, log_u, **options).loss,
        ct.nt_xent(y, 3.0, **options),
    ]
    sum(found[:3]).backward()
    return [bool(loss.isnan()) for loss in found], bool(x.grad.isnan().all())


def timeouts(rank):
    """A process that never comes, and one that stops between two exchanges."""
    if rank == 2:
        return None
    messages = []
    groups = [
        distributed.new_group([0, 1], timeout=timedelta(seconds=TIMEOUT), use_local_synchronization=True)
        for _ in range(2)
    ]
    begin = time.perf_counter()
    if rank == 0:
        for group in groups:
            try:
                info_nce(rank, group=group, exchange="ring")
            except RuntimeError as error:
                messages.append(str(error))
        return messages, time.perf_counter() - begin
    time.sleep(TIMEOUT + 0.5)  # too late for the first
    plans.RingPlan.lap = None
    try:
        info_nce(rank, group=groups[1], exchange="ring")
    except TypeError:
        time.sleep(TIMEOUT + 1)
    return None


def everything(rank):
    found = {name: fault(rank, name) for name in FAULTS}
    found["afterwards"] = info_nce(rank)
    found |= {exchange: losses_with_nan(rank, exchange) for exchange in EXCHANGES}
    distributed.barrier()
    return found | {"timeouts": timeouts(rank)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return in_processes(WORLD, everything, tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_process_is_told_by_all(found, name):
    *_, of_odd_one, of_others = FAULTS[name]
    for rank in range(WORLD):
        kind, message = of_odd_one if rank == ODD_ONE else of_others
        raised = found[rank][name]
        assert raised is not None, f"rank {rank} raised nothing"
        assert raised[0] is kind, f"rank {rank} raised {raised}"
        assert message in raised[1], f"rank {rank} raised {raised}"


def test_a_group_serves_on_after_faults(found):
    x, y = (torch.cat([features(rank, offset=offset) for rank in range(WORLD)]) for offset in (0, 1))
    for rank in range(WORLD):
        torch.testing.assert_close(found[rank]["afterwards"], ct.info_nce(x, y, 3.0))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_nan_in_one_process_is_nan_in_all(found, exchange):
    for rank in range(WORLD):
        losses, every_gradient = found[rank][exchange]
        assert losses == [True] * 4
        assert every_gradient


def test_a_timeout_names_rank_and_operation(found):
    messages, seconds = found[0]["timeouts"]
    assert messages[0].startswith("rank 0 of 2 in the group: gathering headers failed: ")
    wanted = "rank 0 of 2 in the group: step 1 of 3 of the statistics lap, to process 1 and from process 1, failed: "
    assert messages[1].startswith(wanted)
    assert seconds < 6 * TIMEOUT


def test_exchange_without_a_group_is_refused():
    with pytest.raises(ValueError, match="exchange is 'ring' without a group"):
        ct.info_nce(features(0), features(1), 3.0, exchange="ring")


def test_group_before_torch_distributed_is_initialised_is_refused():
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not there or not initialised"):
        ct.info_nce(features(0), features(1), 3.0, group="world")


def test_a_group_in_a_traced_function_is_refused(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match=r"a loss over a group cannot be traced by torch\.compile"):
        ct.info_nce(features(0), features(1), 3.0, group="world")


def test_what_keeps_a_process_s_embeddings_is_refused_over_a_group():
    from contrastile.prototypes import PrototypeLogNormalizer
    from contrastile.sweeping_normalizers import QueueLogNormalizer

    for normalizer in (QueueLogNormalizer(8, 5), PrototypeLogNormalizer(3, 5)):
        with pytest.raises(ValueError, match=f"{type(normalizer).__name__} over a group: it would differ"):
            ct.GammaContrastiveLoss(20, normalizer=normalizer, group="world")


def test_rows_without_an_index_are_refused_over_a_group():
    """Each process would number its rows from 0: they would count as one sample."""
    from contrastile.normalizer import BatchLogNormalizer

    loss = ct.GammaContrastiveLoss(20, normalizer=BatchLogNormalizer())
    loss.group = "world"
    with pytest.raises(ValueError, match="index is None"):
        loss._checked(features(0), features(1), None)
