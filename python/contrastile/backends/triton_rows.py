"""The last pass over the rows of dX and dY, which the Triton backend can leave for when all their factors are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from contrastile.backends.triton_sweep import interpreting, launch_options, on_device
from contrastile.kernels.rows import finish_rows_kernel
from contrastile.pairs import FinishedRows

ENTRIES = 1024  # that a program holds at a time; with twice as many some forms spill
MOST_FEATURES = 256  # of them, of one row
ROW_OPTIONS = launch_options(num_warps=4, num_stages=1)


@dataclass(frozen=True)
class RowSums:
    """dX and dY as the sweeps leave them, contiguous and float32."""

    dx: Tensor | None  # (N, D)
    dy: Tensor | None  # (M, D)
    wants_dx: bool  # and not its moment alone
    wants_moment: bool
    self_similarity: bool
    factor: Tensor | None = None  # (1,) float32 that both are to be multiplied with
    row_factors: Tensor | None = None  # (N,) likewise, the rows of dX alone

    def finish(self, anchors: Tensor, upstream: Tensor | None, dtype: torch.dtype, *, joined: bool) -> FinishedRows:
        factor = self.factor if upstream is None else upstream if self.factor is None else self.factor * upstream
        other = self.dy if joined else None
        dx = dy = moments = None
        if self.dx is not None:
            dx = _place_for(self.dx, dtype) if self.wants_dx else None
            moments = self.dx.new_empty(len(self.dx)) if self.wants_moment else None
            _finish(self.dx, self.row_factors, other, factor, anchors, dx, moments)
        if self.dy is not None and not joined:
            dy = _place_for(self.dy, dtype)
            _finish(self.dy, None, None, factor, None, dy, None)
        if moments is not None and self.self_similarity:
            moments.div_(2)  # One triangle: C holds every pair from both its ends, the loss once.
        return FinishedRows(dx, dy, moments)


def _place_for(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums' own where their dtype is right, to need no second buffer of their size."""
    return sums if sums.dtype == dtype else torch.empty_like(sums, dtype=dtype)


def _finish(
    sums: Tensor,
    row_factors: Tensor | None,
    other_sums: Tensor | None,
    factor: Tensor | None,
    embeddings: Tensor | None,
    gradient: Tensor | None,
    moments: Tensor | None,
) -> None:
    is_finished = gradient is sums and row_factors is None and other_sums is None and factor is None
    if is_finished:
        gradient = None
    if gradient is None and moments is None:
        return
    rows, depth = sums.shape
    constants = row_constants(depth)
    with on_device(sums.device):
        finish_rows_kernel[(triton.cdiv(rows, constants["BLOCK_ROWS"]),)](
            sums,
            row_factors,
            other_sums,
            factor,
            None if moments is None else embeddings,
            *((0, 0) if embeddings is None else embeddings.stride()),
            gradient,
            moments,
            rows,
            **constants,
            EMULATE_BF16=interpreting() and gradient is not None and gradient.dtype == torch.bfloat16,
            **ROW_OPTIONS,
        )


def row_constants(depth: int) -> dict[str, Any]:
    block_depth = int(min(MOST_FEATURES, triton.next_power_of_2(depth)))
    return {"DEPTH": depth, "BLOCK_ROWS": ENTRIES // block_depth, "BLOCK_DEPTH": block_depth}
