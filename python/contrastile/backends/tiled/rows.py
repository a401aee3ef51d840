"""The last pass over the rows of dX and dY, which a backend can leave for when all their factors are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from contrastile.backends.tiled.launches import Kernels
from contrastile.kernels.arguments import RowPass
from contrastile.pairs import FinishedRows


@dataclass(frozen=True)
class RowSums:
    """dX and dY as the sweeps leave them, contiguous and float32."""

    kernels: Kernels
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
            self._finish(RowPass(self.dx, self.row_factors, other, factor, anchors, dx, moments))
        if self.dy is not None and not joined:
            dy = _place_for(self.dy, dtype)
            self._finish(RowPass(self.dy, None, None, factor, None, dy, None))
        if moments is not None and self.self_similarity:
            moments.div_(2)  # One triangle: C holds every pair from both its ends, the loss once.
        return FinishedRows(dx, dy, moments)

    def _finish(self, rows: RowPass) -> None:
        is_finished = rows.gradient is rows.sums and all(
            part is None for part in (rows.row_factors, rows.other_sums, rows.factor)
        )
        if is_finished:
            rows = rows._replace(gradient=None)
        if rows.moments is None:
            rows = rows._replace(embeddings=None)
        if rows.gradient is not None or rows.moments is not None:
            self.kernels.finish_rows(rows)


def _place_for(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums' own where their dtype is right, to need no second buffer of their size."""
    return sums if sums.dtype == dtype else torch.empty_like(sums, dtype=dtype)
