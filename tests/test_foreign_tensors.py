"""Tensors that are not plain ones, and modes that change what PyTorch does: refused by name, or the plain result."""

from __future__ import annotations

import warnings

import contrastile as ct
import pytest
import torch
import torch.distributed as dist
from contrastile import reference
from support import Shape, scalar, towers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor

X, Y = towers(Shape(6, 6, 8))
SCALE = scalar(5.0)
VIEWS = torch.arange(6).roll(3)
LOSSES = {
    "info_nce": lambda x, y, s, **b: ct.info_nce(x, y, s, **b),
    "one direction": lambda x, y, s, **b: ct.info_nce(x, y, s, symmetric=False, **b),
    "nt_xent": lambda x, y, s, **b: ct.nt_xent(x, s, **b),
    "siglip": lambda x, y, s, **b: ct.siglip(x, y, s, -1.0, **b),
    "gamma": lambda x, y, s, **b: ct.gamma_contrastive(x, y, s, -Y[:, 0], **b).loss,
    "log_normalizers": lambda x, y, s, **b: ct.log_normalizers(x, y, s, **b)[0],
    "smoothed": lambda x, y, s, **b: ct.info_nce(x, y, s, label_smoothing=0.1, **b),
    "margin": lambda x, y, s, **b: ct.info_nce(x, y, s, false_negative_margin=0.1, **b),
    "retrieval_ranks": lambda x, y, s, **b: ct.retrieval_ranks(x, y, **b),
}


@pytest.fixture
def distribute():
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    mesh = init_device_mesh("cpu", (1,))
    yield lambda tensor: distribute_tensor(tensor, mesh, [Replicate()])
    dist.destroy_process_group()


# Without memory of their own


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "margin"])  # refused by PyTorch before
def test_a_dtensor_is_refused_by_name_and_not_read_at_address_0(distribute, loss):
    x, y, scale = (distribute(t) for t in (X, Y, SCALE))
    with pytest.raises(TypeError, match=r"x is a DTensor, which has no memory of its own: expected a plain tensor"):
        LOSSES[loss](x, y, 5.0, backend="cpu")
    if loss == "info_nce":
        with pytest.raises(TypeError, match=r"scale is a DTensor, which has no memory"):
            ct.info_nce(X, Y, scale, backend="cpu")
        local = ct.info_nce(x.to_local(), y.full_tensor(), scale.to_local(), backend="cpu")
        assert torch.equal(local, ct.info_nce(X, Y, SCALE, backend="cpu"))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_fake_tensor_is_refused_by_name():
    with FakeTensorMode() as mode, pytest.raises(TypeError, match=r"x is a FakeTensor, which has no memory of its own"):
        ct.info_nce(mode.from_tensor(X), mode.from_tensor(Y), 5.0, backend="cpu")


def test_a_masked_tensor_is_refused_by_name():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says PyTorch
        masked = masked_tensor(Y, torch.ones_like(Y, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"y is a MaskedTensor, which has no memory of its own"):
        ct.info_nce(X, masked, 5.0, backend="cpu")


# Modes


@pytest.mark.parametrize("loss", LOSSES)
def test_results_are_where_the_inputs_are_whatever_the_default_device(loss):
    x = X.clone().requires_grad_()
    expected = LOSSES[loss](X, Y, SCALE, backend="cpu")
    with torch.device("meta"):
        assert torch.equal(LOSSES[loss](X, Y, SCALE, backend="cpu"), expected)
        found = LOSSES[loss](x, Y, SCALE, backend="cpu")
        if found.requires_grad:
            found.sum().backward()
            assert x.grad.isfinite().all()


def test_checks_of_given_views_are_where_the_inputs_are_whatever_the_default_device():
    expected = ct.nt_xent(X, SCALE, positives=VIEWS, backend="cpu")
    with torch.device("meta"):
        assert torch.equal(ct.nt_xent(X, SCALE, positives=VIEWS, backend="cpu"), expected)


def test_the_dense_directional_loss_is_where_the_inputs_are_whatever_the_default_device():
    expected = reference.directional_info_nce(X, Y, SCALE)
    with torch.device("meta"):
        assert torch.equal(reference.directional_info_nce(X, Y, SCALE), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("loss", LOSSES)
def test_jit_trace_is_refused_and_records_no_uninitialised_result(loss):
    with pytest.raises(RuntimeError, match=r"use torch\.export or torch\.compile"):
        torch.jit.trace(lambda x, y: LOSSES[loss](x, y, 5.0), (X, Y), check_trace=False)
