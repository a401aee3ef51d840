"""Hard negatives, smoothed labels, debiased denominators and further directions, against float64 and others' forms."""

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
    INTERPRETING,
    Shape,
    assert_as_exact_as_dense,
    gradients_of,
    ids,
    permutation,
    scalar,
    towers,
    unit_rows,
)
from torch.autograd import gradcheck

F64 = torch.float64
SHAPES = [Shape(1, 1, 3), Shape(2, 2, 1), Shape(65, 65, 48), Shape(129, 129, 100), Shape(63, 100, 7)]
EVERY_DIRECTION = ("xy", "yx", "xx", "yy")
OPTIONS = {
    "smoothed": {"label_smoothing": 0.1},
    "debiased": {"prior": 0.05},
    "own": {"hard": 3},
    "shared": {"hard": -5},
    "all": {"label_smoothing": 0.2, "prior": 0.01, "hard": 3},
    "all shared": {"label_smoothing": 0.2, "prior": 0.3, "hard": -5},
}
SCHEMES = {
    "qwen3": {"directions": ("xy", "xx", "yy"), "hard": 3, "prior": 0.05, "label_smoothing": 0.1},
    "gte": {"directions": EVERY_DIRECTION, "hard": -5},
    "apart": {"directions": EVERY_DIRECTION, "partition": "per_direction", "hard": 3, "label_smoothing": 0.1},
}

pytestmark = pytest.mark.parametrize("backend", BACKENDS_HERE)


def problem(shape: Shape, dtype=torch.float32, *, scale=20.0, hard=None, **options):
    """Inputs and options; hard is K of a row's own hard negatives, or minus L of shared ones."""
    x, y = towers(shape, dtype)
    inputs = {"x": x, "y": y, "scale": scalar(scale, dtype)}
    if hard is not None:
        rows = unit_rows(shape.rows * hard if hard > 0 else -hard, shape.dim, dtype, seed=5)
        inputs["hard_negatives"] = rows.reshape(-1, hard, shape.dim) if hard > 0 else rows
    return inputs, options


def assert_exact(function: str, inputs, backend: str, slack: float = 1.0, **options) -> None:
    """Dense in 16 bits is what mixed precision makes of it: products in 16 bits, the softmax in float32."""
    dtype = inputs["x"].dtype

    def truth(**leaves):
        return getattr(reference, function)(**leaves, **options)

    def dense(**leaves):
        with torch.autocast("cpu", dtype if dtype.itemsize == 2 else torch.bfloat16, enabled=dtype.itemsize == 2):
            return truth(**leaves)

    def ours(**leaves):
        return getattr(ct, function)(**leaves, **options, backend=backend)

    assert_as_exact_as_dense(ours, dense, truth, inputs, slack=slack)


def assert_equal_in_float64(function: str, inputs, backend: str, **options) -> None:
    ours = gradients_of(lambda **leaves: getattr(ct, function)(**leaves, **options, backend=backend), inputs)
    truth = gradients_of(lambda **leaves: getattr(reference, function)(**leaves, **options), inputs)
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# Exactness


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_dtype_is_as_exact_as_dense(backend, option, dtype):
    for shape in SHAPES:
        inputs, options = problem(shape, dtype, **OPTIONS[option])
        for symmetric in (True, False) if shape.rows == shape.cols else (False,):
            assert_exact("info_nce", inputs, backend, 4 if shape.rows < 3 else 1, symmetric=symmetric, **options)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_further_directions_are_as_exact_as_dense(backend, scheme):
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            inputs, options = problem(shape, dtype, **SCHEMES[scheme])
            assert_exact("directional_info_nce", inputs, backend, 4 if shape.rows < 3 else 2, **options)


@pytest.mark.parametrize("scale", [0.01, 100.0, 1000.0])
@pytest.mark.parametrize("prior", [None, 0.0, 1e-9, 0.999, "by row"])
def test_any_scale_and_prior_is_as_exact_as_dense_and_finite(backend, prior, scale):
    inputs, options = problem(Shape(65, 65, 48), scale=scale, hard=3, label_smoothing=0.1)
    options["prior"] = torch.linspace(0, 0.9999, 65) if prior == "by row" else prior
    assert_exact("info_nce", inputs, backend, **options)
    ours = gradients_of(lambda **leaves: ct.info_nce(**leaves, **options, backend=backend), inputs)
    assert all(value.isfinite().all() for value in ours.values())


@pytest.mark.skipif(INTERPRETING, reason="the kernels take no float64")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mask", ["groups", "positives", "both"])
@pytest.mark.parametrize("option", ["all", "all shared"])
def test_masks_and_scales_by_row(backend, option, mask, reduction):
    masks = {}
    if mask != "positives":  # some positives are of their row's id, others are not
        masks["groups"] = (ids(21, 4), ids(22, 4)[:21])
    if mask != "groups":
        masks["positives"] = permutation(21)
    inputs, options = problem(Shape(21, 21, 9), F64, scale=7.0, **OPTIONS[option])
    options |= masks | {"reduction": reduction}
    assert_equal_in_float64("info_nce", inputs, backend, **options)
    assert_equal_in_float64("directional_info_nce", inputs, backend, **options)
    inputs["scale"] = torch.linspace(1, 9, 21, dtype=F64)
    assert_equal_in_float64("info_nce", inputs, backend, symmetric=False, **options)
    assert_equal_in_float64("info_nce", inputs, backend, **options | {"prior": None})
    assert_equal_in_float64("directional_info_nce", inputs, backend, **options)


@pytest.mark.skipif(INTERPRETING, reason="the kernels take no float64")
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_nt_xent_takes_them_too(backend, option, by_row):
    inputs, options = problem(Shape(12, 12, 7), F64, scale=7.0, **OPTIONS[option])
    inputs["z"] = torch.cat([inputs.pop("x")[:6], inputs.pop("y")[:6]])
    if by_row:
        inputs["scale"] = torch.linspace(1, 9, 12, dtype=F64)
    assert_equal_in_float64("nt_xent", inputs, backend, **options, reduction="none")


@pytest.mark.skipif(INTERPRETING, reason="the kernels take no float64")
def test_gradcheck(backend):
    for option, symmetric in (("all", True), ("all shared", False)):
        inputs, options = problem(Shape(5, 5, 3), F64, scale=3.0, **OPTIONS[option])
        leaves = [value.requires_grad_() for value in inputs.values()]
        options |= {"symmetric": symmetric, "reduction": "none", "backend": backend}
        assert gradcheck(
            lambda x, y, s, h, o=options: ct.info_nce(x, y, s, hard_negatives=h, **o), leaves, fast_mode=True
        )
        assert gradcheck(
            lambda x, y, s, h: ct.directional_info_nce(x, y, s, hard_negatives=h, prior=0.1, backend=backend),
            leaves,
            fast_mode=True,
        )


# What others write


@pytest.mark.parametrize("option", ["smoothed", "own smoothed"])
def test_smoothing_is_cross_entropys(backend, option):
    hard = 3 if option.startswith("own") else None
    inputs, _ = problem(Shape(33, 33, 16), scale=9.0, hard=hard)

    def plain(x, y, scale, hard_negatives=None):
        logits = scale * x @ y.T
        rows = logits
        if hard_negatives is not None:
            rows = torch.cat([logits, scale * torch.einsum("nd,nkd->nk", x, hard_negatives)], 1)
        of_rows, of_columns = (F.cross_entropy(t, torch.arange(33), label_smoothing=0.3) for t in (rows, logits.T))
        return (of_rows + of_columns) / 2

    assert_as_exact_as_dense(
        lambda **leaves: ct.info_nce(**leaves, label_smoothing=0.3, backend=backend), plain, plain, inputs
    )


def test_smoothing_with_groups_is_cross_entropys_over_the_pairs_that_are_left(backend):
    inputs, _ = problem(Shape(12, 12, 5), scale=9.0)
    rows, cols = ids(12, 3), ids(13, 3)[:12]
    losses = ct.info_nce(
        **inputs, symmetric=False, groups=(rows, cols), label_smoothing=0.3, reduction="none", backend=backend
    )
    logits = 9.0 * inputs["x"].double() @ inputs["y"].double().T
    for row, loss in enumerate(losses):
        left = (cols != rows[row]) | (torch.arange(12) == row)
        at = left[:row].sum()
        expected = F.cross_entropy(logits[row, left], at, label_smoothing=0.3)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def debiased_as_printed(x, y, temperature, tau_plus):
    """The released code of Chuang et al. 2020, for one positive: exponentials and a clamp."""
    similarities = torch.exp(x @ y.T / temperature)
    pos = similarities.diagonal()
    negatives = len(x) - 1
    neg = similarities.sum(1) - pos
    ng = (-tau_plus * negatives * pos + neg) / (1 - tau_plus)
    ng = torch.clamp(ng, min=negatives * math.e ** (-1 / temperature))
    return (-torch.log(pos / (pos + ng))).mean()


@pytest.mark.parametrize("prior", [0.0, 0.01, 0.1, 0.5])
def test_the_debiased_loss_is_as_printed(backend, prior):
    inputs, _ = problem(Shape(40, 40, 8), F64 if not INTERPRETING else torch.float32, scale=4.0)

    def printed(x, y, scale):
        return debiased_as_printed(x, y, 1 / scale, prior)

    found = gradients_of(lambda **leaves: ct.info_nce(**leaves, symmetric=False, prior=prior, backend=backend), inputs)
    expected = gradients_of(lambda x, y, scale: printed(x, y, 4.0) + 0 * scale, inputs)
    for name in ("loss", "dx", "dy"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_qwen3s_and_gtes_denominators_are_as_printed(backend):
    inputs, _ = problem(Shape(17, 17, 8), scale=5.0)
    x, y = inputs["x"].double(), inputs["y"].double()
    e = {name: torch.exp(5 * a @ b.T) for name, a, b in (("xy", x, y), ("xx", x, x), ("yy", y, y))}
    pos = e["xy"].diagonal()
    within = sum(e[name].sum(1) - e[name].diagonal() for name in ("xx", "yy"))
    qwen3 = -torch.log(pos / (e["xy"].sum(1) + within)).mean()
    gte = -torch.log(pos / (e["xy"].sum(1) + e["xy"].sum(0) + within)).mean()
    for directions, expected in ((("xy", "xx", "yy"), qwen3), (EVERY_DIRECTION, gte)):
        loss = ct.directional_info_nce(**inputs, directions=directions, backend=backend)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_xy_and_yx_apart_are_the_symmetric_loss(backend):
    inputs, _ = problem(Shape(17, 17, 8))
    both = ct.directional_info_nce(**inputs, directions=("xy", "yx"), partition="per_direction", backend=backend)
    torch.testing.assert_close(both, ct.info_nce(**inputs, backend=backend))


# The floor


def test_where_the_floor_holds_the_negatives_have_no_gradient_and_the_scale_has_its_own(backend):
    inputs, _ = problem(Shape(24, 24, 7), scale=3.0, hard=2)
    inputs["y"] = inputs["x"].clone()  # every positive at its largest: a high prior takes off more than there is
    leaves = [value.requires_grad_() for value in inputs.values()]
    loss = ct.info_nce(**inputs, symmetric=False, prior=0.9, backend=backend)
    dx, dy, dscale, dhard = torch.autograd.grad(loss, leaves)
    # log(1 + 25 exp(-scale - scale)): 23 in the batch and two hard ones
    share = torch.sigmoid(torch.tensor(math.log(25) - 6.0))
    torch.testing.assert_close(loss, F.softplus(torch.tensor(math.log(25) - 6.0)))
    torch.testing.assert_close(dscale, -2 * share)
    torch.testing.assert_close(dy, -3 * share / 24 * inputs["x"])
    torch.testing.assert_close(dx, -3 * share / 24 * inputs["y"])
    assert not dhard.any()


# Ends of the range


@pytest.mark.parametrize("hard", ["own", "shared"])
def test_no_hard_negatives_are_none(backend, hard):
    inputs, _ = problem(Shape(9, 9, 4))
    nothing = torch.empty(9, 0, 4) if hard == "own" else torch.empty(0, 4)
    found = ct.info_nce(**inputs, hard_negatives=nothing.requires_grad_(), prior=0.1, backend=backend)
    assert torch.equal(found, ct.info_nce(**inputs, prior=0.1, backend=backend))
    expected = ct.info_nce(**inputs, backend=backend)
    torch.testing.assert_close(ct.info_nce(**inputs, hard_negatives=nothing, backend=backend), expected)


@pytest.mark.parametrize("option", ["smoothed", "debiased"])
def test_a_row_without_negatives_has_loss_0_and_no_gradient(backend, option):
    for rows, groups in ((1, None), (5, (torch.zeros(5, dtype=torch.int64),) * 2)):
        inputs, options = problem(Shape(rows, rows, 3), **OPTIONS[option])
        ours = gradients_of(
            lambda options=options, groups=groups, **leaves: ct.info_nce(
                **leaves, groups=groups, reduction="none", backend=backend, **options
            ),
            inputs,
        )
        assert not any(value.any() for value in ours.values()), ours


@pytest.mark.parametrize("option", ["all", "own", "own debiased"])
def test_nan_reaches_the_rows_that_meet_it(backend, option):
    inputs, options = problem(Shape(12, 12, 5), **OPTIONS["all" if option == "all" else "own"])
    if option == "own debiased":
        options["prior"] = 0.05
    groups = (torch.arange(12) // 2, torch.arange(12) // 2)
    for name, at, reached in (("x", 3, [3]), ("hard_negatives", 3, [3]), ("y", 4, [i for i in range(12) if i != 5])):
        changed = {key: value.clone() for key, value in inputs.items()}
        changed[name][at] = math.nan
        losses = ct.info_nce(**changed, **options, groups=groups, symmetric=False, reduction="none", backend=backend)
        assert losses.isnan().nonzero()[:, 0].tolist() == reached, name
    everywhere = ct.directional_info_nce(**changed, **options, reduction="none", backend=backend)
    assert everywhere.isnan().all()


def test_under_autocast_nothing_is_narrowed(backend):
    inputs, options = problem(Shape(12, 12, 5), **OPTIONS["all"])
    plain = ct.info_nce(**inputs, **options, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ct.info_nce(**inputs, **options, backend=backend), plain)
        inputs["hard_negatives"] = inputs["hard_negatives"].bfloat16()
        assert ct.info_nce(**inputs, **options, backend=backend).dtype == torch.float32


def test_under_autocast_no_gradient_is_narrowed_in_the_backward(backend):
    inputs, options = problem(Shape(12, 12, 5), **OPTIONS["all"])

    def loss(**leaves):
        return ct.info_nce(**leaves, **options, backend=backend)

    plain = gradients_of(loss, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        under = gradients_of(loss, inputs)
    for name, value in plain.items():
        assert torch.equal(under[name], value), name


def test_differentiating_gradients_names_the_reference(backend):
    inputs, options = problem(Shape(12, 12, 5), **OPTIONS["debiased"])
    x = inputs["x"].requires_grad_()
    [gradient] = torch.autograd.grad(ct.info_nce(**inputs, **options, backend=backend), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only.*contrastile\.reference"):
        gradient.square().sum().backward()
