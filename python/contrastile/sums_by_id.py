"""How many columns have another id than a row, and their sum: O((N + M) (log M + D)), no pair is looked at."""

from __future__ import annotations

import torch
from torch import Tensor


def number_of_others(row_ids: Tensor, col_ids: Tensor) -> Tensor:
    """Of each row (N,), the columns (M,) of another id; (N,) int64."""
    first, end = _own_of_sorted(row_ids, col_ids.sort().values)
    return len(col_ids) - (end - first)


class SumsOfOthers:
    """Columns (M, D), for sums of those of another id than a row's: sorted once, for any rows.

    Sums come from both ends of the sorted columns: nothing is subtracted, so that a row without others has exactly 0.
    """

    def __init__(self, col_ids: Tensor, columns: Tensor) -> None:
        self.sorted_ids, order = col_ids.sort(stable=True)
        ordered = columns[order]
        nothing = ordered.new_zeros(1, ordered.shape[1])
        self.before = torch.cat([nothing, ordered.cumsum(0)])
        self.behind = torch.cat([ordered.flip(0).cumsum(0).flip(0), nothing])

    def of(self, row_ids: Tensor) -> Tensor:
        """Row ids (N,) -> (N, D)."""
        first, end = _own_of_sorted(row_ids, self.sorted_ids)
        return self.before[first] + self.behind[end]


def _own_of_sorted(row_ids: Tensor, sorted_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the end of each row's own id."""
    return torch.searchsorted(sorted_ids, row_ids), torch.searchsorted(sorted_ids, row_ids, right=True)
