"""Which gradients come, in which dtype, at what cost, how often, and what happens when they are differentiated."""

from __future__ import annotations

import math

import contrastile as ct
import pytest
import torch
from contrastile import backends, reference
from contrastile.pairs import GivenWeights, SoftmaxWeights
from support import BACKENDS_HERE, Shape, permutation, small_workspace, towers, unit_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

SIZE = Shape(24, 24, 7)
EVERY_LOSS = ["info_nce", "one_direction", "nt_xent", "gamma", "gamma_rows", "log_normalizers"]


@pytest.fixture(params=BACKENDS_HERE)
def backend(request):
    return request.param


def leaves(dtype=torch.float32, shape=SIZE, scale=5.0):
    x, y = towers(shape, dtype)
    return x.requires_grad_(), y.requires_grad_(), torch.tensor(scale, requires_grad=True)


def log_weights(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(seed)) - 4


def loss_of(kind: str, x, y, scale, reduction="mean", of=ct, **options):
    """One of EVERY_LOSS; log_normalizers as a sum that weighs no two of them alike."""
    if kind == "info_nce":
        return of.info_nce(x, y, scale, reduction=reduction, **options)
    if kind == "one_direction":
        return of.info_nce(x, y, scale, symmetric=False, reduction=reduction, **options)
    if kind == "nt_xent":
        return of.nt_xent(torch.cat([x, y]), scale, reduction=reduction, **options)
    if kind == "log_normalizers":
        row_lse, col_lse = of.log_normalizers(x, y, scale, log_multiplier=0.5, **options)
        return (row_lse * torch.linspace(0, 1, len(x)).to(row_lse)).sum() - col_lse.sin().sum()
    log_v = log_weights(len(y), 1) if kind == "gamma" else None
    return of.gamma_contrastive(x, y, scale, log_weights(len(x)), log_v, reduction=reduction, **options).loss


def assert_equal(ours, expected, **tolerance):
    torch.testing.assert_close(ours, expected, check_dtype=False, **tolerance)


# What is asked of the sweeps


class Recorder:
    """A backend that notes what it is asked."""

    def __init__(self, backend):
        self.backend, self.calls = backend, []

    def positive_logits(self, problem):
        return self.backend.positive_logits(problem)

    def pair_stats(self, problem, **options):
        self.calls.append(("stats", options))
        return self.backend.pair_stats(problem, **options)

    def pair_grad(self, problem, weights, needs):
        self.calls.append((type(weights), needs))
        return self.backend.pair_grad(problem, weights, needs)


@pytest.fixture
def recorder(backend, monkeypatch):
    recorder = Recorder(backends.get(backend))
    monkeypatch.setattr(backends, "get", lambda name: recorder)
    return recorder


@pytest.mark.parametrize("wanted", ["x", "y", "scale", "x scale", "x y", "x y scale"])
@pytest.mark.parametrize("kind", ["info_nce", "one_direction", "gamma"])
def test_only_wanted_gradients_are_formed(backend, recorder, kind, wanted):
    inputs = dict(zip(("x", "y", "scale"), leaves(), strict=True))
    for name, leaf in inputs.items():
        leaf.requires_grad_(name in wanted.split())
    loss = loss_of(kind, **inputs, backend=backend)
    [(_, needs)] = recorder.calls
    assert (needs.dx, needs.dy, needs.moment) == tuple(name in wanted.split() for name in inputs)
    loss.backward()
    assert len(recorder.calls) == 1, "a gradient that was formed in the forward is only scaled in the backward"
    for leaf in inputs.values():
        assert (leaf.grad is not None) == leaf.requires_grad


@pytest.mark.parametrize("without", ["no_grad", "inference_mode", "requires_grad"])
@pytest.mark.parametrize("kind", EVERY_LOSS)
def test_without_gradients_the_forward_is_one_sweep_that_forms_none(backend, recorder, kind, without):
    x, y, scale = leaves()
    expected = loss_of(kind, x, y, scale, of=reference).detach()
    if without == "requires_grad":
        x, y, scale = x.detach(), y.detach(), scale.detach()
        loss = loss_of(kind, x, y, scale, backend=backend)
    else:
        with getattr(torch, without)():
            loss = loss_of(kind, x, y, scale, backend=backend)
    assert loss.grad_fn is None
    assert_equal(loss, expected)
    [(operation, asked)] = recorder.calls
    assert operation == "stats" or (asked.dx, asked.dy, asked.moment) == (False, False, False)


@pytest.mark.parametrize("kind", ["info_nce", "one_direction", "nt_xent", "gamma"])
def test_unreduced_loss_forms_its_gradients_in_the_backward(backend, recorder, kind):
    x, y, scale = leaves()
    losses = loss_of(kind, x, y, scale, reduction="none", backend=backend)
    assert [call[0] for call in recorder.calls] == [GivenWeights if kind == "gamma" else "stats"]
    losses.sum().backward()
    assert [call[0] for call in recorder.calls[1:]] == [GivenWeights]


# Cost, in products of all anchors with all candidates


class Products(TorchDispatchMode):
    """Counts multiplications of matrix products."""

    multiplications = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


def products_of(call, rows: int, cols: int, dim: int) -> float:
    with Products() as counter:
        call()
    return counter.multiplications / (rows * cols * dim)


# (forward and backward, the same where all logits fit in the workspace, forward alone)
COSTS = {
    "info_nce": (4, 3, 1),
    "one_direction": (3, 3, 1),
    "gamma": (3, 3, 1),
    "gamma_rows": (3, 3, 1),
    "nt_xent": (3, 2, 1),
    "log_normalizers": (4, 4, 1),
}


@pytest.mark.parametrize("kind", EVERY_LOSS)
def test_products_of_a_training_step_and_of_a_forward_alone(kind):
    step, step_that_fits, forward = COSTS[kind]
    x, y, scale = leaves(shape=Shape(300, 300, 8))
    size = 600 if kind == "nt_xent" else 300

    def train():
        loss_of(kind, x, y, scale, backend="eager").backward()

    assert products_of(train, size, size, 8) == step_that_fits
    with small_workspace(600 * 2**10 if kind == "nt_xent" else 300 * 2**10):
        assert products_of(train, size, size, 8) == step
        with torch.no_grad():
            assert products_of(lambda: loss_of(kind, x, y, scale, backend="eager"), size, size, 8) == forward


def test_a_frozen_tower_saves_its_product():
    x, y, scale = leaves()
    y.requires_grad_(False)

    def train():
        loss_of("one_direction", x, y, scale, backend="eager").backward()

    assert products_of(train, *SIZE) == 2


# Dtypes and shapes of gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", EVERY_LOSS)
def test_loss_is_accumulated_and_gradients_come_in_the_inputs_dtype(backend, kind, dtype):
    x, y, scale = leaves(dtype)
    loss = loss_of(kind, x, y, scale, backend=backend)
    loss.backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert x.grad.dtype == y.grad.dtype == dtype
    assert scale.grad.dtype == torch.float32


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("kind", ["info_nce", "gamma", "log_normalizers"])
def test_scale_gradient_has_the_shape_and_dtype_of_scale(backend, kind, per_row, scale_dtype):
    x, y, _ = leaves()
    scale = (torch.linspace(4, 8, SIZE.rows) if per_row else torch.tensor(5.0)).to(scale_dtype).requires_grad_()
    loss_of(kind, x, y, scale, backend=backend).backward()
    ours, scale.grad = scale.grad, None
    loss_of(kind, x, y, scale, of=reference).backward()
    assert ours.dtype == scale_dtype
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if scale_dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    assert_equal(ours, scale.grad, **tolerance)


def test_a_number_as_scale_equals_a_tensor(backend):
    x, y, scale = leaves()
    for kind in EVERY_LOSS:
        assert torch.equal(loss_of(kind, x, y, 5.0, backend=backend), loss_of(kind, x, y, scale, backend=backend))
        assert torch.equal(loss_of(kind, x, y, 5, backend=backend), loss_of(kind, x, y, scale, backend=backend))


def test_strided_row_scales_are_read_as_rows(backend):
    x, y, _ = leaves()
    scale = torch.linspace(1, 9, 2 * SIZE.rows)[::2]
    expected = ct.info_nce(x, y, scale.clone(), backend=backend)
    assert torch.equal(ct.info_nce(x, y, scale, backend=backend), expected)


def test_log_weights_and_draws_are_constants(backend):
    x, y, scale = leaves()
    constants = [log_weights(SIZE.rows, seed).requires_grad_() for seed in range(2)]
    constants += [torch.rand(SIZE.rows).add(0.5).requires_grad_() for _ in range(2)]
    log_u, log_v, row_draws, col_draws = constants
    output = ct.gamma_contrastive(x, y, scale, log_u, log_v, row_draws=row_draws, col_draws=col_draws, backend=backend)
    assert not output.row_lse.requires_grad
    assert not output.col_lse.requires_grad
    output.loss.backward()
    assert all(constant.grad is None for constant in constants)


@pytest.mark.parametrize("used", ["rows", "columns"])
def test_one_log_normalizer_alone_can_be_differentiated(backend, used):
    x, y, scale = leaves()
    for function in (lambda *a: ct.log_normalizers(*a, backend=backend), reference.log_normalizers):
        row_lse, col_lse = function(x, y, scale)
        (row_lse if used == "rows" else col_lse).square().sum().backward()
        gradients = [leaf.grad for leaf in (x, y, scale)]
        x.grad = y.grad = scale.grad = None
        if function is not reference.log_normalizers:
            ours = gradients
    assert_equal(ours, gradients, rtol=1e-4, atol=1e-5)


# The upstream gradient


@pytest.mark.parametrize("kind", EVERY_LOSS)
def test_upstream_gradient_multiplies(backend, kind):
    x, y, scale = leaves(torch.float64)
    once = torch.autograd.grad(loss_of(kind, x, y, scale, backend=backend), (x, y, scale))
    thrice = torch.autograd.grad(-3 * loss_of(kind, x, y, scale, backend=backend), (x, y, scale))
    assert_equal(thrice, tuple(-3 * g for g in once))


def test_reductions_differ_by_their_factor_only(backend):
    x, y, scale = leaves(torch.float64)
    for kind in ("info_nce", "one_direction", "nt_xent", "gamma", "gamma_rows"):
        found = {}
        for reduction, factor in (("mean", 1.0), ("sum", 1 / SIZE.rows), ("none", 1 / SIZE.rows)):
            factor /= 2 if kind == "nt_xent" and reduction != "mean" else 1
            loss = loss_of(kind, x, y, scale, reduction=reduction, backend=backend).sum() * factor
            found[reduction] = torch.autograd.grad(loss, (x, y, scale))
        assert_equal(found["sum"], found["mean"])
        assert_equal(found["none"], found["mean"])


@pytest.mark.parametrize("kind", ["info_nce", "one_direction", "nt_xent"])
def test_gradient_scaler_keeps_float16_gradients_from_underflowing(backend, kind):
    """A confident model's gradients lie below 6e-8, the least that float16 has; the scaler's factor comes first."""
    x = unit_rows(64, 32, torch.float16).requires_grad_()
    y = unit_rows(64, 32, torch.float16).requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    factor = 65536.0
    (loss_of(kind, x, y, 44.0, backend=backend) * factor).backward()
    loss_of(kind, *wide, 44.0, of=reference).backward()
    for ours, truth in zip((x.grad, y.grad), (wide[0].grad, wide[1].grad), strict=True):
        assert truth.abs().max() < 6e-8
        assert_equal(ours.double() / factor, truth, rtol=2e-3, atol=1e-3 * truth.abs().max().item())


# Backward again


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", EVERY_LOSS)
def test_a_retained_graph_gives_the_same_gradients_again(backend, kind, reduction):
    x, y, scale = leaves(torch.float64)
    loss = loss_of(kind, x, y, scale, reduction=reduction, backend=backend).sum()
    first = [g.clone() for g in torch.autograd.grad(loss, (x, y, scale), retain_graph=True)]
    second = [g.clone() for g in torch.autograd.grad(2 * loss, (x, y, scale), retain_graph=True)]
    third = torch.autograd.grad(loss, (x, y, scale))
    assert_equal(second, [2 * g for g in first])
    assert_equal(list(third), first)


@pytest.mark.parametrize("kind", EVERY_LOSS)
def test_gradients_asked_for_one_after_the_other_are_right(backend, kind):
    x, y, scale = leaves(torch.float64)
    together = torch.autograd.grad(loss_of(kind, x, y, scale, backend=backend), (x, y, scale))
    loss = loss_of(kind, x, y, scale, backend=backend)
    apart = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for leaf in (x, y, scale)]
    assert_equal(apart, list(together))


def test_backward_twice_without_retaining_is_torchs_own_error(backend):
    x, y, scale = leaves()
    loss = ct.info_nce(x, y, scale, backend=backend)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_changing_an_input_in_place_before_backward_is_torchs_own_error(backend):
    x, y, scale = leaves()
    moved = x * 1
    losses = ct.info_nce(moved, y, scale, reduction="none", backend=backend)
    moved.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_activation_checkpointing_gives_the_same_gradients(backend):
    x, y, scale = leaves(torch.float64)
    expected = torch.autograd.grad(ct.info_nce(x.tanh(), y, scale, backend=backend), (x, y, scale))
    loss = checkpoint(lambda x, y, s: ct.info_nce(x.tanh(), y, s, backend=backend), x, y, scale, use_reentrant=False)
    assert_equal(torch.autograd.grad(loss, (x, y, scale)), expected)


# Second derivatives


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", EVERY_LOSS)
def test_differentiating_gradients_names_the_reference(backend, kind, reduction):
    x, y, scale = leaves()
    loss = loss_of(kind, x, y, scale, reduction=reduction, backend=backend).sum()
    gradients = torch.autograd.grad(loss, (x, y, scale), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match=r"first derivatives only.*contrastile\.reference"):
            gradient.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("kind", EVERY_LOSS)
def test_create_graph_alone_gives_the_same_gradients(backend, kind):
    x, y, scale = leaves()
    expected = torch.autograd.grad(loss_of(kind, x, y, scale, backend=backend), (x, y, scale))
    gradients = torch.autograd.grad(loss_of(kind, x, y, scale, backend=backend), (x, y, scale), create_graph=True)
    for gradient, alone in zip(gradients, expected, strict=True):
        assert gradient.requires_grad
        assert torch.equal(gradient, alone)


def test_differentiating_with_respect_to_the_upstream_gradient_raises_too(backend):
    x, y, _ = leaves()
    upstream = torch.tensor(1.0, requires_grad=True)
    loss = ct.info_nce(x, y.detach(), 5.0, backend=backend)
    [gradient] = torch.autograd.grad(loss, x, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(gradient.sum(), upstream)


# Autocast


@pytest.mark.parametrize("kind", EVERY_LOSS)
def test_autocast_changes_nothing(backend, kind):
    x, y, scale = leaves()
    expected = loss_of(kind, x, y, scale, backend=backend)
    expected.backward()
    gradients = [x.grad, y.grad, scale.grad]
    x.grad = y.grad = scale.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(kind, x, y, scale, backend=backend)
        loss.backward()
    assert torch.equal(loss, expected)
    for ours, alone in zip((x.grad, y.grad, scale.grad), gradients, strict=True):
        assert torch.equal(ours, alone)


def test_autocast_widens_the_narrower_dtype(backend):
    x, y, scale = leaves()
    half = y.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ct.info_nce(x, half, scale, backend=backend)
    assert torch.equal(loss, ct.info_nce(x, half.float(), scale, backend=backend))
    loss.backward()
    assert half.grad.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32


def test_outputs_of_an_autocast_model_train(backend):
    model = torch.nn.Linear(7, 7)
    log_scale = torch.nn.Parameter(torch.tensor(math.log(5.0)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = model(unit_rows(SIZE.rows, 7))
        assert z.dtype == torch.bfloat16
        loss = ct.info_nce(z, z.flip(0), log_scale.exp(), backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32
    assert model.weight.grad.dtype == torch.float32
    assert log_scale.grad.isfinite()


def test_public_function_class_equals_the_function(backend):
    """InfoNCEFunction takes what the checks make of the arguments."""
    from contrastile.validation import check_pairs

    x, y, scale = leaves()
    order = permutation(SIZE.rows)
    inputs = check_pairs(x, y, scale, order, None, both_directions=True)
    loss = ct.autograd.InfoNCEFunction.apply(*inputs, True, "mean", backend)
    assert torch.equal(loss, ct.info_nce(x, y, scale, positives=order, backend=backend))


def test_symmetric_loss_takes_its_gradients_from_one_joint_sweep(backend, recorder):
    ct.info_nce(*leaves(), backend=backend).backward()
    [(weights, _)] = recorder.calls
    assert weights is SoftmaxWeights
