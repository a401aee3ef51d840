"""For each own row the sum of all processes' columns of another id: ids travel, and sums by row, but no columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrastile.distributed.plans import Columns, Plan, Sums
from contrastile.sums_by_id import SumsOfOthers


def sum_of_all_others(row_ids: Tensor, col_ids: Tensor, columns: Tensor, of_rows: Plan, of_cols: Plan) -> Tensor:
    """`contrastile.sums_by_id.SumsOfOthers` over a group: rows (N,) and columns (M, D) are this process's; (N, D).

    The gradient is that of the sum of all processes' results: all of them call backward.

    Args:
        of_rows, of_cols: plans for as many columns as there are rows, and as there are columns, in each process.
    """
    apply: Any = _SumOfOthersFunction.apply
    total: Tensor = apply(columns, row_ids, col_ids, of_rows, of_cols)
    return total


class _SumOfOthersFunction(torch.autograd.Function):
    """Linear in the columns, and its own transpose with rows and columns changed over."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, row_ids: Tensor, col_ids: Tensor, of_rows: Plan, of_cols: Plan) -> Tensor:
        ctx.save_for_backward(row_ids, col_ids)
        ctx.plans = of_rows, of_cols
        sums = SumsOfOthers(col_ids, columns)

        def visit(block: Columns, own_at: int | None) -> Sums:
            return Sums(grad=sums.of(block["ids"]))

        total = of_rows.lap(of_rows.hold({"ids": row_ids}), {}, visit, "candidates").grad
        assert total is not None
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        row_ids, col_ids = ctx.saved_tensors
        of_rows, of_cols = ctx.plans
        return sum_of_all_others(col_ids, row_ids, upstream, of_cols, of_rows), None, None, None, None
