"""The pass over rows that no pair leaves: what it is given, what it gives back, and who does it.

    BridgeDistance   inputs a, v, t:         |a - m / |m||^2 with m = time v + (1 - time) t; where m is 0, or its square
                                             less than a GPU tells from 0 (2^-126), |a|^2
    DotProducts      inputs x1, y1, x2, y2:  <x1, y1>^2 + <x2, y2>^2, or (<x1, y1> - <x2, y2>)^2

by row, and the gradient of sum_j gain_j value_j in each input. It is beside the sweeps of pairs.py because it touches
no pair: O(N D), bound by memory.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class BridgeDistance:
    time: Tensor  # (N,), accumulation dtype


@dataclass(frozen=True)
class DotProducts:
    difference: bool


RowKind = BridgeDistance | DotProducts
Gradients = tuple[Tensor | None, ...]

# Backends with a row pass of their own. The compiled CUDA kernels have none: PyTorch's operations serve there.
MODULES = {"cpu": "cpu_rows", "triton": "triton_rows"}


def run(
    backend: str, kind: RowKind, inputs: tuple[Tensor, ...], gain: Tensor, wants: tuple[bool, ...]
) -> tuple[Tensor, Gradients]:
    """Values (N,), accumulation dtype and without the gain, and the gradients that are wanted, in the inputs' dtype.

    inputs: (N, D) each, one dtype and device, any strides. gain: (N,), accumulation dtype.
    """
    module: Any = importlib.import_module(f"contrastile.backends.{MODULES.get(backend, 'eager_rows')}")
    inputs = tuple(part if part.stride(1) == 1 else part.contiguous() for part in inputs)
    gain = gain.contiguous()
    values = torch.empty_like(gain)
    gradients = tuple(
        torch.empty_like(part, memory_format=torch.contiguous_format) if want else None
        for part, want in zip(inputs, wants, strict=True)
    )
    module.run(kind, inputs, gain, values, gradients)
    return values, gradients
