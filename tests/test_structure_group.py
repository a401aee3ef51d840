"""Geometric consistency over two processes: loss and gradients of the whole batch, and only Gram matrices are sent."""

from __future__ import annotations

import re
from functools import partial

import contrastile as ct
import pytest
import torch
from contrastile import reference
from distributed_cases import assert_equal, in_processes
from support import unit_rows
from torch import distributed

WORLD, DEPTH, ROWS = 2, 6, 19
SHARES = [(5, 14), (0, 19)]
CASES = {
    "equal": (2, {}),
    "unequal": (2, {"cross_weight": 0.25}),
    "augmented": (4, {"in_weight": 0.5}),
    "row-weights": (4, {"row_weights": torch.linspace(0, 2, ROWS, dtype=torch.float64)}),
}


def batch(count, dtype=torch.float64):
    return [unit_rows(ROWS, DEPTH, dtype, seed) for seed in range(count)]


def process(sizes, rank):
    """Losses and gradients by case, and the largest sum that was sent."""
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    sent, all_reduce = [], distributed.all_reduce

    def counted(tensor, **options):
        sent.append(tensor.numel())
        return all_reduce(tensor, **options)

    distributed.all_reduce = counted
    found = {}
    for name, (count, options) in CASES.items():
        leaves = [part[own].clone().requires_grad_() for part in batch(count)]
        options = {key: value[own] if key == "row_weights" else value for key, value in options.items()}
        loss = ct.geometric_consistency(*leaves, group=distributed.group.WORLD, **options)
        loss.backward()
        found[name] = loss.detach(), [leaf.grad for leaf in leaves]
    return found, max(sent)


@pytest.fixture(scope="module", params=SHARES, ids=str)
def results(request, tmp_path_factory):
    return in_processes(WORLD, partial(process, request.param), tmp_path_factory.mktemp("group"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_one_perhaps_without_rows_have_the_whole_batchs_loss_and_its_gradients_times_two(results, case):
    count, options = CASES[case]
    leaves = [part.requires_grad_() for part in batch(count)]
    whole = reference.geometric_consistency(*leaves, **options)
    whole.backward()
    losses, gradients = zip(*(by_case[case] for by_case, _ in results), strict=True)
    for loss in losses:
        assert_equal(loss, whole.detach())
    for leaf, *parts in zip(leaves, *gradients, strict=True):
        assert_equal(torch.cat(parts) / WORLD, leaf.grad)


def test_no_more_than_three_gram_matrices_are_sent_at_a_time(results):
    assert max(most for _, most in results) == 3 * DEPTH**2


WEIGHTS = torch.ones(ROWS)
FAULTS = {  # what rank 1 has otherwise, and what all are told
    "features": (
        lambda v, t: {"v": v[:, :5], "t": t[:, :5]},
        r"ValueError: features differs .*: 6 on rank 0, 5 on rank 1",
    ),
    "dtype": (
        lambda v, t: {"v": v.double(), "t": t.double()},
        r"TypeError: dtype differs .*: float32 on rank 0, float64 on rank 1",
    ),
    "cross_weight": (lambda v, t: {"cross_weight": 0.25}, r"ValueError: cross_weight differs .*: 1.0 on rank 0, 0.25"),
    "in_weight": (lambda v, t: {"in_weight": 2}, r"ValueError: in_weight differs .*: 1.0 on rank 0, 2.0 on rank 1"),
    "row_weights": (
        lambda v, t: {"row_weights": WEIGHTS},
        r"ValueError: row_weights differs .*: False on rank 0, True",
    ),
    "augmented": (lambda v, t: {"v_aug": v, "t_aug": t}, r"ValueError: augmented differs .*: False on rank 0, True"),
    "refused": (lambda v, t: {"cross_weight": -1.0}, r"(ValueError|.*rank 1 raised ValueError): cross_weight is -1.0"),
    "half augmented": (lambda v, t: {"v_aug": v}, r"(ValueError|.*rank 1 raised ValueError): one of v_aug and t_aug"),
    "backend": (
        lambda v, t: {"v_aug": v, "t_aug": t, "backend": "tpu"},
        r"(ValueError|.*rank 1 raised ValueError): backend is 'tpu'",
    ),
}
FAULTS_OF_ALL = {
    "no rows": (lambda v, t: {"v": v[:0], "t": t[:0]}, r"ValueError: no process of the group has rows"),
    "all weights 0": (lambda v, t: {"row_weights": 0 * WEIGHTS}, r"ValueError: row_weights .* all 0: no rows are left"),
}


def refusals(rank):
    """What this process is told."""
    v, t = batch(2, torch.float32)
    wrong = {name: change(v, t) if rank else {} for name, (change, _) in FAULTS.items()}
    wrong |= {name: change(v, t) for name, (change, _) in FAULTS_OF_ALL.items()}
    told = {}
    for name, changed in wrong.items():
        with pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
            ct.geometric_consistency(**{"v": v, "t": t, **changed}, group=distributed.group.WORLD)
        told[name] = f"{raised.type.__name__}: {raised.value}"
    same_weight = 1 if rank else 1.0
    return told, ct.geometric_consistency(v, t, cross_weight=same_weight, group=distributed.group.WORLD)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return in_processes(WORLD, refusals, tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", FAULTS | FAULTS_OF_ALL)
def test_arguments_that_differ_between_processes_are_named_to_all_instead_of_ending_or_hanging_them(told, fault):
    _, message = (FAULTS | FAULTS_OF_ALL)[fault]
    for messages, _ in told:
        assert re.match(message, messages[fault]), messages[fault]


def test_after_refused_calls_the_group_still_works_and_1_is_1_point_0(told):
    values = [value for _, value in told]
    assert torch.equal(*values)
    assert values[0] > 0
