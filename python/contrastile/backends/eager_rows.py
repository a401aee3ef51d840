"""The pass over rows in PyTorch, in chunks that fit the workspace."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastile.backends import workspace_bytes
from contrastile.backends.rows import BridgeDistance, Gradients, RowKind
from contrastile.validation import accumulation_dtype


def run(kind: RowKind, inputs: tuple[Tensor, ...], gain: Tensor, values: Tensor, gradients: Gradients) -> None:
    """Writes values and the gradients that are not None: see `rows.run`."""
    dtype = accumulation_dtype(inputs[0].dtype)
    size = max(1, workspace_bytes() // (12 * inputs[0].shape[1] * dtype.itemsize))
    for first in range(0, len(gain), size):
        rows = slice(first, first + size)
        chunk = tuple(part[rows].to(dtype) for part in inputs)
        kind_here = BridgeDistance(kind.time[rows]) if isinstance(kind, BridgeDistance) else kind
        values[rows] = values_of(kind_here, chunk)
        if any(gradient is not None for gradient in gradients):
            found = _gradients_of(kind_here, chunk, gain[rows, None])
            for gradient, part in zip(gradients, found, strict=True):
                if gradient is not None:
                    gradient[rows] = part


def values_of(kind: RowKind, inputs: tuple[Tensor, ...]) -> Tensor:
    """Values by row, differentiable."""
    if isinstance(kind, BridgeDistance):
        return _residual(kind, *inputs)[0].square().sum(1)
    first, second = _products(*inputs)
    if kind.difference:
        return (first - second).square()[:, 0]
    return (first.square() + second.square())[:, 0]


def _gradients_of(kind: RowKind, inputs: tuple[Tensor, ...], gain: Tensor) -> tuple[Tensor, ...]:
    if isinstance(kind, BridgeDistance):
        residual, direction, inverse = _residual(kind, *inputs)
        d_aug = 2 * gain * residual
        # The mean's direction has no part along itself; the residual's is what rounding leaves small.
        along = (residual * direction).sum(1, keepdim=True)
        d_mean = (residual - direction * along) * (-2 * gain * inverse)
        time = kind.time[:, None]
        return d_aug, time * d_mean, (1 - time) * d_mean
    x1, y1, x2, y2 = inputs
    first, second = _products(*inputs)
    if kind.difference:
        first, second = first - second, second - first
    first, second = 2 * gain * first, 2 * gain * second
    return first * y1, first * x1, second * y2, second * x2


def _residual(kind: BridgeDistance, aug: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a - m / |m|, m / |m| and 1 / |m|, the latter two 0 where m is."""
    time = kind.time[:, None]
    mean = time * v + (1 - time) * t
    square = mean.square().sum(1, keepdim=True)
    is_zero = square == 0
    inverse = torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, square).rsqrt())
    direction = mean * inverse
    return aug - direction, direction, inverse


def _products(x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
    return (x1 * y1).sum(1, keepdim=True), (x2 * y2).sum(1, keepdim=True)
