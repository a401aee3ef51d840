"""Checks of what losses are given that keep something for every sample: both sides of the pairs, and their index."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastile.validation import INTEGER_DTYPES


def check_sides(x: Tensor, y: Tensor) -> None:
    """(B, D) each.

    Raises:
        TypeError, ValueError: they are not.
    """
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError(f"x is {type(x).__name__} and y is {type(y).__name__}: expected tensors")
    if x.dim() != 2 or x.shape[:1] != y.shape[:1]:
        raise ValueError(f"x is {tuple(x.shape)} but y is {tuple(y.shape)}: expected (B, D) each, a row per sample")


def check_index(index: Tensor, x: Tensor, num_samples: int | None) -> Tensor:
    """index (B,) as int64, of rows x (B, D); within num_samples, if given, which is looked at on a CPU only.

    Raises:
        TypeError: it holds no integers.
        ValueError: it has another length or device, or leaves its range.
    """
    if not isinstance(index, Tensor) or index.dtype not in INTEGER_DTYPES:
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index is {kind}: expected an integer tensor of shape ({x.shape[0]},)")
    if index.shape != x.shape[:1]:
        raise ValueError(f"index has shape {tuple(index.shape)}: expected ({x.shape[0]},), one entry per row of x")
    if index.device != x.device:
        raise ValueError(f"index is on {index.device}, the embeddings are on {x.device}")
    if num_samples is not None and index.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(end) for end in index.aminmax()) if len(index) else (0, 0)
        if low < 0 or high >= num_samples:
            raise ValueError(
                f"index runs from {low} to {high}, but num_samples is {num_samples}: "
                f"expected entries from 0 to {num_samples - 1}"
            )
    return index.long()
