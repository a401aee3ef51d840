"""SupConLoss takes the place of pytorch-metric-learning's."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from support import _load, assert_as_exact_as_dense, unit_rows

pytest.importorskip("pytorch_metric_learning")
from contrastile.integrations import pytorch_metric_learning as ours
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers

OPTIONS = {
    "plain": {},
    "dot": {"temperature": 0.5, "distance": distances.DotProductSimilarity(normalize_embeddings=False)},
    "mean": {"reducer": reducers.MeanReducer()},
    "regularised": {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.1},
}


def labels_of(rows: int, kinds: int):
    return torch.randint(kinds, (rows,), generator=torch.Generator().manual_seed(rows + kinds))


def loss_and_gradients(loss, z, labels, references=None, reference_labels=None):
    leaves = [t.clone().requires_grad_() for t in (z, references) if t is not None]
    value = loss(leaves[0], labels, ref_emb=leaves[1] if len(leaves) > 1 else None, ref_labels=reference_labels)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return [value.detach(), *gradients]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("references", [0, 1, 9])
@pytest.mark.parametrize("kinds", [1, 2, 5, 64], ids=lambda kinds: f"{kinds} labels")
def test_in_float64_both_agree_to_rounding(kinds, references, option):
    for rows in (1, 2, 3, 7, 64):
        z = 2 * unit_rows(rows, 6, torch.float64)
        others = (unit_rows(references, 6, torch.float64, 1), labels_of(references, kinds)) if references else ()
        found = [
            loss_and_gradients(module.SupConLoss(**OPTIONS[option]), z, labels_of(rows, kinds), *others)
            for module in (ours, losses)
        ]
        for our_value, their_value in zip(*found, strict=True):
            torch.testing.assert_close(our_value, their_value, rtol=1e-11, atol=1e-12)


def test_with_one_tensor_of_labels_for_both_it_is_the_references_diagonal_that_drops_out():
    z, references, labels = unit_rows(12, 6, torch.float64), unit_rows(12, 6, torch.float64, 1), labels_of(12, 4)
    found = [loss_and_gradients(module.SupConLoss(), z, labels, references, labels) for module in (ours, losses)]
    for our_value, their_value in zip(*found, strict=True):
        torch.testing.assert_close(our_value, their_value, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.02])
@pytest.mark.parametrize("rows", [33, 129])
def test_loss_and_gradients_are_as_exact_as_the_librarys(rows, temperature):
    labels = labels_of(rows, 7)
    theirs, mine = losses.SupConLoss(temperature), ours.SupConLoss(temperature)
    assert_as_exact_as_dense(
        lambda z: mine(z, labels),
        lambda z: theirs(z, labels),
        lambda z: theirs(z, labels),
        {"z": unit_rows(rows, 48)},
    )


def test_within_self_supervised_loss_it_gives_what_the_librarys_does():
    z, views = unit_rows(9, 5, torch.float64), unit_rows(9, 5, torch.float64, 1)
    for symmetric in (True, False):
        found = [losses.SelfSupervisedLoss(module.SupConLoss(), symmetric)(z, views) for module in (ours, losses)]
        torch.testing.assert_close(*found, rtol=1e-12, atol=0.0)


def test_constructor_is_the_librarys_and_what_does_not_fit_is_named():
    assert inspect.signature(ours.SupConLoss) == inspect.signature(losses.SupConLoss)
    with pytest.raises(ValueError, match="distance is LpDistance with power 1: expected CosineSimilarity"):
        ours.SupConLoss(distance=distances.LpDistance())
    z, labels = unit_rows(9, 5), labels_of(9, 3)
    with pytest.raises(ValueError, match=r"indices_tuple is given, .*: expected labels alone"):
        ours.SupConLoss()(z, labels, miners.MultiSimilarityMiner(epsilon=10.0)(z, labels))


def test_nan_in_gives_nan_out():
    z = unit_rows(9, 5)
    z[2, 3] = torch.nan
    assert bool(ours.SupConLoss(reducer=reducers.MeanReducer())(z, labels_of(9, 2)).isnan())


def test_switched_off_the_name_is_the_librarys_own_class(monkeypatch):
    monkeypatch.setenv("CONTRASTILE_INTEGRATIONS", "0")
    assert _load("switched_off", Path(ours.__file__)).SupConLoss is losses.SupConLoss
