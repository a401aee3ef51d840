"""Retrieval measures over all pairs, without the N x M matrix."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from contrastile import backends, formulas
from contrastile.distributed import Group
from contrastile.distributed.losses import share
from contrastile.validation import Groups, check_pairs

__all__ = ["recall_at_k", "retrieval_ranks"]


def retrieval_ranks(
    x: Tensor,
    y: Tensor,
    positives: Tensor | None = None,
    *,
    groups: Groups | None = None,
    group: Group | None = None,
    backend: str | None = None,
) -> Tensor:
    """Number of negatives whose inner product with x_i is strictly larger than the positive's: 0 is retrieved first.

    Ties count for the positive, so an encoder that has collapsed to one point has rank 0 in every row.

    Args:
        x: queries, (N, D), float16, bfloat16, float32 or float64. y: candidates, (M, D), dtype and device of x.
        positives: (N,) integers, the column of each row's positive, default arange(N); several rows may share one.
        groups: (row_ids (N,), col_ids (M,)), integers: a pair of equal ids other than the positive is not ranked.
        group: process group whose processes hold queries and candidates of a larger set, each query's positive among
            its own candidates: ranks of own queries among all candidates, which are gathered.
        backend: name of a backend instead of the automatic choice.

    Returns:
        (N,) int64, without gradient. Inner products are accumulated in float32, in float64 for float64 inputs.
        A comparison with NaN counts as larger: a row whose positive is NaN has rank M.

    Raises:
        ValueError, TypeError, RuntimeError: as `info_nce` does.
    """
    if group is not None:
        shared = share(
            "retrieval_ranks",
            lambda: (check_pairs(x, y, 1.0, positives, groups, both_directions=False, may_be_empty=True), None),
            group,
            "gather",
            backend,
        )
        with torch.no_grad():
            return formulas.retrieval_ranks_forward(shared.inputs, shared.sweeps)
    inputs = check_pairs(x, y, 1.0, positives, groups, both_directions=False)
    name = backends.resolve(backend, inputs.x.device.type, inputs.x.dtype)
    with torch.no_grad():
        if torch.compiler.is_compiling():
            ranks: Tensor = torch.ops.contrastile.retrieval_ranks(*inputs, name)
            return ranks
        return formulas.retrieval_ranks_forward(inputs, name)


def recall_at_k(ranks: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Share of rows whose positive is among the k retrieved first, for each k.

    Args:
        ranks: (N,) integers as `retrieval_ranks` returns them.
        ks: whole numbers of retrieved candidates, each at least 1.

    Raises:
        ValueError: ranks is not (N,) with N >= 1, or a k is no whole number of at least 1.
        TypeError: ranks are no tensor of integers.
    """
    if not isinstance(ranks, Tensor):
        raise TypeError(f"ranks is {type(ranks).__name__}: expected a tensor of integers")
    if ranks.dtype.is_floating_point or ranks.dtype == torch.bool:
        raise TypeError(f"ranks is {ranks.dtype}: expected integers")
    if ranks.dim() != 1 or ranks.shape[0] == 0:
        raise ValueError(f"ranks has shape {tuple(ranks.shape)}: expected (N,) with N >= 1")
    if not all(isinstance(k, Integral) and k >= 1 for k in ks):
        raise ValueError(f"ks is {tuple(ks)}: expected whole numbers of at least 1")
    return {k: (ranks < k).double().mean().item() for k in ks}
