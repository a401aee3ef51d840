"""Public losses of every backend against float64 truth; the bar is twice the error of the dense loss in float32.

For 16-bit inputs the dense loss is given the same values widened to float32: all that may be lost on top is the
rounding of the gradients to 16 bits.
"""

from __future__ import annotations

import math

import contrastile as ct
import pytest
import torch
import torch.nn.functional as F
from contrastile import reference
from support import (
    BACKENDS_HERE,
    DTYPES,
    ODD_SHAPES,
    SQUARE_SHAPES,
    Shape,
    accumulation,
    assert_as_exact_as_dense,
    assert_at_most,
    dense_torch_info_nce,
    dense_torch_nt_xent,
    gradients_of,
    ids,
    lightly_nt_xent_loss,
    open_clip_loss,
    permutation,
    scalar,
    small_workspace,
    towers,
    unit_rows,
)

pytestmark = pytest.mark.parametrize("backend", BACKENDS_HERE)


def inputs_of(shape: Shape, dtype: torch.dtype = torch.float32, scale: float = 20.0):
    x, y = towers(shape, dtype)
    return {"x": x, "y": y, "scale": scalar(scale, dtype)}


def assert_info_nce(inputs, backend: str, **options) -> None:
    assert_as_exact_as_dense(
        lambda x, y, scale: ct.info_nce(x, y, scale, backend=backend, **options),
        lambda x, y, scale: dense_torch_info_nce(x, y, scale, **options),
        lambda x, y, scale: reference.info_nce(x, y, scale, **options),
        inputs,
        dense_dtype=accumulation(inputs["x"].dtype),
    )


def assert_like_reference(ours, oracle, inputs) -> None:
    dtype = accumulation(inputs["x"].dtype)
    assert_as_exact_as_dense(ours, oracle, oracle, inputs, dense_dtype=dtype)


def masks_of(name: str, shape: Shape):
    positives = permutation(shape.cols)[: shape.rows]
    groups = (ids(shape.rows, 9), ids(shape.cols, 9))
    return {
        "plain": {},
        "positives": {"positives": positives},
        "groups": {"groups": groups},
        "both": {"positives": positives, "groups": groups},
    }[name]


MASKS = ["plain", "positives", "groups", "both"]


# InfoNCE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SQUARE_SHAPES, ids=str)
def test_symmetric_info_nce_is_as_exact_as_dense_torch(backend, shape, dtype):
    assert_info_nce(inputs_of(shape, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_one_direction_is_as_exact_as_dense_torch(backend, shape, dtype):
    assert_info_nce(inputs_of(shape, dtype), backend, symmetric=False)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_masks_reductions_and_row_scales_are_as_exact_as_dense_torch(backend, symmetric, mask, reduction):
    shape = Shape(65, 65, 48) if symmetric else Shape(65, 100, 48)
    inputs = inputs_of(shape) | {"scale": torch.linspace(0.5, 40, 65)}
    assert_info_nce(inputs, backend, symmetric=symmetric, reduction=reduction, **masks_of(mask, shape))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_small_workspace_changes_nothing_but_rounding(backend, symmetric):
    with small_workspace():
        assert_info_nce(inputs_of(Shape(257, 257, 48)), backend, symmetric=symmetric)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0, 1000.0])
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0], ids=lambda size: f"norm-{size}")
def test_any_scale_and_norm_is_as_exact_as_dense_torch(backend, scale, size):
    inputs = inputs_of(Shape(65, 65, 48), scale=scale)
    inputs |= {"x": size * inputs["x"], "y": size * inputs["y"]}
    assert_info_nce(inputs, backend)
    assert_info_nce(inputs, backend, symmetric=False)


@pytest.mark.parametrize("regime", ["all-negative", "dominating", "duplicates", "random-targets"])
def test_regimes_are_as_exact_as_dense_torch(backend, regime):
    inputs = inputs_of(Shape(65, 65, 20))
    x, y = inputs["x"], inputs["y"]
    if regime == "all-negative":
        direction = unit_rows(1, 20)
        inputs = {"x": direction + 1e-3 * x, "y": -direction + 1e-3 * y, "scale": scalar(256.0)}
    if regime == "dominating":
        y[40] = 30 * x[3]
    if regime == "duplicates":
        x[1:40] = x[0]
        y[10:60] = y[5]
    if regime == "random-targets":
        inputs["y"] = unit_rows(65, 20, seed=9)
    assert_info_nce(inputs, backend)
    assert_info_nce(inputs, backend, symmetric=False)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_confident_model_keeps_the_digits_of_a_loss_of_1e_6(backend, symmetric):
    """Dense float32 sees log-sum-exp minus s_pos, a difference of equal numbers, and p - 1 likewise."""
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q.float()
    inputs = {"x": basis, "y": basis.clone(), "scale": scalar(18.0)}
    options = {"symmetric": symmetric}
    truth = gradients_of(lambda **i: reference.info_nce(**i, **options), inputs, torch.float64)
    ours = gradients_of(lambda **i: ct.info_nce(**i, backend=backend, **options), inputs)
    assert 5e-7 < truth["loss"] < 2e-6
    for name, value in ours.items():
        assert_at_most(value, truth[name], 2e-5 * truth[name].abs().max().item(), name)


def test_one_pair_alone_has_no_loss_and_no_gradient(backend):
    for symmetric in (True, False):
        results = gradients_of(
            lambda symmetric=symmetric, **i: ct.info_nce(**i, symmetric=symmetric, backend=backend),
            inputs_of(Shape(1, 1, 48)),
        )
        assert all((value == 0).all() for value in results.values())


# Layouts, subsets, NaN


@pytest.mark.parametrize("layout", ["transposed", "every-second-feature", "every-third-row", "expanded"])
def test_layout_of_the_inputs_does_not_matter(backend, layout):
    def laid_out(t: torch.Tensor) -> torch.Tensor:
        if layout == "transposed":
            return t.T.contiguous().T
        if layout == "every-second-feature":
            return t.repeat_interleave(2, dim=1)[:, ::2]
        if layout == "every-third-row":
            return t.repeat_interleave(3, dim=0)[::3]
        return t[:1].expand(t.shape)

    def truth(x, y, scale):
        return reference.info_nce(laid_out(x), y, scale)

    def ours(x, y, scale):
        return ct.info_nce(laid_out(x), y if layout == "expanded" else laid_out(y), scale, backend=backend)

    assert_like_reference(ours, truth, inputs_of(Shape(65, 65, 48)))
    assert_like_reference(ours, truth, inputs_of(Shape(65, 65, 48), torch.bfloat16))


@pytest.mark.parametrize("wanted", [("x",), ("y",), ("scale",), ("x", "y"), ("x", "scale"), ("y", "scale")], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_gradient_does_not_depend_on_which_others_are_asked_for(backend, symmetric, wanted):
    inputs = inputs_of(Shape(65, 65, 48))
    every = gradients_of(lambda **i: ct.info_nce(**i, symmetric=symmetric, backend=backend), inputs)
    fixed = {name: value for name, value in inputs.items() if name not in wanted}
    some = gradients_of(
        lambda **i: ct.info_nce(**i, **fixed, symmetric=symmetric, backend=backend), {n: inputs[n] for n in wanted}
    )
    for name, value in some.items():
        assert_at_most(value, every[name], 2e-6 * every[name].abs().max().item(), name)


@pytest.mark.parametrize("where", ["x", "y"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nan_reaches_exactly_what_it_affects(backend, symmetric, where):
    inputs = inputs_of(Shape(65, 65, 48))
    inputs[where][17, 5] = math.nan
    options = {"symmetric": symmetric, "reduction": "none"}
    truth = gradients_of(lambda **i: reference.info_nce(**i, **options), inputs, torch.float64)
    ours = gradients_of(lambda **i: ct.info_nce(**i, backend=backend, **options), inputs)
    for name, value in ours.items():
        assert value.isnan().equal(truth[name].isnan()), name
    assert ct.info_nce(**inputs, symmetric=symmetric, backend=backend).isnan()


@pytest.mark.parametrize("cap", [True, False])
def test_nan_is_never_capped_away(backend, cap):
    inputs = inputs_of(Shape(65, 65, 48))
    inputs["x"][17, 5] = math.nan
    weights = {"log_u": torch.zeros(65), "log_v": torch.zeros(65)}
    output = ct.gamma_contrastive(**inputs, **weights, cap=cap, reduction="none", backend=backend)
    assert output.loss.isnan().all()  # every column meets row 17
    assert output.row_lse.isnan().equal(torch.arange(65) == 17)
    assert output.col_lse.isnan().all()
    assert ct.nt_xent(inputs["x"][:64], 5.0, reduction="none", backend=backend).isnan().all()


def test_an_infinite_input_never_gives_a_finite_loss(backend):
    """Not even where row 17's positive becomes +inf and its negatives -inf, so that the loss might seem to be 0."""
    inputs = inputs_of(Shape(65, 65, 48))
    inputs["x"][17, 5] = math.inf
    inputs["y"][:, 5] = -1
    inputs["y"][17, 5] = 1
    assert not ct.info_nce(**inputs, backend=backend).isfinite()
    assert not ct.info_nce(**inputs, symmetric=False, backend=backend).isfinite()
    assert not ct.gamma_contrastive(**inputs, log_u=torch.zeros(65), backend=backend).loss.isfinite()


# NT-Xent


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 3), (6, 1), (66, 48), (130, 384), (258, 96), (514, 5)], ids=str)
def test_nt_xent_is_as_exact_as_dense_torch(backend, size, dtype):
    assert_as_exact_as_dense(
        lambda z, scale: ct.nt_xent(z, scale, backend=backend),
        dense_torch_nt_xent,
        reference.nt_xent,
        {"z": unit_rows(*size, dtype), "scale": scalar(10.0, dtype)},
        dense_dtype=accumulation(dtype),
    )


@pytest.mark.parametrize("per_row_scale", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_nt_xent_options_are_as_exact_as_dense_torch(backend, reduction, per_row_scale):
    pairing = permutation(66).reshape(33, 2)
    positives = torch.empty(66, dtype=torch.int64)
    positives[pairing[:, 0]], positives[pairing[:, 1]] = pairing[:, 1], pairing[:, 0]
    options = {"positives": positives, "reduction": reduction}
    scale = torch.linspace(0.5, 40, 66) if per_row_scale else scalar(10.0)
    with small_workspace():
        assert_as_exact_as_dense(
            lambda z, scale: ct.nt_xent(z, scale, backend=backend, **options),
            lambda z, scale: dense_torch_nt_xent(z, scale, **options),
            lambda z, scale: reference.nt_xent(z, scale, **options),
            {"z": unit_rows(66, 48), "scale": scale},
        )


# The gamma loss


def gamma_terms(inputs, masks, both: bool, spread: float):
    """Weights around the inverse normalisers, so that the cap clips some, and draws of mean about one."""
    options = {"positives": torch.arange(inputs["x"].shape[0])} | masks
    lse = reference.log_normalizers(**{name: value.double() for name, value in inputs.items()}, **options)
    generator = torch.Generator().manual_seed(5)
    terms = {}
    for weights, draws, values in zip(("log_u", "log_v"), ("row_draws", "col_draws"), lse, strict=True):
        noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
        terms[weights] = (spread * noise - values.nan_to_num(neginf=0)).float()
        terms[draws] = torch.rand(values.shape, generator=generator) + 0.5
    return terms if both else {name: value for name, value in terms.items() if name in ("log_u", "row_draws")}


@pytest.mark.parametrize("cap", [True, False], ids=["cap", "exp"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("both", [True, False], ids=["both", "rows"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gamma_is_as_exact_as_dense_torch(backend, reduction, both, mask, cap):
    shape = Shape(65, 65, 48) if both else Shape(65, 100, 48)
    masks, inputs = masks_of(mask, shape), inputs_of(shape)
    options = {"cap": cap, "log_multiplier": 1.5, "reduction": reduction, **masks}
    options |= gamma_terms(inputs, masks, both, spread=3.0 if cap else 0.5)
    assert_like_reference(
        lambda x, y, scale: ct.gamma_contrastive(x, y, scale, backend=backend, **options).loss,
        lambda x, y, scale: reference.gamma_contrastive(x, y, scale, **options).loss,
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [shape for shape in ODD_SHAPES if shape.rows != 1], ids=str)
def test_gamma_of_any_shape_and_dtype_is_as_exact_as_dense_torch(backend, shape, dtype):
    inputs = inputs_of(shape, dtype)
    terms = gamma_terms(inputs, {}, shape.rows == shape.cols, spread=2.0)
    assert_like_reference(
        lambda x, y, scale: ct.gamma_contrastive(x, y, scale, backend=backend, **terms).loss,
        lambda x, y, scale: reference.gamma_contrastive(x, y, scale, **terms).loss,
        inputs,
    )


def test_gamma_returns_the_log_normalizers_of_its_logits(backend):
    shape = Shape(65, 65, 48)
    masks, inputs = masks_of("both", shape), inputs_of(shape)
    terms = gamma_terms(inputs, masks, True, 1.0)
    output = ct.gamma_contrastive(**inputs, **terms, **masks, log_multiplier=1.5, backend=backend)
    row_lse, col_lse = reference.log_normalizers(
        **{name: value.double() for name, value in inputs.items()}, **masks, log_multiplier=1.5
    )
    torch.testing.assert_close(output.row_lse.double(), row_lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.col_lse.double(), col_lse, rtol=1e-6, atol=1e-6)
    assert ct.gamma_contrastive(**inputs, log_u=terms["log_u"], backend=backend).col_lse is None


@pytest.mark.parametrize("log_u", [-1e4, 1e4])
def test_capped_gamma_is_finite_for_absurd_weights(backend, log_u):
    def ours(**inputs):
        return ct.gamma_contrastive(**inputs, log_u=torch.full((65,), log_u), backend=backend).loss

    results = gradients_of(ours, inputs_of(Shape(65, 65, 48), scale=100.0))
    assert all(value.isfinite().all() for value in results.values())


# Log-normalisers and ranks


@pytest.mark.parametrize("mask", ["none", "both"])
@pytest.mark.parametrize("shape", [Shape(257, 63, 96), Shape(1, 257, 48), Shape(65, 65, 1), Shape(63, 1, 520)], ids=str)
def test_log_normalizers_and_their_gradients_are_as_exact_as_dense_torch(backend, shape, mask):
    options = {} if mask == "none" else {"groups": (ids(shape.rows, 9), ids(shape.cols, 9))}
    if mask == "both" and shape.rows <= shape.cols:
        options["positives"] = permutation(shape.cols)[: shape.rows]

    def flat(pair):
        joined = torch.cat(pair)
        return joined[joined.isfinite()]

    assert_like_reference(
        lambda x, y, scale: flat(ct.log_normalizers(x, y, scale, log_multiplier=0.7, backend=backend, **options)),
        lambda x, y, scale: flat(reference.log_normalizers(x, y, scale, log_multiplier=0.7, **options)),
        {"x": unit_rows(shape.rows, shape.dim), "y": unit_rows(shape.cols, shape.dim, seed=1), "scale": scalar(20.0)},
    )


def test_log_normalizer_of_nothing_is_minus_infinity_and_has_no_gradient(backend):
    x, y = (t.requires_grad_() for t in towers(Shape(5, 5, 3)))
    groups = (torch.tensor([0, 1, 1, 1, 1]), torch.zeros(5, dtype=torch.int64))
    row_lse, col_lse = ct.log_normalizers(x, y, 20.0, groups=groups, backend=backend)
    assert row_lse.isneginf().tolist() == [True, False, False, False, False]
    assert col_lse.isfinite().all()
    gradient = torch.autograd.grad(row_lse.sum() + col_lse.sum(), x)[0]
    assert gradient.isfinite().all()
    assert (gradient[0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_ranks_equal_the_reference_where_ties_are_true_ties(backend, mask, dtype):
    shape = Shape(65, 257, 7)
    x, y = (torch.randint(-2, 3, (rows, 7)).to(dtype) for rows in shape[:2])
    masks = masks_of(mask, shape)
    assert torch.equal(ct.retrieval_ranks(x, y, backend=backend, **masks), reference.retrieval_ranks(x, y, **masks))


# The libraries people have now


def test_info_nce_equals_cross_entropy(backend):
    def ours(x, y, scale):
        return ct.info_nce(x, y, scale, backend=backend)

    def by_cross_entropy(x, y, scale):
        logits, target = scale * x @ y.T, torch.arange(len(x))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    assert_as_exact_as_dense(ours, by_cross_entropy, by_cross_entropy, inputs_of(Shape(257, 257, 100)))


def test_info_nce_equals_open_clip(backend):
    module = open_clip_loss()()

    def clip(x, y, scale):
        return module(x, y, scale)

    assert_as_exact_as_dense(
        lambda x, y, scale: ct.info_nce(x, y, scale, backend=backend), clip, clip, inputs_of(Shape(257, 257, 100))
    )


@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_nt_xent_equals_lightly(backend, temperature):
    lightly = lightly_nt_xent_loss()(temperature=temperature)

    def ours(out0, out1):
        views = torch.cat([F.normalize(out0, dim=1), F.normalize(out1, dim=1)])
        return ct.nt_xent(views, 1 / temperature, backend=backend)

    x, y = towers(Shape(129, 129, 100))
    assert_as_exact_as_dense(ours, lightly, lightly, {"out0": 2 * x, "out1": 3 * y})
