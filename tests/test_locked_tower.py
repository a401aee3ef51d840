"""A tower without gradients (LiT): no sweep of any loss forms its gradient, and none multiplies for it."""

from __future__ import annotations

import contrastile as ct
import pytest
import torch
from contrastile import backends
from contrastile.pairs import SoftmaxWeights
from support import BACKENDS_HERE, Shape, scalar, towers, unit_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SHAPE = Shape(40, 40, 16)
HARD = unit_rows(120, 16).reshape(40, 3, 16)
SHARED = unit_rows(30, 16)
LOG_WEIGHTS = torch.full((40,), -4.0)
LOSSES = {
    "info_nce": lambda x, y, s, b: ct.info_nce(x, y, s, backend=b),
    "info_nce none": lambda x, y, s, b: ct.info_nce(x, y, s, reduction="none", backend=b).sum(),
    "one direction": lambda x, y, s, b: ct.info_nce(x, y, s, symmetric=False, backend=b),
    "gamma": lambda x, y, s, b: ct.gamma_contrastive(x, y, s, LOG_WEIGHTS, LOG_WEIGHTS, backend=b).loss,
    "gamma rows": lambda x, y, s, b: ct.gamma_contrastive(x, y, s, LOG_WEIGHTS, cap=False, backend=b).loss,
    "siglip": lambda x, y, s, b: ct.siglip(x, y, s, -4.0, backend=b),
    "siglip none": lambda x, y, s, b: ct.siglip(x, y, s, -4.0, reduction="none", backend=b).sum(),
    "log_normalizers": lambda x, y, s, b: sum(t.sum() for t in ct.log_normalizers(x, y, s, backend=b)),
    "options": lambda x, y, s, b: ct.info_nce(x, y, s, hard_negatives=HARD, prior=0.1, label_smoothing=0.1, backend=b),
    "shared": lambda x, y, s, b: ct.info_nce(x, y, s, hard_negatives=SHARED, symmetric=False, backend=b),
    "directions": lambda x, y, s, b: ct.directional_info_nce(x, y, s, directions=("xy", "yx", "yy"), backend=b),
    "matryoshka": lambda x, y, s, b: ct.matryoshka(ct.info_nce, x, y, dims=(4, 16), scale=s, backend=b),
    "clip": lambda x, y, s, b: ct.ClipLoss(backend=b)(x, y, s),
    "nt_xent with a bank": lambda x, y, s, b: ct.NTXentLoss(0.5, (30, 16), backend=b)(x, y),
    "four ways": lambda x, y, s, b: ct.four_way_contrastive(x, y, x, y, s, backend=b),
}


# Of N x M x D, forward and backward of all gradients; logits that fit into the workspace are not formed twice.
PRODUCTS = {"info_nce": 3, "one direction": 3, "gamma": 3, "siglip": 3, "log_normalizers": 4, "options": 4}


class Products(TorchDispatchMode):
    """Counts multiply-adds of PyTorch's matrix products, those into a given matrix too."""

    multiply_adds = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = [arg for arg in args if isinstance(arg, Tensor)][-2:]
            self.multiply_adds += left.numel() * right.shape[1]
        return func(*args, **(kwargs or {}))


class Recorder:
    """A backend that keeps what its gradient sweeps were asked and gave."""

    def __init__(self, backend):
        self.backend, self.sweeps = backend, []
        self.positive_logits, self.pair_stats = backend.positive_logits, backend.pair_stats

    def pair_grad(self, problem, weights, needs):
        found = self.backend.pair_grad(problem, weights, needs)
        self.sweeps.append((problem, weights, needs, found))
        return found


@pytest.mark.parametrize("locked", ["x", "y"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_no_sweep_forms_the_gradient_of_a_locked_tower(backend, loss, locked, monkeypatch):
    if loss == "nt_xent with a bank" and locked == "x":
        pytest.skip("lightly's bank is of out1 alone")
    recorder = Recorder(backends.get(backend))
    monkeypatch.setattr(backends, "get", lambda name: recorder)
    x, y = towers(SHAPE)
    (y if locked == "x" else x).requires_grad_()
    LOSSES[loss](x, y, scalar(9.0), backend).backward()
    assert recorder.sweeps
    held = (x if locked == "x" else y).data_ptr()
    for problem, _, needs, found in recorder.sweeps:
        sides = ((problem.anchors, needs.dx, found.dx), (problem.candidates, needs.dy, found.dy))
        for rows, asked, given in sides:
            if rows.data_ptr() == held:
                assert not asked
                assert given is None


@pytest.mark.skipif("eager" not in BACKENDS_HERE, reason="products are PyTorch's, and counted, in the eager backend")
@pytest.mark.parametrize("loss", PRODUCTS)
def test_a_locked_tower_takes_one_product_less(loss):
    def products(locked: bool) -> float:
        x, y = towers(SHAPE)
        x.requires_grad_()
        y.requires_grad_(not locked)
        with Products() as counter:
            LOSSES[loss](x, y, scalar(9.0), "eager").backward()
        return counter.multiply_adds / (SHAPE.rows * SHAPE.cols * SHAPE.dim)

    assert products(locked=False) == products(locked=True) + 1 == PRODUCTS[loss]


@pytest.mark.parametrize("weights", ["given", "softmax"])
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_a_sweep_that_is_not_asked_leaves_no_room_for_it(backend, weights, monkeypatch):
    """Whatever is multiplied has somewhere to go: the compiled sweeps get no address for dY."""
    recorder = Recorder(backends.get(backend))
    monkeypatch.setattr(backends, "get", lambda name: recorder)
    x, y = towers(SHAPE)
    LOSSES["gamma" if weights == "given" else "info_nce"](x.requires_grad_(), y, scalar(9.0), backend).backward()
    [(_, asked, needs, found)] = recorder.sweeps
    assert isinstance(asked, SoftmaxWeights) == (weights == "softmax")
    assert (needs.dx, needs.dy) == (True, False)
    assert found.dy is None
