"""The pass over rows by Triton: launches of kernels/row_losses.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from contrastile.backends.rows import BridgeDistance, Gradients, RowKind
from contrastile.backends.triton_launches import interpreting, launch_options, on_device
from contrastile.backends.triton_start import start
from contrastile.kernels.row_losses import bridge_rows_kernel, dot_product_rows_kernel

ENTRIES = 1024  # of each input, that a program holds at least
ENTRIES_OF_A_WARP = 512
MOST_WARPS = 16


def run(kind: RowKind, inputs: tuple[Tensor, ...], gain: Tensor, values: Tensor, gradients: Gradients) -> None:
    """Writes values and the gradients that are not None: see `rows.run`."""
    count, depth = inputs[0].shape
    constants, options = row_launch(depth)
    constants["EMULATE_BF16"] = interpreting() and inputs[0].dtype == torch.bfloat16
    strides = tuple(part.stride(0) for part in inputs)
    arguments: tuple[Any, ...] = (gain, values, gradients, count)
    if isinstance(kind, BridgeDistance):
        kernel, arguments = bridge_rows_kernel, (inputs, strides, kind.time.contiguous(), *arguments)
    else:
        kernel, arguments = dot_product_rows_kernel, (inputs, strides, *arguments)
        constants["DIFFERENCE"] = kind.difference
    with on_device(gain.device):
        start(kernel, triton.cdiv(count, constants["BLOCK_ROWS"]), arguments, constants, options, gain.device)


def row_launch(depth: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of a launch for rows of so many features."""
    block_depth = int(triton.next_power_of_2(depth))
    block_rows = max(1, ENTRIES // block_depth)
    warps = min(MOST_WARPS, block_rows * block_depth // ENTRIES_OF_A_WARP)
    constants = {"DEPTH": depth, "BLOCK_ROWS": block_rows, "BLOCK_DEPTH": block_depth}
    return constants, launch_options(warps, num_stages=1)
