"""The new options in compiled graphs and as modules, what is refused, and prefixes of the features."""

from __future__ import annotations

import math

import contrastile as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contrastile import reference
from contrastile.validation import PairInputs, check_pairs
from contrastile.version import __version__
from support import BACKENDS_HERE, INTERPRETING, Shape, ids, scalar, towers, unit_rows
from torch.autograd import gradcheck
from torch.library import opcheck

SHAPE = Shape(9, 9, 6)
X, Y = towers(SHAPE)
OWN, SHARED = unit_rows(27, 6).reshape(9, 3, 6), unit_rows(4, 6)
IDS = torch.zeros(9, dtype=torch.int64)
OPTIONS = {"label_smoothing": 0.1, "prior": 0.05}


@pytest.fixture(params=BACKENDS_HERE)
def backend(request):
    return request.param


# Compiled graphs


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("kind", ["positives", "groups", "views", "one side", "ceiling"])
def test_opcheck(backend, kind, columns):
    x, y = (t.clone().requires_grad_() for t in towers(Shape(6, 6, 5)))
    scale = torch.tensor(4.0, requires_grad=True)
    groups = (ids(6, 3), ids(6, 3)) if kind == "groups" else None
    inputs = check_pairs(x, y, scale, None, groups, both_directions=True)
    if kind in ("views", "one side"):
        columns = False
        inputs = PairInputs(x, None, scale, torch.arange(6).roll(3) if kind == "views" else None, None, None)
    if kind == "ceiling":
        columns, inputs = False, inputs._replace(row_ceiling=torch.zeros(6))
    opcheck(torch.ops.contrastile.log_negatives.default, (*inputs, columns, backend, __version__))


COMPILED = {
    "info_nce": lambda x, y, s, h, b: ct.info_nce(x, y, s, hard_negatives=h, **OPTIONS, backend=b),
    "groups": lambda x, y, s, h, b: ct.info_nce(
        x, y, s, groups=(torch.arange(len(x)) // 2,) * 2, **OPTIONS, symmetric=False, reduction="sum", backend=b
    ),
    "nt_xent": lambda x, y, s, h, b: ct.nt_xent(torch.cat([x, y]), s, hard_negatives=SHARED, **OPTIONS, backend=b),
    "directional": lambda x, y, s, h, b: ct.directional_info_nce(x, y, s, hard_negatives=h, **OPTIONS, backend=b),
    "margin": lambda x, y, s, h, b: ct.info_nce(x, y, s, hard_negatives=h, false_negative_margin=-0.1, backend=b),
    "matryoshka": lambda x, y, s, h, b: ct.matryoshka(ct.info_nce, x, y, dims=(2, 6), scale=s, prior=0.1, backend=b),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case in ("directional", "matryoshka") else ()) for case in COMPILED],
)
def test_compiles_to_one_graph_with_the_same_gradients(case):
    backend = BACKENDS_HERE[0]  # to the compiler a backend is a name
    torch._dynamo.reset()
    leaves = [t.clone().requires_grad_() for t in (X, Y, torch.tensor(4.0), OWN)]
    call = COMPILED[case]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found, expected = compiled(*leaves, backend), call(*leaves, backend)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, allow_unused=True), torch.autograd.grad(expected, leaves, allow_unused=True)
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves, backend), expected)
    torch._dynamo.reset()


# Modules


def test_modules_are_their_functions(backend):
    options = {"label_smoothing": 0.1, "prior": 0.05, "backend": backend}
    loss = ct.InfoNCELoss(symmetric=False, **options)(X, Y, 9.0, SHARED, groups=(IDS, IDS))
    expected = ct.info_nce(X, Y, 9.0, symmetric=False, hard_negatives=SHARED, groups=(IDS, IDS), **options)
    assert torch.equal(loss, expected)
    by_row = torch.linspace(0, 0.5, 9)
    loss = ct.DirectionalInfoNCELoss(("xy", "xx"), "per_direction", **options)(X, Y, 9.0, OWN, prior=by_row)
    options["prior"] = by_row
    expected = ct.directional_info_nce(
        X, Y, 9.0, directions=("xy", "xx"), partition="per_direction", hard_negatives=OWN, **options
    )
    assert torch.equal(loss, expected)
    margin = {"false_negative_margin": -0.1, "backend": backend}
    assert torch.equal(ct.InfoNCELoss(**margin)(X, Y, 9.0), ct.info_nce(X, Y, 9.0, **margin))
    assert torch.equal(ct.DirectionalInfoNCELoss(**margin)(X, Y, 9.0), ct.directional_info_nce(X, Y, 9.0, **margin))


# Prefixes


@pytest.mark.parametrize("normalize", [True, False])
def test_matryoshka_is_the_weighted_sum_of_the_losses_of_prefixes(backend, normalize):
    dims, weights = (2, 4, 6), (0.5, 1.0, 2.0)
    leaves = [t.clone().requires_grad_() for t in (X, Y, OWN)]

    def loss(x, y, hard, **options):
        return ct.info_nce(x, y, hard_negatives=hard, **options)

    found = ct.matryoshka(loss, *leaves, dims=dims, weights=weights, normalize=normalize, scale=9.0, backend=backend)
    expected = 0
    for dim, weight in zip(dims, weights, strict=True):
        x, y, hard = (leaf[..., :dim].double() for leaf in leaves)
        if normalize:
            x, y, hard = (rows / rows.norm(dim=-1, keepdim=True) for rows in (x, y, hard))
        expected = expected + weight * reference.info_nce(x, y, 9.0, hard_negatives=hard)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    for ours, truth in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=5e-6)


def test_matryoshka_goes_around_every_loss(backend):
    log_u = torch.full((9,), -3.0)
    calls = {
        "siglip": lambda x, y: ct.siglip(x, y, 9.0, -4.0, backend=backend),
        "gamma": lambda x, y: ct.gamma_contrastive(x, y, 9.0, log_u, backend=backend).loss,
        "directional": lambda x, y: ct.directional_info_nce(x, y, 9.0, backend=backend),
        "none": lambda x, y: ct.info_nce(x, y, 9.0, reduction="none", backend=backend),
        "clip": lambda x, y: ct.ClipLoss(backend=backend)(x, y, 9.0),
    }
    for loss in calls.values():
        found = ct.matryoshka(loss, X, Y, dims=(3, 6))
        prefixes = [F.normalize(t[:, :3], dim=1) for t in (X, Y)]
        torch.testing.assert_close(found, loss(*prefixes) + loss(F.normalize(X), F.normalize(Y)))


def test_losses_with_a_memory_are_one_for_each_prefix(backend):
    losses = [ct.GammaContrastiveLoss(9, draws="mean", backend=backend) for _ in range(2)]
    whole = ct.MatryoshkaLoss(losses, (3, 6))
    whole(X, Y, index=torch.arange(9))
    assert len(whole.state_dict()) == 2 * len(losses[0].state_dict())
    levels = [loss.normalizer.level for loss in losses]
    assert not torch.equal(*levels)
    assert all(level.isfinite().all() for level in levels)


@pytest.mark.skipif(INTERPRETING, reason="the kernels take no float64")
def test_gradcheck_of_prefixes(backend):
    leaves = [t.double().requires_grad_() for t in (X, Y)]
    assert gradcheck(
        lambda x, y: ct.matryoshka(ct.info_nce, x, y, dims=(2, 5), scale=3.0, reduction="none", backend=backend),
        leaves,
        fast_mode=True,
    )


def test_rows_of_zeros_in_float16_prefixes_are_left_at_0_and_not_nan(backend):
    x, y = X.half(), Y.half()
    x[0, :2] = 0
    assert ct.matryoshka(ct.info_nce, x, y, dims=(2, 6), scale=9.0, backend=backend).isfinite()


def test_lengths_of_prefixes_may_be_numpys_and_a_direction_alone_its_name(backend):
    options = {"scale": 9.0, "backend": backend}
    lengths = ct.matryoshka(ct.info_nce, X, Y, dims=np.array([3, 6]), weights=np.float32([1, 2]), **options)
    assert torch.equal(lengths, ct.matryoshka(ct.info_nce, X, Y, dims=(3, 6), weights=(1.0, 2.0), **options))
    alone = ct.directional_info_nce(X, Y, directions="xy", **options)
    assert torch.equal(alone, ct.directional_info_nce(X, Y, directions=("xy",), **options))


# Refusals


HARD = [
    (OWN[:8], ValueError, r"hard_negatives has shape \(8, 3, 6\): expected \(9, K, 6\), each row's own, or \(L, 6\)"),
    (OWN[..., :5], ValueError, r"hard_negatives has shape \(9, 3, 5\)"),
    (SHARED[0], ValueError, r"hard_negatives has shape \(6,\)"),
    (OWN.tolist(), TypeError, r"hard_negatives is list: expected \(9, K, 6\)"),
    (OWN.long(), TypeError, r"hard_negatives is torch.int64: expected float16, bfloat16, float32 or float64"),
    (OWN.half(), TypeError, r"x is torch.float32 but hard_negatives is torch.float16: both need the same dtype"),
    (OWN.to("meta"), ValueError, r"hard_negatives is on meta, the embeddings are on cpu"),
]
REFUSALS = [
    *[({"hard_negatives": hard}, error, message) for hard, error, message in HARD],
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing is 1.5: expected a finite number from 0 to 1"),
    ({"label_smoothing": "0.1"}, TypeError, r"label_smoothing is str: expected a number"),
    ({"prior": 1.0}, ValueError, r"prior is 1.0: expected a number from 0 to below 1"),
    ({"prior": -0.1}, ValueError, r"prior is -0.1: expected a finite number of at least 0"),
    ({"prior": True}, TypeError, r"prior is bool: expected a number"),
    (
        {"prior": torch.full((9,), 1.0)},
        ValueError,
        r"prior of shape \(9,\) holds 1.0: expected numbers from 0",
    ),
    ({"prior": torch.zeros(8)}, ValueError, r"prior has shape \(8,\): expected \(9,\)"),
    (
        {"prior": torch.zeros((), dtype=torch.int64)},
        TypeError,
        r"prior is torch.int64: expected a number or a",
    ),
    ({"false_negative_margin": math.nan}, ValueError, r"false_negative_margin is nan: expected a finite number$"),
    ({"false_negative_margin": "0.1"}, TypeError, r"false_negative_margin is str: expected a number"),
    *[
        ({"false_negative_margin": 0.1, "prior": prior}, ValueError, r"prior with a false_negative_margin: both would")
        for prior in (0.1, 0.0, torch.tensor(0.0), torch.full((9,), 0.1))
    ],
    (
        {"false_negative_margin": 0.1, "label_smoothing": 0.1},
        ValueError,
        r"label_smoothing with a false_negative_margin: both would need",
    ),
    ({"prior": 0.1, "y": Y[:8]}, ValueError, r"x is \(9, 6\) but y is \(8, 6\)"),
    ({"prior": 0.1, "exchange": "ring"}, ValueError, r"exchange is 'ring' without a group"),
    ({"prior": 0.1, "reduction": "batchmean"}, ValueError, r"reduction is 'batchmean'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSALS, ids=[message for *_, message in REFUSALS])
def test_bad_input_is_refused_by_name(backend, changes, error, message):
    for function in (ct.info_nce, ct.directional_info_nce):
        with pytest.raises(error, match=message):
            function(**{"x": X, "y": Y, "scale": 9.0, "backend": backend} | changes)


def test_nt_xent_refuses_by_the_same_checks(backend):
    with pytest.raises(ValueError, match=r"hard_negatives has shape \(9, 3, 6\): expected \(18, K, 6\)"):
        ct.nt_xent(torch.cat([X, Y]), 9.0, hard_negatives=OWN, backend=backend)


def test_what_does_not_combine_names_both_arguments(backend):
    by_row = torch.full((9,), 9.0)
    joint = {"directions": ("xy", "yx"), "backend": backend}
    cases = [
        (lambda: ct.info_nce(X, Y, by_row, prior=0.1, backend=backend), r"prior with a scale of shape \(9,\)"),
        (
            lambda: ct.info_nce(X, Y, by_row, false_negative_margin=0.1, backend=backend),
            r"false_negative_margin with a scale of shape \(9,\): over columns it needs one scale",
        ),
        *[
            (
                lambda prior=prior: ct.directional_info_nce(X, Y, 9.0, prior=prior, **joint),
                r"prior with directions \('xy', 'yx'\)",
            )
            for prior in (0.1, 0.0, torch.full((9,), 0.1))
        ],
        (
            lambda: ct.directional_info_nce(X, Y, 9.0, label_smoothing=0.1, **joint),
            r"label_smoothing with directions .* and partition 'joint': the sum has the positive twice",
        ),
        (lambda: ct.directional_info_nce(X, Y, 9.0, directions=("xx",)), r"directions is \('xx',\): expected 'xy'"),
        (lambda: ct.directional_info_nce(X, Y, 9.0, directions="xx"), r"directions is \('xx',\): expected 'xy'"),
        (lambda: ct.directional_info_nce(X, Y, 9.0, directions=None), r"directions is \(None,\): expected 'xy'"),
        (lambda: ct.directional_info_nce(X, Y, 9.0, directions=("xy", "xy")), r"directions is \('xy', 'xy'\)"),
        (lambda: ct.directional_info_nce(X, Y, 9.0, partition="row"), r"partition is 'row': expected one of 'joint'"),
        (
            lambda: ct.directional_info_nce(X, Y, 9.0, positives=IDS, **joint),
            r"positives repeats a column: both directions need a permutation",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


PREFIXES = [
    ({"dims": ()}, ValueError, r"dims is \[\]: expected some, each from 1 to the 6 features"),
    ({"dims": (3, 7)}, ValueError, r"dims is \[3, 7\]: expected some, each from 1 to the 6 features"),
    ({"dims": (0,)}, ValueError, r"dims is \[0\]"),
    ({"dims": (3, 6), "weights": (1.0,)}, ValueError, r"weights holds 1 for 2 dims: expected one for each"),
    ({"dims": (3,), "weights": (-1.0,)}, ValueError, r"a weight is -1.0: expected a finite number of at least 0"),
    ({"dims": (3, 6), "loss_fn": [ct.info_nce]}, ValueError, r"loss_fn holds 1 losses for 2 dims"),
    ({"dims": (3,), "y": Y[:, :4]}, ValueError, r"embeddings are \(9, 6\), \(9, 4\): expected one number of features"),
    ({"dims": 3}, TypeError, r"dims is 3: expected a sequence of lengths"),
    ({"dims": (3.0,)}, ValueError, r"dims is \[3\.0\]: expected some"),
    (
        {"dims": (3,), "weights": (2,), "loss_fn": ct.gamma_contrastive, "log_u": torch.zeros(9)},
        TypeError,
        r"loss_fn returned GammaOutput: expected a tensor",
    ),
    ({"dims": (3,), "y": 20.0}, TypeError, r"embeddings hold a float: expected tensors; other arguments by name"),
]


@pytest.mark.parametrize(("changes", "error", "message"), PREFIXES, ids=[message for *_, message in PREFIXES])
def test_bad_prefixes_are_refused_by_name(backend, changes, error, message):
    changes = {"loss_fn": ct.info_nce, "y": Y} | changes
    with pytest.raises(error, match=message):
        ct.matryoshka(changes.pop("loss_fn"), X, changes.pop("y"), scale=scalar(9.0), **changes)
