"""Geometric consistency over two processes: loss and gradients of the whole batch, and only Gram matrices are sent."""

from __future__ import annotations

import contrastile as ct
import pytest
import torch
from contrastile import reference
from support import unit_rows
from torch import distributed, multiprocessing

DEPTH, SHARES = 6, (5, 14)
CASES = {
    "equal": (2, {}),
    "unequal": (2, {"cross_weight": 0.25}),
    "augmented": (4, {"in_weight": 0.5}),
    "row-weights": (4, {"row_weights": torch.linspace(0, 2, sum(SHARES), dtype=torch.float64)}),
}


def batch(count):
    return [unit_rows(sum(SHARES), DEPTH, torch.float64, seed) for seed in range(count)]


def process(rank, store, found):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    own = slice(0, SHARES[0]) if rank == 0 else slice(SHARES[0], None)
    sent, all_reduce = [], distributed.all_reduce

    def counted(tensor, **options):
        sent.append(tensor.numel())
        return all_reduce(tensor, **options)

    distributed.all_reduce = counted
    results = {}
    for name, (count, options) in CASES.items():
        leaves = [part[own].clone().requires_grad_() for part in batch(count)]
        options = {key: value[own] if key == "row_weights" else value for key, value in options.items()}
        loss = ct.geometric_consistency(*leaves, group=distributed.group.WORLD, **options)
        loss.backward()
        results[name] = loss.item(), [leaf.grad.tolist() for leaf in leaves]
    found[rank] = results, max(sent)
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch has no gloo")
    store = tmp_path_factory.mktemp("group") / "store"
    with multiprocessing.Manager() as manager:
        shared = manager.dict()
        multiprocessing.spawn(process, (str(store), shared), nprocs=2)
        return dict(shared)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_loss_of_the_whole_batch_and_its_gradients_times_two(found, case):
    count, options = CASES[case]
    leaves = [part.requires_grad_() for part in batch(count)]
    whole = reference.geometric_consistency(*leaves, **options)
    whole.backward()
    for rank, own in enumerate((slice(0, SHARES[0]), slice(SHARES[0], None))):
        results, _ = found[rank]
        loss, gradients = results[case]
        assert loss == pytest.approx(whole.item(), rel=1e-12)
        for gradient, leaf in zip(gradients, leaves, strict=True):
            torch.testing.assert_close(torch.tensor(gradient, dtype=torch.float64), 2 * leaf.grad[own])


def test_no_more_than_three_gram_matrices_are_sent_at_a_time(found):
    assert max(most for _, most in found.values()) == 3 * DEPTH**2
