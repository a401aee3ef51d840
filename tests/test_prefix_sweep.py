"""InfoNCE over prefixes of the features in one sweep of the C++ backend: values, gradients, and when it is taken."""

from __future__ import annotations

import contrastile as ct
import pytest
import torch
import torch.nn.functional as F
from contrastile import reference
from contrastile.backends import cpu_prefixes
from contrastile.formulas_prefixes import PrefixTerms
from contrastile.functional_prefixes import info_nce_over_prefixes
from contrastile.validation import check_pairs
from contrastile.version import __version__
from support import (
    BACKENDS_HERE,
    DTYPES,
    Shape,
    accumulation,
    assert_as_exact_as_dense,
    dense_torch_info_nce,
    permutation,
    scalar,
    small_workspace,
    towers,
)
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS_HERE, reason="the cpu backend is not available")


WIDE = Shape(9, 9, 48)
DIMS = (24, 48)  # enough features for `matryoshka` to take one sweep


def sum_over_prefixes(loss, x, y, scale, dims, weights, normalize, **options):
    """Written out, in the dtype of x but for the norms."""
    total = 0
    for dim, weight in zip(dims, weights, strict=True):
        prefixes = [rows[:, :dim] for rows in (x, y)]
        if normalize:
            prefixes = [F.normalize(rows, dim=1) for rows in prefixes]
        total = total + weight * loss(*prefixes, scale, **options)
    return total


def assert_exact(inputs, dims, weights, normalize=True, **options):
    """Against float64, with the error of a dense float32 (or float64) loss as the bar, for 16-bit embeddings too."""
    terms = {"dims": dims, "weights": weights, "normalize": normalize}
    assert_as_exact_as_dense(
        lambda **leaves: info_nce_over_prefixes(**leaves, **terms, **options),
        lambda **leaves: sum_over_prefixes(dense_torch_info_nce, **leaves, **terms, **options),
        lambda **leaves: sum_over_prefixes(reference.info_nce, **leaves, **terms, **options),
        inputs,
        dense_dtype=accumulation(inputs["x"].dtype),
    )


def rows_of(shape: Shape, dtype: torch.dtype = torch.float32, scale: float = 9.0):
    """Rows of norms from 0.5 to 2, so that what a norm does to a gradient counts."""
    x, y = towers(shape, torch.float64)
    x, y = x * torch.linspace(0.5, 2, len(x))[:, None], y * torch.linspace(2, 0.5, len(y))[:, None]
    return {"x": x.to(dtype), "y": y.to(dtype), "scale": scalar(scale, dtype)}


CASES = {  # shape, dims, weights
    "one row": (Shape(1, 1, 5), (2, 5), (1.0, 1.0)),
    "two rows": (Shape(2, 2, 3), (1, 2, 3), (1.0, 0.5, 2.0)),
    "odd": (Shape(37, 37, 101), (7, 33, 64), (1.0, 0.0, 0.3)),
    "a single prefix": (Shape(37, 37, 33), (17,), (1.0,)),
    "all of D": (Shape(130, 130, 97), (3, 16, 50, 97), (0.2, 1.0, 1.0, 3.0)),
    "several tiles": (Shape(257, 257, 70), (31, 64, 65), (1.0, 1.0, 1.0)),
    "deep": (Shape(65, 65, 1100), (100, 600, 1100), (1.0, 1.0, 1.0)),
}


@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "as-they-are"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "one-direction"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_a_dense_loss_for_each_prefix(case, dtype, symmetric, normalize):
    shape, dims, weights = CASES[case]
    assert_exact(rows_of(shape, dtype), dims, weights, normalize, symmetric=symmetric)


@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "as-they-are"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "one-direction"])
@pytest.mark.parametrize("shape", [Shape(257, 257, 70), Shape(650, 650, 33)], ids=str)
def test_windows_of_a_small_workspace(shape, symmetric, normalize):
    with small_workspace():
        assert_exact(rows_of(shape), (5, 16, 33), (1.0, 0.5, 2.0), normalize, symmetric=symmetric)


@pytest.mark.parametrize("scale", [0.01, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_from_flat_to_sharp(dtype, scale):
    assert_exact(rows_of(Shape(130, 130, 48), dtype, scale), (8, 20, 48), (1.0, 1.0, 1.0))


def test_positives_scales_by_row_more_candidates_and_a_sum():
    inputs = rows_of(Shape(130, 130, 24)) | {"scale": torch.linspace(2, 20, 130)}
    assert_exact(inputs, (6, 24), (1.0, 2.0), positives=permutation(130), reduction="sum")
    inputs = rows_of(Shape(65, 257, 24)) | {"scale": torch.linspace(2, 20, 65)}
    assert_exact(inputs, (6, 24), (1.0, 2.0), positives=permutation(257)[:65], symmetric=False)


def one_for_each(x, y, scale, **options):
    """info_nce, but not by name: every prefix then has its own sweeps."""
    return ct.info_nce(x, y, scale, backend="cpu", **options)


def gradients_of(loss, x, y, scale, **options):
    leaves = [t.clone().requires_grad_() for t in (x, y, scale)]
    found = ct.matryoshka(loss, *leaves[:2], scale=leaves[2], **options)
    return found.detach(), *torch.autograd.grad(found, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_of_zeros_and_shorter_than_the_bound_of_a_norm_are_what_f_normalize_makes_of_them(dtype):
    x, y, scale = rows_of(WIDE, dtype).values()
    x[0], x[1, :20], x[2], y[3], y[4, :20] = 0, 0, 1e-14 * x[2], 0, 1e-14 * y[4, :20]
    options = {"dims": (20, 30, 48), "weights": (1.0, 2.0, 0.5)}
    found, expected = (gradients_of(loss, x, y, scale, **options) for loss in (ct.info_nce, one_for_each))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        rows = (ours - theirs).reshape(len(ours) if ours.dim() else 1, -1).norm(dim=1)
        sizes = theirs.reshape(rows.shape[0], -1).norm(dim=1)
        assert (rows <= 100 * torch.finfo(dtype).eps * sizes.clamp(min=1)).all(), (rows, sizes)
    assert found[1][0].norm() > 1e9  # divided by the bound


def test_a_row_whose_square_is_no_float_has_a_norm():
    x, y, scale = rows_of(WIDE).values()
    expected = gradients_of(ct.info_nce, x, y, scale, dims=DIMS)
    x[0] *= 2.0**65
    found = gradients_of(ct.info_nce, x, y, scale, dims=DIMS)
    found[1][0] *= 2.0**65
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nan_in_a_row_comes_out():
    x, y, scale = rows_of(WIDE).values()
    x[2, 30] = torch.nan
    loss, dx, *_ = gradients_of(ct.info_nce, x, y, scale, dims=DIMS)
    assert loss.isnan()
    assert dx[2].isnan().any()


def test_dims_in_any_order_strided_rows_and_features_beyond_the_longest():
    x, y, scale = rows_of(Shape(40, 40, 60)).values()
    strided = x.T.contiguous().T, torch.stack([y, y], 2)[..., 0], scale
    found = gradients_of(ct.info_nce, *strided, dims=(40, 27), weights=(2.0, 1.0))
    expected = gradients_of(ct.info_nce, x, y, scale, dims=(27, 40), weights=(1.0, 2.0))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not found[1][:, 40:].any()
    assert found[1][:, :40].all()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=["x", "y", "scale", "x-and-scale"])
def test_gradients_of_some_inputs_are_those_of_all(wanted, monkeypatch):
    needs = spy(monkeypatch)
    inputs = list(rows_of(WIDE).values())
    _, *expected = gradients_of(ct.info_nce, *inputs, dims=DIMS)
    leaves = [t.clone().requires_grad_(k in wanted) for k, t in enumerate(inputs)]
    loss = ct.matryoshka(ct.info_nce, *leaves[:2], dims=DIMS, scale=leaves[2])
    loss.backward()
    assert (needs[-1].dx, needs[-1].dy, needs[-1].moment) == tuple(k in wanted for k in range(3))
    for k, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (k not in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, expected[k])


def test_a_second_backward_forms_the_gradients_anew_and_an_upstream_gradient_multiplies():
    leaves = [t.requires_grad_() for t in rows_of(WIDE).values()]
    loss = ct.matryoshka(ct.info_nce, *leaves[:2], dims=DIMS, scale=leaves[2])
    once, again = (torch.autograd.grad(3 * loss, leaves, retain_graph=True) for _ in range(2))
    for first, second, leaf in zip(once, again, leaves, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, 3 * torch.autograd.grad(loss, leaf, retain_graph=True)[0])


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradcheck(symmetric):
    leaves = [t.requires_grad_() for t in rows_of(Shape(9, 9, 6), torch.float64, scale=3.0).values()]

    def loss(x, y, scale):
        return info_nce_over_prefixes(x, y, scale, dims=(2, 6), weights=(1.0, 0.5), normalize=True, symmetric=symmetric)

    assert gradcheck(loss, leaves)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*contrastile\.reference"):
        gradgradcheck(loss, leaves)


def test_a_tangent_is_refused_and_not_dropped():
    x, y, scale = rows_of(WIDE).values()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        ct.matryoshka(ct.info_nce, forward_ad.make_dual(x, torch.ones_like(x)), y, dims=DIMS, scale=scale)


@pytest.mark.parametrize("formed", [True, False], ids=["formed", "nothing-formed"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(requires_grad, formed):
    inputs = check_pairs(*rows_of(Shape(6, 6, 5)).values(), None, None, both_directions=True)
    for leaf in inputs[:3]:
        leaf.requires_grad_(requires_grad)
    terms = PrefixTerms([2, 5], [1.0, 0.5], True, True, "mean")
    form = [formed and requires_grad] * 3
    opcheck(torch.ops.contrastile.prefixes.default, (*inputs, *terms, *form, __version__))


def test_compiles_to_one_graph_with_the_same_gradients(monkeypatch):
    torch._dynamo.reset()
    needs = spy(monkeypatch)
    leaves = [t.requires_grad_() for t in rows_of(WIDE).values()]

    def call(x, y, scale):
        return ct.matryoshka(ct.info_nce, x, y, dims=DIMS, scale=scale)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found, expected = compiled(*leaves), call(*leaves)
    assert torch.equal(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(needs) == 2  # a sweep for each, and none in their backwards
    torch._dynamo.reset()


# When it is taken


def spy(monkeypatch):
    """A list that grows by what every sweep over prefixes is asked."""
    asked, sweep = [], cpu_prefixes.prefix_softmax

    def recorded(*arguments, needs, **options):
        asked.append(needs)
        return sweep(*arguments, needs=needs, **options)

    monkeypatch.setattr(cpu_prefixes, "prefix_softmax", recorded)
    return asked


TAKEN = {
    "by default": {},
    "on the cpu backend by name": {"backend": "cpu"},
    "with defaults by name": {"groups": None, "label_smoothing": 0.0, "prior": None, "group": None},
    "a loss for each, one direction": {"loss_fn": [ct.info_nce] * 2, "symmetric": False},
    "positives": {"positives": permutation(9)},
    "by row": {"scale": torch.linspace(1, 9, 9)},
    "a sum": {"reduction": "sum", "normalize": False},
}
NOT_TAKEN = {
    "another backend": {"backend": "eager"},
    "another loss": {"loss_fn": one_for_each},
    "another loss for one": {"loss_fn": [ct.info_nce, one_for_each]},
    "a loss for each row": {"reduction": "none"},
    "groups": {"groups": (torch.arange(9), torch.arange(9))},
    "label_smoothing": {"label_smoothing": 0.1},
    "prior": {"prior": 0.1},
    "one prefix": {"dims": (24,)},
    "few features spared": {"dims": (23, 48)},
    "a small share of the longest": {"dims": (11, 48)},
    "a prefix twice": {"dims": (24, 24, 48)},
}


@pytest.mark.parametrize("case", [*TAKEN, *NOT_TAKEN])
def test_which_calls_take_one_sweep_and_that_both_ways_agree(case, monkeypatch):
    asked = spy(monkeypatch)
    options = {"loss_fn": ct.info_nce, "dims": DIMS} | (TAKEN | NOT_TAKEN)[case]
    x, y, scale = rows_of(WIDE).values()
    scale, loss = options.pop("scale", scale), options.pop("loss_fn")
    found = gradients_of(loss, x, y, scale, **options) if case != "a loss for each row" else None
    if found is None:
        ct.matryoshka(loss, x, y, scale=scale, **options)
    assert len(asked) == (case in TAKEN)
    if case in TAKEN:
        options.pop("backend", None)
        for ours, theirs in zip(found, gradients_of(one_for_each, x, y, scale, **options), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_backend_in_force_decides(monkeypatch):
    asked = spy(monkeypatch)
    x, y, scale = rows_of(WIDE).values()
    with ct.use_backend("eager"):
        ct.matryoshka(ct.info_nce, x, y, dims=DIMS, scale=scale)
    monkeypatch.setenv("CONTRASTILE_BACKEND", "eager")
    ct.matryoshka(ct.info_nce, x, y, dims=DIMS, scale=scale)
    assert not asked
    with ct.use_backend("cpu"):
        ct.matryoshka(ct.info_nce, x, y, dims=DIMS, scale=scale)
    assert len(asked) == 1


def test_an_unknown_option_is_still_refused():
    x, y, scale = rows_of(WIDE).values()
    with pytest.raises(TypeError, match="temperature"):
        ct.matryoshka(ct.info_nce, x, y, dims=DIMS, scale=scale, temperature=None)


def test_the_module_around_infonceloss_takes_it_unless_it_is_told_more(monkeypatch):
    asked = spy(monkeypatch)
    x, y, scale = rows_of(WIDE).values()
    module = ct.MatryoshkaLoss(ct.InfoNCELoss(symmetric=False), DIMS)
    expected = ct.matryoshka(one_for_each, x, y, dims=DIMS, scale=scale, symmetric=False)
    torch.testing.assert_close(module(x, y, scale=scale), expected)
    assert len(asked) == 1
    ct.MatryoshkaLoss(ct.InfoNCELoss(prior=0.1), DIMS)(x, y, scale=scale)
    module(x, y, scale=scale, prior=torch.full((9,), 0.1))
    heard = []
    module.losses.register_forward_hook(lambda *_: heard.append(1))
    module(x, y, scale=scale)
    assert len(asked) == 1
    assert len(heard) == 2
