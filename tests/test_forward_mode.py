"""Forward-mode differentiation is refused, not dropped."""

from __future__ import annotations

import contrastile as ct
import pytest
import torch
from contrastile import reference
from support import BACKENDS_HERE, Shape, scalar, towers, unit_rows
from torch.autograd import forward_ad

X, Y = towers(Shape(6, 6, 8))
SCALE, BIAS = scalar(5.0), scalar(-1.0)
SHARED = unit_rows(4, 8)
LOSSES = {
    "info_nce": lambda m, x, y, s, **b: m.info_nce(x, y, s, **b),
    "nt_xent": lambda m, x, y, s, **b: m.nt_xent(torch.cat([x, y]), s, **b),
    "siglip": lambda m, x, y, s, **b: m.siglip(x, y, s, -1.0, **b),
    "gamma": lambda m, x, y, s, **b: m.gamma_contrastive(x, y, s, -Y[:, 0], **b).loss,
    "log_normalizers": lambda m, x, y, s, **b: m.log_normalizers(x, y, s, **b)[0],
    "smoothed": lambda m, x, y, s, **b: m.info_nce(x, y, s, label_smoothing=0.1, **b),
    "directional": lambda m, x, y, s, **b: m.directional_info_nce(x, y, s, **b),
}


def dual(tensor: torch.Tensor) -> torch.Tensor:
    return forward_ad.make_dual(tensor, torch.ones_like(tensor))


@pytest.mark.parametrize("which", ["x", "y", "scale"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_a_tangent_is_refused_and_not_dropped(backend, loss, which):
    with forward_ad.dual_level():
        inputs = [dual(t) if name == which else t for name, t in (("x", X), ("y", Y), ("scale", SCALE))]
        assert forward_ad.unpack_dual(LOSSES[loss](reference, *inputs)).tangent is not None
        with pytest.raises(NotImplementedError, match="jvp"):
            LOSSES[loss](ct, *inputs, backend=backend)
        assert forward_ad.unpack_dual(LOSSES[loss](ct, X, Y, SCALE, backend=backend)).tangent is None


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_a_tangent_of_the_bias_and_of_shared_hard_negatives_is_refused_too(backend):
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="jvp"):
            ct.siglip(X, Y, SCALE, dual(BIAS), backend=backend)
        with pytest.raises(NotImplementedError, match="jvp"):
            ct.info_nce(X, Y, SCALE, hard_negatives=dual(SHARED), backend=backend)
