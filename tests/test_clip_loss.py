"""ClipLoss takes the place of open_clip's."""

from __future__ import annotations

import inspect

import pytest
import torch
from contrastile import reference
from contrastile.losses import ClipLoss
from support import BACKENDS_HERE, Shape, assert_as_exact_as_dense, open_clip_loss, scalar, towers
from torch import nn
from torch.nn import functional as F

SHAPES = [Shape(1, 1, 3), Shape(2, 2, 1), Shape(63, 63, 384), Shape(257, 257, 100)]


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_loss_and_gradients_are_as_exact_as_open_clips(backend, shape, scale):
    theirs, ours = open_clip_loss()(), ClipLoss(backend=backend)
    x, y = towers(shape)
    assert_as_exact_as_dense(
        lambda x, y, scale: ours(x, y, scale),
        lambda x, y, scale: theirs(x, y, scale),
        lambda x, y, scale: reference.info_nce(x, y, scale),
        {"x": x, "y": y, "scale": scalar(scale)},
    )


def test_constructor_and_call_have_open_clips_arguments_in_its_order():
    theirs = open_clip_loss()
    for name in ("__init__", "forward"):
        wanted = inspect.signature(getattr(theirs, name)).parameters
        ours = inspect.signature(getattr(ClipLoss, name)).parameters
        positional = [p for p in ours.values() if p.kind is not p.KEYWORD_ONLY]
        assert [p.name for p in positional] == list(wanted)
        assert [p.default for p in positional] == [p.default for p in wanted.values()]


def test_options_of_gathering_change_nothing_in_one_process():
    x, y = towers(Shape(5, 5, 7))
    plain = ClipLoss()(x, y, 10.0)
    assert torch.equal(ClipLoss(True, True, True, 0, 1, True)(x, y, 10.0), plain)
    assert torch.equal(ClipLoss()(x, y, 10.0, output_dict=True)["contrastive_loss"], plain)


def test_one_scale_may_come_as_number_scalar_or_single_entry():
    x, y = towers(Shape(5, 5, 7))
    scale = torch.tensor([10.0], requires_grad=True)
    loss = ClipLoss()(x, y, scale)
    loss.backward()
    assert scale.grad.shape == (1,)
    assert torch.equal(loss, ClipLoss()(x, y, 10.0))
    assert torch.equal(loss, ClipLoss()(x, y, torch.tensor(10.0)))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_bias_changes_nothing_and_gets_a_zero_gradient_instead_of_none(shape):
    x, y = towers(Shape(5, 5, 7))
    x.requires_grad_()
    bias = torch.full(shape, -10.0, requires_grad=True)
    loss = ClipLoss()(x, y, torch.tensor(10.0), bias)
    loss.backward()
    with_bias, x.grad = x.grad, None
    ClipLoss()(x, y, torch.tensor(10.0)).backward()
    assert torch.equal(loss, ClipLoss()(x, y, 10.0))
    assert torch.equal(with_bias, x.grad)
    assert torch.equal(bias.grad, torch.zeros(shape))


def test_sixteen_bit_features_under_autocast_give_a_float32_loss():
    tower = nn.Linear(7, 6)
    images, texts = torch.randn(5, 7), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        features = F.normalize(tower(images), dim=1)
        loss = ClipLoss()(features, F.normalize(texts, dim=1), torch.tensor(10.0))
    loss.backward()
    assert loss.dtype == torch.float32
    assert bool(tower.weight.grad.isfinite().all())


def test_compiles_without_a_graph_break():
    torch.manual_seed(3)
    tower, scale, bias = nn.Linear(7, 6), nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-1.0))
    module, images, texts = ClipLoss(), torch.randn(5, 7), F.normalize(torch.randn(5, 6), dim=1)

    def step():
        return module(F.normalize(tower(images), dim=1), texts, scale.exp(), bias)

    parameters = [*tower.parameters(), scale, bias]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(
        torch.autograd.grad(compiled(), parameters), torch.autograd.grad(step(), parameters), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def test_keeps_no_state():
    assert ClipLoss(cache_labels=True).state_dict() == {}


def test_messages_name_what_is_missing():
    x, y = towers(Shape(5, 5, 7))
    with pytest.raises(NotImplementedError, match="use_horovod with world_size 4"):
        ClipLoss(rank=1, world_size=4, use_horovod=True)
    with pytest.raises(RuntimeError, match=r"world_size is 4, but torch\.distributed is not initialised"):
        ClipLoss(local_loss=True, rank=1, world_size=4)(x, y, 10.0)
    with pytest.raises(ValueError, match=r"logit_bias has shape \(5,\): expected one number"):
        ClipLoss()(x, y, 10.0, torch.zeros(5))
    with pytest.raises(ValueError, match=r"x is \(5, 7\) but y is \(4, 7\)"):
        ClipLoss()(x, y[:4], 10.0)
    with pytest.raises(ValueError, match="backend is 'abacus'"):
        ClipLoss(backend="abacus")(x, y, 10.0)


def test_nan_in_gives_nan_out():
    x, y = towers(Shape(5, 5, 7))
    x[2, 3] = torch.nan
    assert bool(ClipLoss()(x, y, 10.0).isnan())
