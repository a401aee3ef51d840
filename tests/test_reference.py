"""The oracle itself: its gradients against differences, its values against loops, PyTorch and the libraries."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from contrastile import reference
from support import Shape, lightly_nt_xent_loss, open_clip_loss, towers, unit_rows
from torch.autograd import gradcheck, gradgradcheck

F64 = torch.float64
EULER_GAMMA = 0.5772156649015329

PERMUTATION = torch.tensor([2, 0, 4, 1, 3])
NOT_INJECTIVE = torch.tensor([2, 0, 2, 1, 6])
GROUPS = (torch.tensor([0, 1, 0, 2, 3]), torch.tensor([1, 0, 0, 2, 0]))
WIDE_GROUPS = (GROUPS[0], torch.tensor([1, 0, 0, 2, 0, 3, 3]))
MASKS = {
    "plain": {},
    "permutation": {"positives": PERMUTATION},
    "groups": {"groups": GROUPS},
    "both": {"positives": PERMUTATION, "groups": GROUPS},
}
WIDE_MASKS = {
    "wide": {},
    "wide-not-injective": {"positives": NOT_INJECTIVE},
    "wide-both": {"positives": NOT_INJECTIVE, "groups": WIDE_GROUPS},
}
ALL_MASKS = MASKS | WIDE_MASKS


def problem(mask: str):
    x, y = towers(Shape(5, 7 if mask in WIDE_MASKS else 5, 3), F64)
    return x.requires_grad_(), y.requires_grad_(), torch.tensor(3.0, dtype=F64, requires_grad=True)


def row_scales() -> torch.Tensor:
    return torch.linspace(1, 5, 5, dtype=F64).requires_grad_()


# Against loops


def kinds(x, y, positives=None, groups=None):
    """(positive pairs, negative pairs) as lists of (i, j), straight from the definitions."""
    positives = list(range(len(x))) if positives is None else positives.tolist()
    positive = list(enumerate(positives))
    negative = [
        (i, j)
        for i in range(len(x))
        for j in range(len(y))
        if j != positives[i] and (groups is None or groups[0][i] != groups[1][j])
    ]
    return positive, negative


def loop_logits(x, y, scale):
    scales = scale.reshape(-1).tolist() * (len(x) if scale.dim() == 0 else 1)
    return [
        [s * sum(a * b for a, b in zip(row, col, strict=True)) for col in y.tolist()]
        for s, row in zip(scales, x.tolist(), strict=True)
    ]


def loop_info_nce(x, y, scale, symmetric, positives=None, groups=None):
    s = loop_logits(x, y, scale)
    positive, negative = kinds(x, y, positives, groups)
    losses = []
    for i, j in positive:
        row = math.log(math.exp(s[i][j]) + sum(math.exp(s[i][b]) for a, b in negative if a == i)) - s[i][j]
        col = math.log(math.exp(s[i][j]) + sum(math.exp(s[a][j]) for a, b in negative if b == j)) - s[i][j]
        losses.append((row + col) / 2 if symmetric else row)
    return torch.tensor(losses, dtype=F64)


def loop_gamma(x, y, scale, log_u, log_v, g, h, log_multiplier, cap, positives=None, groups=None):
    def phi(t):
        return 1 + t if cap and t > 0 else math.exp(t)

    def bound(s_pos, s_neg, log_weight, draw):
        mass = sum(phi(s + log_weight + log_multiplier) for s in s_neg) + phi(s_pos + log_weight)
        return -s_pos + draw * mass - math.log(draw) - log_weight - 1

    s = loop_logits(x, y, scale)
    positive, negative = kinds(x, y, positives, groups)
    losses = []
    for i, j in positive:
        row = bound(s[i][j], [s[a][b] for a, b in negative if a == i], log_u[i].item(), g[i].item())
        if log_v is None:
            losses.append(row)
            continue
        col = bound(s[i][j], [s[a][b] for a, b in negative if b == j], log_v[j].item(), h[j].item())
        losses.append((row + col) / 2)
    return torch.tensor(losses, dtype=F64)


def weights(cols=5):
    log_u = torch.linspace(-4.0, 1.0, 5, dtype=F64)
    log_v = torch.linspace(0.5, -3.0, cols, dtype=F64)
    return log_u, log_v, torch.linspace(0.3, 2.0, 5, dtype=F64), torch.linspace(1.5, 0.6, cols, dtype=F64)


@pytest.mark.parametrize("per_row_scale", [False, True])
@pytest.mark.parametrize("mask", ALL_MASKS)
def test_info_nce_equals_a_python_loop(mask, per_row_scale):
    x, y, scale = problem(mask)
    scale = row_scales() if per_row_scale else scale
    for symmetric in (True, False) if mask in MASKS else (False,):
        ours = reference.info_nce(x, y, scale, symmetric=symmetric, reduction="none", **ALL_MASKS[mask])
        torch.testing.assert_close(ours, loop_info_nce(x, y, scale, symmetric, **ALL_MASKS[mask]))
        for reduction, reduced in (("mean", ours.mean()), ("sum", ours.sum())):
            got = reference.info_nce(x, y, scale, symmetric=symmetric, reduction=reduction, **ALL_MASKS[mask])
            torch.testing.assert_close(got, reduced)


@pytest.mark.parametrize("cap", [True, False])
@pytest.mark.parametrize("mask", ALL_MASKS)
def test_gamma_equals_a_python_loop(mask, cap):
    x, y, scale = problem(mask)
    for both in (True, False) if mask in MASKS else (False,):
        log_u, log_v, g, h = weights()
        log_v = log_v if both else None
        ours = reference.gamma_contrastive(
            x, y, scale, log_u, log_v, row_draws=g, col_draws=h if both else None,
            log_multiplier=0.7, cap=cap, reduction="none", **ALL_MASKS[mask],
        )  # fmt: skip
        truth = loop_gamma(x, y, scale, log_u, log_v, g, h, 0.7, cap, **ALL_MASKS[mask])
        torch.testing.assert_close(ours.loss, truth)
        assert (ours.col_lse is None) == (log_v is None)
        assert not ours.row_lse.requires_grad


@pytest.mark.parametrize("log_multiplier", [0.0, 1.3])
@pytest.mark.parametrize("mask", ALL_MASKS)
@pytest.mark.parametrize("with_positives", [True, False])
def test_log_normalizers_equal_a_python_loop(mask, with_positives, log_multiplier):
    x, y, scale = problem(mask)
    options = {"positives": torch.arange(5)} | ALL_MASKS[mask]
    s = loop_logits(x, y, scale)
    positive, negative = kinds(x, y, **options)
    if not with_positives:
        groups = options.get("groups")
        every = [(i, j) for i in range(len(x)) for j in range(len(y))]
        positive, negative = [], [(i, j) for i, j in every if groups is None or groups[0][i] != groups[1][j]]
        options["positives"] = None

    def total(keep):
        value = sum(math.exp(s[i][j]) for i, j in positive if keep(i, j))
        value += math.exp(log_multiplier) * sum(math.exp(s[i][j]) for i, j in negative if keep(i, j))
        return math.log(value) if value else -math.inf

    row_lse, col_lse = reference.log_normalizers(x, y, scale, log_multiplier=log_multiplier, **options)
    rows = [total(lambda a, _, i=i: a == i) for i in range(len(x))]
    cols = [total(lambda _, b, j=j: b == j) for j in range(len(y))]
    torch.testing.assert_close(row_lse, torch.tensor(rows, dtype=F64))
    torch.testing.assert_close(col_lse, torch.tensor(cols, dtype=F64))
    assert reference.log_normalizers(x, y, scale, columns=False, **options)[1] is None


@pytest.mark.parametrize("positives", [None, torch.tensor([1, 0, 4, 5, 2, 3])])
def test_nt_xent_equals_a_python_loop(positives):
    z, scale = unit_rows(6, 3, F64), torch.tensor(3.0, dtype=F64)
    s = loop_logits(z, z, scale)
    partner = [(i + 3) % 6 for i in range(6)] if positives is None else positives.tolist()
    losses = [math.log(sum(math.exp(s[i][j]) for j in range(6) if j != i)) - s[i][partner[i]] for i in range(6)]
    ours = reference.nt_xent(z, scale, positives=positives, reduction="none")
    torch.testing.assert_close(ours, torch.tensor(losses, dtype=F64))


@pytest.mark.parametrize("mask", ALL_MASKS)
def test_ranks_equal_a_python_loop(mask):
    x, y, _ = problem(mask)
    y = torch.cat([y[:-1], y[:1]])  # a tie: equal products never count
    s = loop_logits(x, y, torch.tensor(1.0, dtype=F64))
    positive, negative = kinds(x, y, **ALL_MASKS[mask])
    truth = [sum(s[i][b] > s[i][j] for a, b in negative if a == i) for i, j in positive]
    assert reference.retrieval_ranks(x, y, **ALL_MASKS[mask]).tolist() == truth


def test_nan_is_never_retrieved():
    x, y, _ = problem("wide-both")
    positives, groups = NOT_INJECTIVE, WIDE_GROUPS
    broken = x.detach().clone()
    broken[3, 0] = math.nan
    expected = reference.retrieval_ranks(x, y, positives, groups=groups)
    expected[3] = len(y)
    assert torch.equal(reference.retrieval_ranks(broken, y, positives, groups=groups), expected)


# Gradients


@pytest.mark.parametrize("per_row_scale", [False, True])
@pytest.mark.parametrize("mask", ALL_MASKS)
def test_gradcheck_info_nce(mask, per_row_scale):
    x, y, scale = problem(mask)
    scale = row_scales() if per_row_scale else scale
    for symmetric in (True, False) if mask in MASKS else (False,):
        options = {"symmetric": symmetric, "reduction": "none", **ALL_MASKS[mask]}
        assert gradcheck(lambda x, y, s, options=options: reference.info_nce(x, y, s, **options), (x, y, scale))


def test_second_derivatives_exist():
    leaves = problem("plain")
    assert gradgradcheck(reference.info_nce, leaves)
    assert gradgradcheck(lambda x, y, s: reference.gamma_contrastive(x, y, s, weights()[0], cap=False).loss, leaves)


@pytest.mark.parametrize("cap", [True, False])
@pytest.mark.parametrize("mask", ALL_MASKS)
def test_gradcheck_gamma(mask, cap):
    x, y, scale = problem(mask)
    log_u, log_v, g, h = weights()
    for both in (True, False) if mask in MASKS else (False,):
        columns = {"log_v": log_v, "col_draws": h} if both else {}
        options = {"cap": cap, "log_multiplier": 0.7, "row_draws": g, "reduction": "none", **columns, **ALL_MASKS[mask]}
        assert gradcheck(
            lambda x, y, s, options=options: reference.gamma_contrastive(x, y, s, log_u, **options).loss, (x, y, scale)
        )


@pytest.mark.parametrize("mask", ALL_MASKS)
def test_gradcheck_log_normalizers_and_nt_xent(mask):
    x, y, scale = problem(mask)
    options = {"log_multiplier": 0.7, "positives": torch.arange(5), **ALL_MASKS[mask]}

    def finite(x, y, s):
        return tuple(lse[lse.isfinite()] for lse in reference.log_normalizers(x, y, s, **options))

    assert gradcheck(finite, (x, y, scale))
    z = torch.cat([x, y[:5]]).detach().requires_grad_()
    assert gradcheck(lambda z, s: reference.nt_xent(z, s, reduction="none"), (z, scale))


def test_weights_and_draws_are_constants_to_the_gradient():
    x, y, scale = problem("plain")
    given = [w.clone().requires_grad_() for w in weights()]
    loss = reference.gamma_contrastive(x, y, scale, *given[:2], row_draws=given[2], col_draws=given[3]).loss
    loss.backward()
    assert all(w.grad is None for w in given)


@pytest.mark.parametrize("cap", [True, False])
def test_one_pair_alone_has_no_loss_and_no_gradient(cap):
    x, y = (t.requires_grad_() for t in towers(Shape(1, 1, 4), F64))
    scale = torch.tensor(7.0, dtype=F64, requires_grad=True)
    row_lse, _ = reference.log_normalizers(x, y, scale, positives=torch.tensor([0]))
    gamma = reference.gamma_contrastive(x, y, scale, -row_lse.detach(), cap=cap).loss
    for loss in (reference.info_nce(x, y, scale), gamma):
        for value in (loss, *torch.autograd.grad(loss, (x, y, scale), retain_graph=True)):
            torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-14, rtol=0)


# Against others


def clip_by_cross_entropy(x, y, scale):
    logits, target = scale * x @ y.T, torch.arange(x.shape[0])
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def assert_same_loss_and_gradients(ours, other, leaves):
    torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(other, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [0.01, 20.0, 1000.0])
def test_info_nce_equals_cross_entropy(scale):
    x, y = (t.requires_grad_() for t in towers(Shape(33, 33, 8), F64))
    scale = torch.tensor(scale, dtype=F64, requires_grad=True)
    assert_same_loss_and_gradients(reference.info_nce(x, y, scale), clip_by_cross_entropy(x, y, scale), (x, y, scale))
    one_way = F.cross_entropy(scale * x @ y.T, torch.arange(33))
    assert_same_loss_and_gradients(reference.info_nce(x, y, scale, symmetric=False), one_way, (x, y, scale))


def test_info_nce_equals_open_clip():
    x, y = (t.requires_grad_() for t in towers(Shape(33, 33, 8), F64))
    scale = torch.tensor(20.0, dtype=F64, requires_grad=True)
    assert_same_loss_and_gradients(reference.info_nce(x, y, scale), open_clip_loss()()(x, y, scale), (x, y, scale))


def test_nt_xent_equals_lightly():
    x, y = (t.mul(1.7).requires_grad_() for t in towers(Shape(33, 33, 8), F64))
    z = torch.cat([F.normalize(x, dim=1), F.normalize(y, dim=1)])
    assert_same_loss_and_gradients(reference.nt_xent(z, 1 / 0.2), lightly_nt_xent_loss()(temperature=0.2)(x, y), (x, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_inputs_are_computed_in_float32(dtype):
    x, y = (t.requires_grad_() for t in towers(Shape(9, 9, 8), dtype))
    loss = reference.info_nce(x, y, 20.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad.dtype == dtype
    torch.testing.assert_close(loss, reference.info_nce(x.float(), y.float(), 20.0), rtol=0, atol=0)


# What the gamma loss promises


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_bounds_are_ordered_info_nce_capped_uncapped(scale, spread):
    x, y = towers(Shape(20, 20, 4), F64)
    row_lse, col_lse = reference.log_normalizers(x, y, scale, positives=torch.arange(20))
    log_u, log_v = -row_lse + spread * torch.randn(20, dtype=F64), -col_lse + spread * torch.randn(20, dtype=F64)
    info_nce = reference.info_nce(x, y, scale, reduction="none")
    capped = reference.gamma_contrastive(x, y, scale, log_u, log_v, reduction="none").loss
    uncapped = reference.gamma_contrastive(x, y, scale, log_u, log_v, cap=False, reduction="none").loss
    assert (capped >= info_nce - 1e-9).all()
    assert (uncapped >= capped - 1e-9).all()
    assert (uncapped > info_nce).all()  # no weight above is exactly 1 / Z


@pytest.mark.parametrize("cap", [True, False])
def test_bound_touches_info_nce_exactly_at_the_inverse_normaliser(cap):
    x, y, scale = problem("both")
    row_lse, col_lse = reference.log_normalizers(x, y, scale, **MASKS["both"])
    gamma = reference.gamma_contrastive(x, y, scale, -row_lse, -col_lse, cap=cap, **MASKS["both"])
    assert_same_loss_and_gradients(gamma.loss, reference.info_nce(x, y, scale, **MASKS["both"]), (x, y, scale))
    torch.testing.assert_close(gamma.row_lse, row_lse.detach())
    torch.testing.assert_close(gamma.col_lse, col_lse.detach())


def test_mean_over_gamma_draws_is_info_nce_plus_a_constant():
    """u ~ Gamma(1, rate Z): the mean gradient is InfoNCE's, and the mean bound is -E log g = Euler's gamma above it."""
    x, y, scale = problem("plain")
    count = 1000
    quantiles = (torch.arange(count, dtype=F64) + 0.5) / count
    log_u = -reference.log_normalizers(x, y, scale, positives=torch.arange(5))[0]
    losses = [
        reference.gamma_contrastive(x, y, scale, log_u, row_draws=draw.expand(5)).loss
        for draw in -torch.log1p(-quantiles)
    ]
    mean, info_nce = torch.stack(losses).mean(), reference.info_nce(x, y, scale, symmetric=False)
    torch.testing.assert_close(mean, info_nce + EULER_GAMMA, atol=1e-3, rtol=0)
    for ours, truth in zip(
        torch.autograd.grad(mean, (x, y, scale)), torch.autograd.grad(info_nce, (x, y, scale)), strict=True
    ):
        torch.testing.assert_close(ours, truth, atol=1e-3, rtol=0)


@pytest.mark.parametrize("copies", [2, 7])
def test_multiplier_means_that_many_copies_of_the_negatives(copies):
    x, y = towers(Shape(1, 9, 4), F64)
    repeated = torch.cat([y[:1], y[1:].repeat(copies, 1)])
    positive, log_copies = torch.tensor([0]), math.log(copies)
    once = reference.log_normalizers(x, y, 5.0, positives=positive, log_multiplier=log_copies)[0]
    truth = reference.log_normalizers(x, repeated, 5.0, positives=positive)[0]
    torch.testing.assert_close(once, truth)
    for cap, log_u in ((False, torch.tensor([0.3], dtype=F64)), (True, torch.tensor([-9.0], dtype=F64))):
        ours = reference.gamma_contrastive(x, y, 5.0, log_u, log_multiplier=log_copies, cap=cap)
        copied = reference.gamma_contrastive(x, repeated, 5.0, log_u, cap=cap)
        torch.testing.assert_close(ours.loss, copied.loss)
        torch.testing.assert_close(ours.row_lse, copied.row_lse)


def test_cap_keeps_the_gradient_of_any_weight_bounded():
    x, y, scale = problem("plain")
    loss = reference.gamma_contrastive(x, y, scale, torch.full((5,), 500.0, dtype=F64), reduction="sum").loss
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient.norm(dim=1).max() <= scale * 5 * y.norm(dim=1).max()
