"""Starts a Triton kernel without asking Triton again for what it has answered before.

`kernel[grid](...)` finds the compiled form of a kernel anew at every launch, from each of some 40 arguments. That takes
the host longer than many a launch takes the device. What the choice depends on is little, and is what the key here is
made of: dtypes, which pointers are aligned, which numbers are 1 or multiples of 16 or too large for 32 bits, which
arguments there are, and the constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from contrastile.kernels.plans import TilePlan

ALIGNMENT = 16  # bytes of a pointer, and what Triton divides numbers by

_compiled: dict[tuple[Any, ...], Any] = {}


def start(
    kernel: Any,
    programs: int,
    arguments: Sequence[Any],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
    device: torch.device,
    known_forms: tuple[Any, ...] = (),
) -> None:
    """On the current stream of the device, which is current. Constants are the last parameters of the kernel;
    `known_forms` are those of the first arguments, where they were found before.
    """
    grid = (programs, 1, 1)
    if device.type != "cuda" or torch.version.hip:  # interpreted; or by the sizes of tensors too
        kernel[grid](*arguments, **constants, **options)
        return
    forms = (*known_forms, *map(form, arguments[len(known_forms) :]))
    key = (kernel, device.index, forms, *constants.values(), *options.values())
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*arguments, **constants, **options)
    else:
        compiled[grid](*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :]))


def form(value: Any) -> Any:
    """What Triton compiles a kernel anew for. Equal forms share a compiled kernel; the reverse need not hold."""
    if value is None:
        return None
    if isinstance(value, float):
        return float
    if isinstance(value, int):
        return value == 1 or (value % ALIGNMENT == 0, value.bit_length() > 31)
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % ALIGNMENT == 0
    if isinstance(value, tuple):
        return tuple([form(part) for part in value])
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, tuple(value.block_shape)
    raise TypeError(f"kernels take tensors, numbers and tuples of them, got {type(value).__name__}")


def blocks_of(anchors: Any, candidates: Any, plan: TilePlan) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Tensor descriptors of both, where the plan has them. They are arguments of their own: up to Triton 3.6 a kernel
    with a descriptor in a tuple compiles, and its launch fails.
    """
    if not plan.descriptors:
        return None, None
    return (
        TensorDescriptor.from_tensor(anchors, [plan.block_rows, plan.block_depth]),
        TensorDescriptor.from_tensor(candidates, [plan.block_cols, plan.block_depth]),
    )
