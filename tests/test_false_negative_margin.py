"""Negatives more similar than the positive by a margin are masked: against float64, others' forms, and at the edges."""

from __future__ import annotations

import math

import contrastile as ct
import pytest
import torch
import torch.nn.functional as F
from contrastile import reference
from support import (
    BACKENDS_HERE,
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

F64 = torch.float64
SHAPE = Shape(65, 65, 48)
EVERY_DIRECTION = ("xy", "yx", "xx", "yy")
CASES = {
    "rows": ("info_nce", {"symmetric": False}),
    "both": ("info_nce", {}),
    "groups": ("info_nce", {"groups": (ids(65, 9), ids(66, 9)[:65]), "positives": permutation(65)}),
    "qwen3": ("directional_info_nce", {}),
    "grouped": ("directional_info_nce", {"groups": (ids(65, 9), ids(66, 9)[:65]), "directions": EVERY_DIRECTION}),
    "apart": ("directional_info_nce", {"directions": EVERY_DIRECTION, "partition": "per_direction"}),
}

pytestmark = pytest.mark.parametrize("backend", BACKENDS_HERE)


def excess(inputs, positives=None) -> torch.Tensor:
    """By how much the product of every negative is above that of its row's positive, float64, flat."""
    x, y = inputs["x"].double(), inputs["y"].double()
    paired = y if positives is None else y[positives]
    other = ~torch.eye(len(x), dtype=torch.bool)
    products = [t[other].view(len(x), -1) for t in (x @ paired.T, paired @ x.T, x @ x.T, paired @ paired.T)]
    hard = inputs.get("hard_negatives")
    if hard is not None:
        products.append(x @ hard.double().T if hard.dim() == 2 else torch.einsum("nd,nkd->nk", x, hard.double()))
    return (torch.cat(products, 1) - (x * paired).sum(1, keepdim=True)).flatten()


def margin_between(found: torch.Tensor) -> float:
    """One that masks from a tenth to a third, in a gap so wide that no rounding of float32 moves a pair across it."""
    upper = found.sort()[0][-len(found) // 3 : -len(found) // 10]
    at = upper.diff().argmax()
    assert upper.diff()[at] > 1e-5
    return float(upper[at] + upper[at + 1]) / 2


def problem(dtype, hard=None, shape=SHAPE, scale=20.0):
    x, y = towers(shape, dtype)
    inputs = {"x": x, "y": y, "scale": scalar(scale, dtype)}
    if hard is not None:
        rows = unit_rows(shape.rows * hard if hard > 0 else -hard, shape.dim, dtype, seed=5)
        inputs["hard_negatives"] = rows.reshape(-1, hard, shape.dim) if hard > 0 else rows
    return inputs


# Exactness


@pytest.mark.parametrize("hard", [None, 3, -5], ids=["in-batch", "own", "shared"])
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_dense(backend, case, hard):
    function, options = CASES[case]
    inputs = problem(torch.float32, hard)
    margin = margin_between(excess(inputs, options.get("positives")))

    def truth(**leaves):
        return getattr(reference, function)(**leaves, **options, false_negative_margin=margin)

    def ours(**leaves):
        return getattr(ct, function)(**leaves, **options, false_negative_margin=margin, backend=backend)

    assert_as_exact_as_dense(ours, truth, truth, inputs, slack=2)


@pytest.mark.skipif(INTERPRETING, reason="the kernels take no float64")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("margin", [-0.3, 0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_float64_is_the_reference(backend, case, margin, reduction):
    function, options = CASES[case]
    options = options | {"false_negative_margin": margin, "reduction": reduction}
    inputs = problem(F64, 3, scale=7.0)
    ours = gradients_of(lambda **leaves: getattr(ct, function)(**leaves, **options, backend=backend), inputs)
    truth = gradients_of(lambda **leaves: getattr(reference, function)(**leaves, **options), inputs)
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_mask_by_products_of_the_rounded_rows(backend, dtype):
    inputs = problem(dtype, 3)
    margin = margin_between(excess(inputs))
    options = {"false_negative_margin": margin, "reduction": "sum"}  # a mean's gradients would be fp16's subnormals
    ours = gradients_of(lambda **leaves: ct.info_nce(**leaves, **options, backend=backend), inputs)
    truth = gradients_of(lambda **leaves: reference.info_nce(**leaves, **options), inputs, F64)
    plain = gradients_of(lambda **leaves: reference.info_nce(**leaves, reduction="sum"), inputs, F64)
    torch.testing.assert_close(ours["loss"], truth["loss"], rtol=1e-5, atol=1e-5)
    for name in ("dx", "dy", "dhard_negatives"):
        error = (ours[name] - truth[name]).norm() / truth[name].norm()
        assert error < 0.02 < (plain[name] - truth[name]).norm() / truth[name].norm(), name


@pytest.mark.parametrize("by_row", [False, True])
def test_nt_xent_masks_too(backend, by_row):
    inputs = {"z": unit_rows(66, 24), "scale": torch.linspace(1, 20, 66) if by_row else scalar(9.0, torch.float32)}
    z = inputs["z"].double()
    own = (z * z.roll(-33, 0)).sum(1, keepdim=True)
    margin = margin_between((z @ z.T - own)[~torch.eye(66, dtype=torch.bool)])
    options = {"false_negative_margin": margin, "reduction": "none"}
    assert_as_exact_as_dense(
        lambda **leaves: ct.nt_xent(**leaves, **options, backend=backend),
        lambda **leaves: reference.nt_xent(**leaves, **options),
        lambda **leaves: reference.nt_xent(**leaves, **options),
        inputs,
        slack=2,
    )


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_cross_entropy_of_masked_scores(backend, scale):
    """Qwen3-Embedding's loss (Zhang et al. 2025), equation 1 and its mask, from scores."""
    inputs = problem(torch.float32, -4, scale=scale)
    margin = margin_between(excess(inputs))
    x, y, hard = (inputs[name].double() for name in ("x", "y", "hard_negatives"))
    own, eye = (x * y).sum(1, keepdim=True), torch.eye(65, dtype=torch.bool)
    scores = torch.cat([x @ y.T, x @ hard.T, x @ x.T, y @ y.T], 1)
    same = torch.cat([torch.zeros(65, 65 + 4, dtype=torch.bool), eye, eye], 1)
    masked = (scores > own + margin) & ~torch.cat([eye, torch.zeros(65, 4 + 2 * 65, dtype=torch.bool)], 1) | same
    expected = F.cross_entropy(scale * scores.masked_fill(masked, -math.inf), torch.arange(65))
    found = ct.directional_info_nce(**inputs, false_negative_margin=margin, backend=backend)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


# At the edges


@pytest.mark.parametrize("function", ["info_nce", "directional_info_nce"])
def test_a_margin_that_masks_nothing_changes_nothing(backend, function):
    inputs = problem(torch.float32, 3)
    loss = gradients_of(lambda **leaves: getattr(ct, function)(**leaves, backend=backend), inputs)
    wide = {"false_negative_margin": 2.5, "backend": backend}
    for name, value in gradients_of(lambda **leaves: getattr(ct, function)(**leaves, **wide), inputs).items():
        torch.testing.assert_close(value, loss[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("hard", [None, 3, -5])
def test_where_every_negative_is_masked_the_loss_is_0_without_gradient(backend, hard):
    inputs = problem(torch.float32, hard)
    found = gradients_of(lambda **leaves: ct.info_nce(**leaves, false_negative_margin=-3.0, backend=backend), inputs)
    assert all(bool((value == 0).all()) for value in found.values())


def test_the_positive_itself_is_never_masked(backend):
    inputs = problem(torch.float32)
    loss = ct.directional_info_nce(
        **inputs, directions=EVERY_DIRECTION, false_negative_margin=-3.0, reduction="none", backend=backend
    )
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))  # it is in the sum from both its ends


def test_nan_is_told_and_never_masked(backend):
    inputs = problem(torch.float32)
    inputs["y"][3] = math.nan
    loss = ct.info_nce(**inputs, symmetric=False, false_negative_margin=-3.0, reduction="none", backend=backend)
    assert bool(loss.isnan().all())


def test_the_mask_moves_with_the_scale_and_gives_it_no_gradient(backend):
    """Products decide: the same pairs at every scale, and its gradient is that of the pairs that are left."""
    inputs = problem(torch.float32)
    margin = margin_between(excess(inputs))
    products = inputs["x"].double() @ inputs["y"].double().T
    masked = (products > products.diag()[:, None] + margin) & ~torch.eye(65, dtype=torch.bool)
    for value in (0.5, 5.0, 50.0):
        scale, dense = torch.tensor(value, requires_grad=True), torch.tensor(value, dtype=F64, requires_grad=True)
        ct.info_nce(
            inputs["x"], inputs["y"], scale, symmetric=False, false_negative_margin=margin, backend=backend
        ).backward()
        F.cross_entropy((dense * products).masked_fill(masked, -math.inf), torch.arange(65)).backward()
        torch.testing.assert_close(scale.grad.double(), dense.grad, rtol=1e-4, atol=1e-7)
