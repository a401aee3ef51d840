"""SigLipLoss takes the place of open_clip's, in one process and in several."""

from __future__ import annotations

import inspect

import pytest
import torch
from contrastile import reference
from contrastile.losses import SigLipLoss
from distributed_cases import in_processes
from support import BACKENDS_HERE, Shape, assert_as_exact_as_dense, open_clip_losses, scalar, towers

SHAPES = [Shape(1, 1, 3), Shape(63, 63, 384), Shape(257, 257, 100)]


@pytest.mark.parametrize("bias", [0.0, -10.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_loss_and_gradients_are_as_exact_as_open_clips(backend, shape, bias):
    theirs, ours = open_clip_losses().SigLipLoss(), SigLipLoss(backend=backend)
    x, y = towers(shape)
    assert_as_exact_as_dense(
        lambda **inputs: ours(*inputs.values()),
        lambda **inputs: theirs(*inputs.values()),
        reference.siglip,
        {"x": x, "y": y, "scale": scalar(10.0), "bias": scalar(bias)},
    )


def test_constructor_and_call_have_open_clips_arguments_in_its_order():
    theirs = open_clip_losses().SigLipLoss
    for name in ("__init__", "forward"):
        wanted = inspect.signature(getattr(theirs, name)).parameters
        ours = inspect.signature(getattr(SigLipLoss, name)).parameters
        positional = [p for p in ours.values() if p.kind is not p.KEYWORD_ONLY]
        assert [p.name for p in positional] == list(wanted)
        assert [p.default for p in positional] == [p.default for p in wanted.values()]


def test_options_of_exchanging_change_nothing_in_one_process():
    x, y = towers(Shape(5, 5, 7))
    plain = SigLipLoss()(x, y, 10.0, -10.0)
    for dist_impl in ("bidir", "shift", "reduce", "gather"):
        assert torch.equal(SigLipLoss(True, 0, 1, dist_impl)(x, y, 10.0, -10.0), plain)
    assert torch.equal(SigLipLoss()(x, y, 10.0, -10.0, output_dict=True)["contrastive_loss"], plain)


def test_one_number_may_come_as_number_scalar_or_single_entry_and_no_bias_is_none_at_all():
    x, y = towers(Shape(5, 5, 7))
    scale, bias = torch.tensor([10.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    loss = SigLipLoss()(x, y, scale, bias)
    loss.backward()
    assert scale.grad.shape == bias.grad.shape == (1,)
    assert torch.equal(loss, SigLipLoss()(x, y, 10.0, -10.0))
    theirs = open_clip_losses().SigLipLoss()(x, y, 10.0, None)
    torch.testing.assert_close(SigLipLoss()(x, y, 10.0, None), theirs)


def test_messages_name_what_is_wrong():
    x, y = towers(Shape(5, 5, 7))
    with pytest.raises(ValueError, match="dist_impl is 'tree': expected one of None, 'bidir'"):
        SigLipLoss(dist_impl="tree")
    with pytest.raises(RuntimeError, match=r"world_size is 4, but torch\.distributed is not initialised"):
        SigLipLoss(rank=1, world_size=4)(x, y, 10.0, -10.0)
    with pytest.raises(ValueError, match=r"bias has shape \(5,\): expected a number or \(\)"):
        SigLipLoss()(x, y, 10.0, torch.zeros(5))


def of_a_share(rank):
    """Loss and gradients by open_clip's module and by ours, of 6 of 12 rows."""
    found = []
    for loss in (open_clip_losses().SigLipLoss, SigLipLoss):
        x, y = (t[6 * rank : 6 * rank + 6].clone().requires_grad_() for t in towers(Shape(12, 12, 7), torch.float64))
        scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (9.0, -4.0))
        value = loss(rank=rank, world_size=2)(x, y, scale, bias)
        value.backward()
        found.append([value.detach(), x.grad, y.grad, scale.grad, bias.grad])
    return found


@pytest.mark.slow
def test_in_two_processes_losses_and_gradients_average_to_open_clips(tmp_path):
    theirs, ours = zip(*in_processes(2, of_a_share, tmp_path), strict=True)
    for number in (0, 3, 4):  # of all rows
        mean = torch.stack([share[number] for share in theirs]).mean(0)
        torch.testing.assert_close(torch.stack([share[number] for share in ours]).mean(0), mean)
    for number in (1, 2):  # of own rows
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine[number], other[number])
