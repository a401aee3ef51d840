"""Losses of each row by itself: the pass over rows, its autograd function, and the choice of what runs it.

    float32, float64   the forward reads the inputs once and writes all gradients, which the backward only scales
    16 bits, or one    the forward reads the inputs, the backward reads them again and writes gradients in 16 bits:
    loss a row         less traffic than gradients in float32 that are rounded afterwards

In a graph that is being compiled the same formulas are traced instead, for the compiler to fuse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrastile import backends
from contrastile.autograd import Saved, differentiable_once
from contrastile.backends import eager_rows, rows
from contrastile.backends.rows import BridgeDistance, DotProducts, RowKind
from contrastile.formulas import outside_autocast
from contrastile.validation import accumulation_dtype

__all__ = ["BridgeDistance", "DotProducts", "row_pass"]


def row_pass(kind: RowKind, inputs: tuple[Tensor, ...], gain: Tensor, reduction: str, backend: str | None) -> Tensor:
    """gain_j times the value of row j, summed, (), or for reduction "none" by row, (N,).

    inputs are checked, (N, D) each; gain, (N,) in the accumulation dtype, gets no gradient.
    """
    name = backends.resolve(backend, inputs[0].device.type, inputs[0].dtype)
    if torch.compiler.is_compiling():
        dtype = accumulation_dtype(inputs[0].dtype)
        values = gain * eager_rows.values_of(kind, tuple(part.to(dtype) for part in inputs))
        return values if reduction == "none" else values.sum()
    apply: Any = RowPassFunction.apply
    found: Tensor = apply(*inputs, kind, gain, reduction, name)
    return found


class RowPassFunction(torch.autograd.Function):
    """apply(*inputs, kind, gain, reduction, backend) -> gained values, summed or by row."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *inputs, kind, gain, reduction, ctx.backend = arguments
        ctx.kind, ctx.by_row, ctx.formed = kind, reduction == "none", None
        ctx.wants = tuple(ctx.needs_input_grad[: len(inputs)])
        dtype = accumulation_dtype(inputs[0].dtype)
        ctx.save_for_backward(*inputs, gain)
        forms = any(ctx.wants) and inputs[0].dtype == dtype and not ctx.by_row
        wants = ctx.wants if forms else (False,) * len(inputs)
        values, gradients = rows.run(ctx.backend, kind, tuple(inputs), gain, wants)
        if forms:
            ctx.formed = gradients
        gained: Tensor = gain * values
        return gained if ctx.by_row else gained.sum()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, gain = saved
        gradients, ctx.formed = ctx.formed, None
        if gradients is None:
            _, gradients = rows.run(ctx.backend, ctx.kind, tuple(inputs), gain * upstream, ctx.wants)
        elif upstream.device.type != "cpu" or upstream.item() != 1:  # the usual case: spares a pass over them
            gradients = tuple(None if g is None else g.mul_(upstream) for g in gradients)
        return (*gradients, None, None, None, None)


def unit_gain(like: Tensor, value: float) -> Tensor:
    """(N,): value for every row; 1 / N makes the summed values a mean."""
    with outside_autocast(like.device):
        return torch.full((len(like),), value, dtype=accumulation_dtype(like.dtype), device=like.device)
