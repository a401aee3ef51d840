"""How many columns have another id than a row, and their sum: O((N + M) (log M + D)), no pair is looked at."""

from __future__ import annotations

import torch
from torch import Tensor


def number_of_others(row_ids: Tensor, col_ids: Tensor) -> Tensor:
    """Of each row (N,), the columns (M,) of another id; (N,) int64."""
    first, end = _own_of_sorted(row_ids, col_ids.sort().values)
    return len(col_ids) - (end - first)


def sum_of_others(row_ids: Tensor, col_ids: Tensor, columns: Tensor) -> Tensor:
    """Sum of the columns (M, D) of another id than the row's, (N, D).

    From both ends of the sorted columns: nothing is subtracted, so that a row without others has exactly 0.
    """
    sorted_ids, order = col_ids.sort(stable=True)
    first, end = _own_of_sorted(row_ids, sorted_ids)
    ordered = columns[order]
    nothing = ordered.new_zeros(1, ordered.shape[1])
    before = torch.cat([nothing, ordered.cumsum(0)])
    behind = torch.cat([ordered.flip(0).cumsum(0).flip(0), nothing])
    return before[first] + behind[end]


def _own_of_sorted(row_ids: Tensor, sorted_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the end of each row's own id."""
    return torch.searchsorted(sorted_ids, row_ids), torch.searchsorted(sorted_ids, row_ids, right=True)
