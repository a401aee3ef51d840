"""sentence-transformers' in-batch ranking losses, without the matrix of scores.

Embedding of the columns, gradient caching and constructors are the library's; the loss on given embeddings is
computed here. All terms are log-sum-exps over rows or columns of three products,

    query_to_doc     rows of      q D^T    D: all documents, positives first, then each column of hard negatives
    doc_to_query     columns of   q P^T    P: the positives, the first N of D's columns
    query_to_query   rows of      q q^T    without the query itself
    doc_to_doc       rows of      P D^T    without documents of the same query

so every choice of directions, partition and hardness is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor, distributed
from torch.nn import functional as F

from contrastile.functional import info_nce, log_normalizers
from contrastile.integrations.common import as_autocast_multiplies, in_place_of
from contrastile.validation import accumulation_dtype

__all__ = ["CachedMultipleNegativesRankingLoss", "MultipleNegativesRankingLoss"]


class Hardness(NamedTuple):
    """What is added to the scale of a query's scores, in their values alone."""

    own: float  # scores of its own hard negatives
    others: float  # scores of other queries' documents


HARDENED = {
    None: (False, False),
    "in_batch_negatives": (False, True),
    "hard_negatives": (True, False),
    "all_negatives": (True, True),
}  # own, others


@in_place_of(losses.__name__)
class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """InfoNCE of (anchor, positive) or (anchor, positive, negative_1, ..., negative_n), in-batch negatives included.

    Takes the place of MultipleNegativesRankingLoss of sentence-transformers 6.2, with all its options but two:
    similarity_fct is cos_sim or dot_score, and gather_across_devices takes one process.

    Raises:
        ValueError: similarity_fct is another function, or as the library's class does.
    """

    @functools.wraps(losses.MultipleNegativesRankingLoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _normalizes(self.similarity_fct)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """The mean loss over queries, (), float32, or float64 for float64 embeddings; labels are not read.

        Args:
            embeddings: queries, positives, and any number of hard negatives, (N, D) each.

        Raises:
            ValueError: fewer than two columns, or their shapes differ.
            NotImplementedError: gather_across_devices with several processes.
        """
        return _loss_of(self, embeddings)


@in_place_of(losses.__name__)
class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` whose model only holds the activations of one mini-batch.

    Takes the place of CachedMultipleNegativesRankingLoss of sentence-transformers 6.2. Its gradient caching is the
    library's, which knows how to cut the library's features; the loss between the two forwards is one pass over the
    whole batch here, instead of one with a backward for every mini-batch of queries.

    Raises:
        ValueError: similarity_fct is neither cos_sim nor dot_score, or as the library's class does.
    """

    @functools.wraps(losses.CachedMultipleNegativesRankingLoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _normalizes(self.similarity_fct)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The mean loss over queries, (); with_backward, detached, and its gradients are in the embeddings.

        Args:
            reps: each column as a list of its mini-batches' embeddings.

        Raises:
            ValueError, NotImplementedError: as `MultipleNegativesRankingLoss.compute_loss_from_embeddings` does.
        """
        loss = _loss_of(self, [torch.cat(column) for column in reps])
        if not with_backward:
            return loss
        loss.backward()
        return loss.detach()


def _loss_of(module: Any, columns: Sequence[Tensor]) -> Tensor:
    if module.gather_across_devices and distributed.is_available() and distributed.is_initialized():
        processes = distributed.get_world_size()
        if processes > 1:
            raise NotImplementedError(
                f"gather_across_devices with {processes} processes: documents are not gathered across processes here; "
                "gather_across_devices=False keeps to each process's own, CONTRASTILE_INTEGRATIONS=0 to the library's"
            )
    share_own, share_others = HARDENED[module.hardness_mode]
    hardness = Hardness(share_own * module.hardness_strength, share_others * module.hardness_strength)
    normalize = _normalizes(module.similarity_fct)
    return _ranking_loss(columns, module.scale, normalize, module.directions, module.partition_mode, hardness)


def _normalizes(similarity_fct: Callable[[Tensor, Tensor], Tensor]) -> bool:
    if similarity_fct not in (cos_sim, dot_score):
        name = getattr(similarity_fct, "__name__", type(similarity_fct).__name__)
        raise ValueError(f"similarity_fct is {name}: expected sentence_transformers.util.cos_sim or dot_score")
    return similarity_fct is cos_sim


def _ranking_loss(
    columns: Sequence[Tensor],
    scale: float,
    normalize: bool,
    directions: Sequence[str],
    partition_mode: str,
    hardness: Hardness,
) -> Tensor:
    """Of queries, positives and any number of columns of hard negatives, (N, D) each; normalize: to unit rows."""
    if len(columns) < 2 or any(column.dim() != 2 or column.shape != columns[0].shape for column in columns):
        shapes = ", ".join(str(tuple(column.shape)) for column in columns)
        raise ValueError(f"embeddings are {shapes}: expected at least queries and positives, (N, D) each")
    if normalize:
        columns = [F.normalize(column, dim=1) for column in columns]
    queries, *documents = (as_autocast_multiplies(column) for column in columns)
    chosen = set(directions)
    if any(hardness) or (partition_mode == "joint" and len(chosen) > 1):
        return _from_normalizers(queries, documents, scale, chosen, partition_mode, hardness)
    if "doc_to_query" not in chosen:
        return info_nce(queries, torch.cat(documents), scale, symmetric=False)
    if len(documents) == 1:
        return info_nce(queries, documents[0], scale)
    to_doc = info_nce(queries, torch.cat(documents), scale, symmetric=False)
    return (to_doc + info_nce(documents[0], queries, scale, symmetric=False)) / 2


def _from_normalizers(
    queries: Tensor,
    documents: list[Tensor],
    scale: float,
    directions: set[str],
    partition_mode: str,
    hardness: Hardness,
) -> Tensor:
    """Mean of log( 1 + sum of exp(negatives' scores - the positive's) ), which keeps small losses exact."""
    rows = len(queries)
    every_document = torch.cat(documents)
    of_query = torch.arange(rows, device=queries.device)
    of_document = of_query.repeat(len(documents))
    own = scale * torch.stack([_rowwise(queries, document) for document in documents], dim=1)  # (N, 1 + negatives)
    positive, hard = own[:, :1], own[:, 1:]

    # Values at scale + strength, gradients at scale: the library adds the strength's part as a constant.
    by_column = "doc_to_query" in directions
    shared = by_column and hardness.others == 0
    of_others = scale + hardness.others
    row_lse, col_lse = log_normalizers(
        queries, every_document, of_others, groups=(of_query, of_document), columns=shared
    )
    others = _slowed(row_lse, scale / of_others)[:, None]
    negatives = [torch.cat([others, hard + hardness.own / scale * hard.detach()], dim=1)]
    if by_column:
        negatives.append(_row_lse(documents[0], queries, scale, of_query) if col_lse is None else col_lse[:rows, None])
    if partition_mode == "per_direction":
        return torch.stack([_softplus_of_sum(terms - positive) for terms in negatives]).mean()

    if by_column:
        negatives.append(positive)  # a joint sum counts the pair from both its ends
    if "query_to_query" in directions:
        negatives.append(_row_lse(queries, queries, scale, of_query))
    if "doc_to_doc" in directions:
        negatives.append(_row_lse(documents[0], every_document, scale, of_document))
    return _softplus_of_sum(torch.cat(negatives, dim=1) - positive).mean()


def _row_lse(x: Tensor, y: Tensor, scale: float, of_column: Tensor) -> Tensor:
    """Over the columns that belong to other rows, (N, 1); of_column: the row that each belongs to, (M,)."""
    groups = of_column[: len(x)], of_column
    return log_normalizers(x, y, scale, groups=groups, columns=False)[0][:, None]


def _softplus_of_sum(terms: Tensor) -> Tensor:
    """log( 1 + sum_k exp(terms_ik) ), (N,); a row of nothing but -inf, which logsumexp cannot derive, gives 0."""
    top = terms.detach().amax(dim=1, keepdim=True).clamp(min=0)
    return (top + ((terms - top).exp().sum(dim=1, keepdim=True) + torch.expm1(-top)).log1p())[:, 0]


def _rowwise(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of the rows, (N,), in the accumulation dtype."""
    dtype = accumulation_dtype(x.dtype)
    return (x.to(dtype) * y.to(dtype)).sum(dim=1)


def _slowed(values: Tensor, rate: float) -> Tensor:
    """values, with rate times their gradient."""
    return values if rate == 1 else rate * values + (1 - rate) * values.detach()
