"""The sigmoid loss of every backend, and its sweep, against float64 truth; the rest of its behaviour."""

from __future__ import annotations

import dataclasses
import math

import contrastile as ct
import pytest
import torch
import torch.nn.functional as F
from contrastile import autograd, backends, reference
from contrastile.pairs import GivenWeights, GradNeeds, PairProblem
from contrastile.validation import check_pairs
from contrastile.version import __version__
from dense_sweeps import (
    BOTH,
    DIRECTIONS,
    PROBLEMS,
    SIGMOID,
    Dense,
    assert_sweep,
    given_weights,
    grad_results,
    regime,
    stats_results,
)
from support import (
    BACKENDS_HERE,
    DTYPES,
    INTERPRETING,
    ODD_SHAPES,
    Shape,
    accumulation,
    assert_as_exact_as_dense,
    gradients_of,
    ids,
    permutation,
    scalar,
    small_workspace,
    sweeps_of,
    towers,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

F64 = torch.float64
ALL_NEEDS = GradNeeds(dx=True, dy=True, moment=True, stats=True)
NARROW = ["plain", "groups-and-self", "self-triangular", "tall-no-positives", "deep"]
CASES = [(name, torch.float32) for name in PROBLEMS]
CASES += [(name, dtype) for name in NARROW for dtype in (torch.float64, torch.float16, torch.bfloat16)]
ULPS = 2.5  # of sigmoids and softplus, relative; truth in float64 has a share of it
MASKS = ["plain", "positives", "groups", "both"]

pytestmark = pytest.mark.parametrize("backend", BACKENDS_HERE)


def inputs_of(shape: Shape, dtype: torch.dtype = torch.float32, scale: float = 20.0, bias: float = -8.0):
    x, y = towers(shape, dtype)
    return {"x": x, "y": y, "scale": scalar(scale, dtype), "bias": scalar(bias, dtype)}


def masks_of(name: str, shape: Shape):
    positives = permutation(shape.cols)[: shape.rows]
    groups = (ids(shape.rows, 9), ids(shape.cols, 9))
    return {
        "plain": {},
        "positives": {"positives": positives},
        "groups": {"groups": groups},
        "both": {"positives": ids(shape.rows, 7), "groups": groups},  # a column may be the positive of several rows
    }[name]


def dense_siglip(x, y, scale, bias, *, positives=None, groups=None, reduction="mean"):
    """What a user would have written."""
    positives = torch.arange(x.shape[0]) if positives is None else positives
    logits = scale.reshape(-1, 1) * (x @ y.T) + bias
    is_positive = torch.zeros_like(logits, dtype=torch.bool).scatter(1, positives[:, None], True)
    losses = -F.logsigmoid(logits * (2.0 * is_positive - 1))
    if groups is not None:
        losses = losses.masked_fill((groups[0][:, None] == groups[1]) & ~is_positive, 0)
    rows = losses.sum(1)
    return {"mean": rows.mean, "sum": rows.sum, "none": rows.clone}[reduction]()


def assert_siglip(inputs, backend: str, beyond: dict[str, float] | None = None, **options) -> None:
    assert_as_exact_as_dense(
        lambda **leaves: ct.siglip(**leaves, backend=backend, **options),
        lambda **leaves: dense_siglip(**leaves, **options),
        lambda **leaves: reference.siglip(**leaves, **options),
        inputs,
        dense_dtype=accumulation(inputs["x"].dtype),
        beyond=beyond,
    )


def rounded_coefficients(inputs) -> dict[str, float]:
    """What coefficients rounded to 16 bits can do to the gradient of the scale, which GPU kernels sum from rows of dX.

    Dense coefficients are rounded too, but their errors may cancel: of few features they often do.
    """
    x, y, scale, bias = (leaf.double() for leaf in inputs.values())
    products = x @ y.T
    signs = 2.0 * torch.eye(*products.shape, dtype=F64) - 1
    coefficients = torch.sigmoid(-signs * (scale * products + bias)) / len(x)
    return {"dscale": torch.finfo(inputs["x"].dtype).eps / 2 * (coefficients * products).abs().sum().item()}


# The sweep


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in CASES])
def test_sigmoid_weights_are_as_exact_as_dense(backend, name, dtype):
    problem = PROBLEMS[name](dtype)
    for direction in [BOTH] if problem.self_similarity else DIRECTIONS:
        weights = given_weights(problem, **direction, function=SIGMOID)
        needs = dataclasses.replace(ALL_NEEDS, row_weight=direction["rows"] and not problem.self_similarity)
        grads = sweeps_of(backend).pair_grad(problem, weights, needs)
        ours = grad_results(grads, problem.self_similarity)
        assert_sweep(problem, ours, lambda dense, weights=weights: dense.given(weights))
        columns = direction["columns"]
        assert_sweep(problem, stats_results(grads.stats), lambda dense, columns=columns: dense.stats(columns))


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_sigmoid_and_softplus_are_exact_to_a_few_units_in_the_last_place(backend, dtype):
    lowest = math.log(torch.finfo(dtype).smallest_normal) + 1
    logits = torch.cat([torch.linspace(lowest, -lowest, 4001), torch.linspace(-3, 3, 4001)]).to(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    problem = PairProblem(logits[:, None], one, torch.ones_like(logits))
    weights = GivenWeights(torch.zeros_like(logits), torch.ones_like(logits), None, None, None, SIGMOID)
    grads = sweeps_of(backend).pair_grad(problem, weights, GradNeeds(dx=False, dy=False, row_weight=True))
    wide = logits.double()
    for name, ours, truth in (
        ("sigmoid", grads.row_weight, torch.sigmoid(wide)),
        ("softplus", grads.row_mass, torch.logaddexp(wide, torch.zeros_like(wide))),
    ):
        worst = ((ours.double() - truth) / truth).abs().max().item() / torch.finfo(dtype).eps
        assert worst < ULPS, f"{name}: {worst:.2f} units"


@pytest.mark.parametrize("name", ["groups", "self-triangular-700", "not-injective", "tall-no-positives"])
def test_a_small_workspace_changes_nothing_but_rounding(backend, name):
    problem = PROBLEMS[name](torch.float32)
    weights = given_weights(problem, **BOTH, function=SIGMOID)
    with small_workspace():
        grads = sweeps_of(backend).pair_grad(
            problem, weights, GradNeeds(dx=True, dy=True, moment=True, row_weight=not problem.self_similarity)
        )
    assert_sweep(problem, grad_results(grads, problem.self_similarity), lambda dense: dense.given(weights))


@pytest.mark.parametrize("name", ["tiny-scale", "huge-scale", "all-negative", "dominating", "duplicates"])
def test_regimes_are_as_exact_as_dense(backend, name):
    problem = regime(name, torch.float32)
    weights = given_weights(problem, rows=True, columns=False, function=SIGMOID)
    for further in (0.0, 1e4, -1e4):
        moved = dataclasses.replace(weights, row_shift=weights.row_shift + further)
        grads = sweeps_of(backend).pair_grad(problem, moved, GradNeeds(True, True, moment=True, row_weight=True))
        ours = grad_results(grads, False)
        assert_sweep(problem, ours, lambda dense, moved=moved: dense.given(moved))
        assert all(value.isfinite().all() for value in ours.values())


def test_nan_reaches_exactly_the_results_it_affects(backend):
    problem = PROBLEMS["plain"](torch.float32)
    weights = given_weights(problem, rows=True, columns=False, function=SIGMOID)
    problem.anchors[17, 5] = math.nan
    dense = Dense(problem, problem.anchors.double(), problem.candidates.double(), problem.scale.double())
    needs = GradNeeds(dx=True, dy=True, moment=True, row_weight=True)
    ours = grad_results(sweeps_of(backend).pair_grad(problem, weights, needs), False)
    for name, value in dense.given(weights).items():
        assert ours[name].isnan().equal(value.isnan()), name


# The loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_any_shape_and_dtype_is_as_exact_as_dense_torch(backend, shape, dtype):
    inputs = inputs_of(shape, dtype)
    rounds = backend in ("triton", "cuda") and dtype.itemsize == 2
    assert_siglip(inputs, backend, rounded_coefficients(inputs) if rounds else None)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("by_row", [True, False], ids=["scale-by-row", "one-scale"])
def test_masks_reductions_and_row_scales_are_as_exact_as_dense_torch(backend, by_row, mask, reduction):
    shape = Shape(65, 100, 48)
    inputs = inputs_of(shape) | ({"scale": torch.linspace(0.5, 40, 65)} if by_row else {})
    assert_siglip(inputs, backend, reduction=reduction, **masks_of(mask, shape))


@pytest.mark.parametrize("bias", [-1000.0, -10.0, 0.0, 1000.0])
@pytest.mark.parametrize("scale", [0.01, 10.0, 1000.0])
def test_any_scale_and_bias_is_as_exact_as_dense_torch(backend, scale, bias):
    inputs = inputs_of(Shape(65, 65, 48), scale=scale, bias=bias)
    assert_siglip(inputs, backend)
    results = gradients_of(lambda **leaves: ct.siglip(**leaves, backend=backend), inputs)
    assert all(value.isfinite().all() for value in results.values())


def test_a_confident_model_keeps_the_digits_of_its_loss(backend):
    """Negatives of 1e-9 each: 1 + 1e-9 would be 1 in float32."""
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=F64)).Q.float()
    inputs = {"x": basis, "y": basis.clone(), "scale": scalar(42.0), "bias": scalar(-21.0)}
    truth = gradients_of(reference.siglip, inputs, F64)
    assert 1e-8 < truth["loss"] < 1e-7
    for name, value in gradients_of(lambda **leaves: ct.siglip(**leaves, backend=backend), inputs).items():
        torch.testing.assert_close(value, truth[name], rtol=3e-5, atol=3e-5 * truth[name].abs().max().item(), msg=name)


def test_a_float16_gradient_of_any_sign_and_size_fits(backend):
    """The coefficients of negatives far exceed those of the positives, and an upstream gradient may turn their sign."""
    inputs = inputs_of(Shape(65, 65, 48), torch.float16, bias=30.0)
    for factor in (-1.0, 10.0):
        assert_as_exact_as_dense(
            lambda factor=factor, **leaves: factor * ct.siglip(**leaves, reduction="none", backend=backend),
            lambda factor=factor, **leaves: factor * dense_siglip(**leaves, reduction="none"),
            lambda factor=factor, **leaves: factor * reference.siglip(**leaves, reduction="none"),
            inputs,
            dense_dtype=torch.float32,
        )


# Autograd


@pytest.mark.parametrize("wanted", ["x", "y", "scale", "bias", "x bias", "scale bias", "x y scale bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_wanted_gradients_are_formed_and_by_one_sweep_where_the_loss_is_a_number(
    backend, monkeypatch, reduction, wanted
):
    calls, found = [], backends.get(backend)

    class Recorder:
        positive_logits = staticmethod(found.positive_logits)

        @staticmethod
        def pair_grad(problem, weights, needs):
            calls.append(needs)
            return found.pair_grad(problem, weights, needs)

    monkeypatch.setattr(backends, "get", lambda name: Recorder)
    inputs = inputs_of(Shape(24, 24, 7))
    every = gradients_of(reference.siglip, inputs, F64)
    for name, leaf in inputs.items():
        leaf.requires_grad_(name in wanted.split())
    losses = ct.siglip(**inputs, reduction=reduction, backend=backend)
    losses.mean().backward()
    named = [wanted.split().count(name) == 1 for name in ("x", "y", "scale")]
    last, sweeps_of_backward = calls[-1], int(reduction == "none" and any(named))
    assert [last.dx, last.dy, last.moment] == named
    assert calls[0].row_weight == ("bias" in wanted)
    assert len(calls) == 1 + sweeps_of_backward
    for name, leaf in inputs.items():
        assert (leaf.grad is not None) == (name in wanted.split())
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), every[f"d{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_retained_graph_gives_the_same_gradients_again(backend, reduction):
    leaves = [t.requires_grad_() for t in inputs_of(Shape(24, 24, 7)).values()]
    loss = ct.siglip(*leaves, reduction=reduction, backend=backend).sum()
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    second = torch.autograd.grad(-2 * loss, leaves)
    torch.testing.assert_close(list(second), [-2 * g for g in first])


def test_differentiating_gradients_names_the_reference(backend):
    leaves = [t.requires_grad_() for t in inputs_of(Shape(24, 24, 7)).values()]
    for some in (leaves, leaves[3:]):
        values = [leaf if any(leaf is s for s in some) else leaf.detach() for leaf in leaves]
        gradients = torch.autograd.grad(ct.siglip(*values, backend=backend), some, create_graph=True)
        for gradient in gradients:
            with pytest.raises(RuntimeError, match=r"first derivatives only.*contrastile\.reference"):
                gradient.square().sum().backward(retain_graph=True)


@pytest.mark.skipif(INTERPRETING, reason="the kernels take no float64")
@pytest.mark.parametrize("mask", MASKS)
def test_gradcheck(backend, mask):
    shape = Shape(5, 7, 3)
    leaves = [t.requires_grad_() for t in inputs_of(shape, F64, 3.0, -1.0).values()]
    masks = masks_of(mask, shape)
    assert gradcheck(lambda *args: ct.siglip(*args, reduction="none", backend=backend, **masks), leaves)
    assert gradgradcheck(lambda *args: reference.siglip(*args, **masks), leaves)


def test_without_gradients_there_is_no_graph_and_a_number_as_bias_is_the_tensor(backend):
    inputs = inputs_of(Shape(24, 24, 7))
    plain = ct.siglip(**inputs, backend=backend)
    assert torch.equal(ct.siglip(inputs["x"], inputs["y"], 20, -8, backend=backend), plain)
    inputs["bias"].requires_grad_()
    assert ct.siglip(**inputs, backend=backend).requires_grad
    with torch.no_grad():
        loss = ct.siglip(**inputs, backend=backend)
    assert not loss.requires_grad
    assert torch.equal(loss, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_come_in_the_dtypes_of_their_inputs(backend, dtype):
    leaves = [*inputs_of(Shape(24, 24, 7), dtype).values()]
    leaves[3] = leaves[3].to(torch.bfloat16)
    loss = ct.siglip(*(leaf.requires_grad_() for leaf in leaves), backend=backend)
    loss.backward()
    assert loss.dtype == accumulation(dtype)
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]


# Compiled graphs


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", [(True, True, True, True), (False, False, False, True)], ids=["all", "bias"])
def test_opcheck(backend, form, reduction):
    x, y, scale, bias = inputs_of(Shape(6, 8, 5)).values()
    inputs = check_pairs(x, y, scale, None, (ids(6, 3), ids(8, 3)), both_directions=False)
    for leaf, wanted in zip((x, y, scale, bias), form, strict=True):
        leaf.requires_grad_(wanted)
    opcheck(torch.ops.contrastile.siglip.default, (*inputs, bias, reduction, *form, backend, __version__))


def test_compiles_to_one_graph_with_the_same_gradients(backend):
    leaves = [t.requires_grad_() for t in inputs_of(Shape(24, 24, 7)).values()]

    def loss(*values):
        return ct.siglip(*values, backend=backend)

    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


def test_function_class_equals_the_function(backend):
    x, y, scale, bias = inputs_of(Shape(24, 24, 7)).values()
    inputs = check_pairs(x, y, scale, None, None, both_directions=False)
    loss = autograd.SigLipFunction.apply(*inputs, bias, "mean", backend)
    assert torch.equal(loss, ct.siglip(x, y, scale, bias, backend=backend))


# Refusals


REFUSALS = [
    ({"bias": "0"}, TypeError, r"bias is str: expected a number or a floating-point tensor"),
    ({"bias": True}, TypeError, r"bias is bool"),
    ({"bias": None}, TypeError, r"bias is NoneType"),
    ({"bias": math.nan}, ValueError, r"bias is nan: expected a finite number"),
    ({"bias": torch.zeros(3)}, ValueError, r"bias has shape \(3,\): expected a number or \(\)"),
    ({"bias": torch.tensor(-10)}, TypeError, r"bias is torch.int64: expected a floating-point tensor"),
    ({"bias": torch.tensor(-math.inf)}, ValueError, r"bias holds -inf: expected a finite number"),
    ({"bias": torch.zeros((), device="meta")}, ValueError, r"bias is on meta, the embeddings are on cpu"),
    ({"scale": 0.0}, ValueError, r"scale is 0.0: expected a finite number above 0"),
    ({"y": torch.randn(23, 7)}, ValueError, r"x is \(24, 7\) but y is \(23, 7\): without positives"),
    ({"y": torch.randn(24, 6)}, ValueError, r"both need the same feature dimension"),
    ({"positives": torch.arange(24) + 1}, ValueError, r"expected columns from 0 to 23"),
    ({"groups": (torch.zeros(24),) * 2}, TypeError, r"groups\[0\] is torch.float32: expected an integer tensor"),
    ({"reduction": "batchmean"}, ValueError, r"reduction is 'batchmean'"),
    ({"exchange": "ring"}, ValueError, r"exchange is 'ring' without a group"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSALS, ids=[message for *_, message in REFUSALS])
def test_bad_input_is_refused_by_name(backend, changes, error, message):
    with pytest.raises(error, match=message):
        ct.siglip(**inputs_of(Shape(24, 24, 7)) | {"backend": backend} | changes)


def test_one_pair_alone_has_the_loss_of_its_positive(backend):
    problem = inputs_of(Shape(1, 1, 3))
    expected = F.softplus(-(20 * (problem["x"] * problem["y"]).sum() - 8))
    torch.testing.assert_close(ct.siglip(**problem, backend=backend), expected)
