"""Losses over prefixes of the features (Matryoshka representation learning)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from contrastile.functional import info_nce
from contrastile.functional_prefixes import SWEPT, fits, info_nce_over_prefixes
from contrastile.validation import accumulation_dtype, check_number

__all__ = ["matryoshka"]

Loss = Callable[..., Tensor]


def matryoshka(
    loss_fn: Loss | Sequence[Loss],
    *embeddings: Tensor,
    dims: Sequence[int],
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    **options: Any,
) -> Tensor:
    """sum_d weight_d loss_fn( first d features of each of the embeddings ) (Kusupati et al. 2022, MRL).

    matryoshka(info_nce, x, y, dims=(64, 256), scale=20.0) is info_nce(x_64, y_64, scale=20.0) + the same of 256. Each
    prefix is a loss of its own, with its own sweeps: sum(dims) / D of the products of one loss at the full D. On the
    C++ backend one sweep, with the products of the longest prefix, serves all prefixes of `info_nce` itself; its
    options are then scale, symmetric, positives and a reduction to a number, and dims are distinct.

    Args:
        loss_fn: takes as many embeddings as are given, and the options; or one function for each of the dims, which a
            loss with a memory needs, as its samples' normalisers differ from prefix to prefix.
        embeddings: (..., D) each, one D. Whatever else has D features, such as hard negatives, is one of them.
        dims: lengths of the prefixes, each from 1 to D, in any order.
        weights: one for each of the dims, finite and at least 0; default ones.
        normalize: every prefix to unit rows, as retrieval by a prefix does it. False: prefixes of the rows as they are,
            which views of the embeddings serve; the full D then need not be normalised twice.
        options: given to every call of loss_fn.

    Returns:
        What loss_fn returns, weighted and summed.

    Raises:
        ValueError: dims is empty or holds a length that is no prefix, embeddings differ in D, or weights or losses are
            not as many as dims.
        TypeError: embeddings are no tensors, dims no sequence, a weight no number, or what loss_fn returns no tensor.
    """
    features = _check_features(embeddings)
    if not isinstance(dims, Iterable):
        raise TypeError(f"dims is {dims!r}: expected a sequence of lengths, such as (64, 256)")
    dims = list(dims)
    if not dims or not all(isinstance(dim, Integral) and 1 <= dim <= features for dim in dims):
        raise ValueError(f"dims is {dims}: expected some, each from 1 to the {features} features")
    losses = [loss_fn] * len(dims) if callable(loss_fn) else list(loss_fn)
    if len(losses) != len(dims):
        raise ValueError(f"loss_fn holds {len(losses)} losses for {len(dims)} dims: expected one, or one for each")
    weights = [1.0] * len(dims) if weights is None else list(weights)
    if len(weights) != len(dims):
        raise ValueError(f"weights holds {len(weights)} for {len(dims)} dims: expected one for each")
    weights = [check_number("a weight", weight, 0) for weight in weights]
    if all(loss is info_nce for loss in losses) and fits(embeddings, dims, options):
        plain = {name: value for name, value in options.items() if name in SWEPT}
        return info_nce_over_prefixes(*embeddings, dims=dims, weights=weights, normalize=normalize, **plain)
    total: Tensor | None = None
    for dim, weight, loss in zip(dims, weights, losses, strict=True):
        prefixes = [rows[..., :dim] for rows in embeddings]
        if normalize:
            prefixes = [_unit_rows(prefix) for prefix in prefixes]
        found = loss(*prefixes, **options)
        if not isinstance(found, Tensor):
            raise TypeError(
                f"loss_fn returned {type(found).__name__}: expected a tensor, such as the field loss of a GammaOutput"
            )
        part = weight * found
        total = part if total is None else total + part
    assert total is not None
    return total


def _unit_rows(rows: Tensor) -> Tensor:
    """Normalised in float32: in float16 what keeps a row of zeros from 0 / 0 is rounded to 0 itself."""
    return F.normalize(rows.to(accumulation_dtype(rows.dtype)), dim=-1).to(rows.dtype)


def _check_features(embeddings: Sequence[Tensor]) -> int:
    if not embeddings:
        raise ValueError("embeddings are not given: expected at least one tensor (rows, features)")
    for rows in embeddings:
        if not isinstance(rows, Tensor):
            raise TypeError(f"embeddings hold a {type(rows).__name__}: expected tensors; other arguments by name")
    features = {rows.shape[-1] if rows.dim() else 0 for rows in embeddings}
    if len(features) > 1:
        shapes = ", ".join(str(tuple(rows.shape)) for rows in embeddings)
        raise ValueError(f"embeddings are {shapes}: expected one number of features")
    return features.pop()
