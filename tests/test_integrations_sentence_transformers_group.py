"""The ranking losses with gather_across_devices: the library's own over two processes, and one process's in float64."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from distributed_cases import in_processes
from support import Shape

pytest.importorskip("sentence_transformers")
from contrastile.integrations import sentence_transformers as ours
from sentence_transformers.sentence_transformer import losses as theirs
from test_integrations_sentence_transformers import NAMES, SETTINGS, columns_of, on_embeddings

pytestmark = pytest.mark.slow  # both processes import the library

WORLD = 2
EVEN = (9, 9)  # the library gathers equal shares alone
SHARES = {NAMES[0]: (EVEN, (5, 8), (0, 7)), NAMES[1]: (EVEN, (5, 8))}  # no rows: none to cut into mini-batches
COUNTS = (2, 4)
FOUND = [
    (name, setting, count, sizes)
    for name in NAMES
    for setting in SETTINGS
    for count in COUNTS
    for sizes in SHARES[name]
]


def share_of(sizes, count, rank):
    """Columns of a process's rows; for rank None of all."""
    rows = sum(sizes)
    first, last = (0, rows) if rank is None else (sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return {name: column[first:last] for name, column in columns_of(Shape(rows, rows, 6), count, torch.float64).items()}


def loss_and_gradients(library, name, columns, **options):
    leaves = {key: column.clone().requires_grad_() for key, column in columns.items()}
    loss = on_embeddings(library, name, **options)(**leaves)
    loss.backward()
    return loss.detach(), torch.stack([leaf.grad for leaf in leaves.values()])


def evaluated(name, columns):
    with torch.no_grad():
        return on_embeddings(ours, name, gather_across_devices=True)(**columns)


FAULTS = {
    "shapes": (
        {"column1": torch.zeros(9, 4).double()},
        {},
        (ValueError, r"embeddings are \(9, 6\), \(9, 4\): expected at least queries and positives"),
        (RuntimeError, r"rank 1 raised ValueError: embeddings are \(9, 6\), \(9, 4\)"),
    ),
    "scale": ({}, {"scale": 21.0}, *[(ValueError, "scale differs .*20.0 on rank 0, 21.0 on rank 1")] * 2),
    "columns": (
        {"column2": torch.zeros(9, 6).double()},
        {},
        *[(ValueError, "columns differs .*2 on rank 0, 3 on rank 1")] * 2,
    ),
    "directions": (
        {},
        {"directions": ("query_to_doc", "doc_to_doc")},
        *[(ValueError, "directions differs .*: .*'query_to_doc',.* on rank 0, .*'doc_to_doc', .* on rank 1")] * 2,
    ),
    "hardness": (
        {},
        {"hardness_mode": "hard_negatives", "hardness_strength": 2.0},
        *[(ValueError, r"hardness differs .*own=0.0, .* on rank 0, .*own=2.0, .* on rank 1")] * 2,
    ),
}


def fault(rank, name):
    """What rank 1 does differently, and what is raised."""
    columns, options, *_ = FAULTS[name]
    own = share_of(EVEN, 2, rank)
    try:
        if rank == 1:
            on_embeddings(ours, NAMES[0], gather_across_devices=True, **options)(**own | columns)
        else:
            on_embeddings(ours, NAMES[0], gather_across_devices=True)(**own)
    except Exception as error:
        return type(error), str(error)
    return None


def everything(rank):
    gather = {"gather_across_devices": True}
    found = {}
    for name, setting, count, sizes in FOUND:
        columns = share_of(sizes, count, rank)
        options = SETTINGS[setting] | gather
        found["ours", name, setting, count, sizes] = loss_and_gradients(ours, name, columns, **options)
        if sizes == EVEN:
            found["theirs", name, setting, count] = loss_and_gradients(theirs, name, columns, **options)
    found["faults"] = {name: fault(rank, name) for name in FAULTS}
    found["evaluated"] = {name: evaluated(name, share_of(EVEN, 2, rank)) for name in NAMES}
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return in_processes(WORLD, everything, tmp_path_factory.mktemp("ranking"))


close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_both_processes_are_the_librarys_and_the_loss_is_the_mean_of_its_two(found, name, count, setting):
    library = [of_rank["theirs", name, setting, count] for of_rank in found]
    mean = sum(loss for loss, _ in library) / WORLD
    for of_rank, (_, gradients) in zip(found, library, strict=True):
        loss, own = of_rank["ours", name, setting, count, EVEN]
        close(loss, mean)
        close(own, gradients)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_averaged_gradients_are_the_librarys_in_one_process_with_the_whole_batch(found, name, count, setting):
    for sizes in SHARES[name]:
        loss, gradients = loss_and_gradients(theirs, name, share_of(sizes, count, None), **SETTINGS[setting])
        parts = [of_rank["ours", name, setting, count, sizes] for of_rank in found]
        for own, _ in parts:
            close(own, loss)
        close(torch.cat([own for _, own in parts], dim=1) / WORLD, gradients)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_without_gradients_gives_the_loss_of_training(found, name):
    for of_rank in found:
        assert torch.equal(of_rank["evaluated"][name], of_rank["ours", name, "plain", 2, EVEN][0])


@pytest.mark.parametrize("name", FAULTS)
def test_what_differs_or_is_refused_in_one_process_is_told_by_both(found, name):
    _, _, of_other, of_usual = FAULTS[name]
    for of_rank, (kind, message) in zip(found, (of_usual, of_other), strict=True):
        raised = of_rank["faults"][name]
        assert raised is not None
        assert raised[0] is kind
        assert re.search(message, raised[1]), raised[1]
