"""sentence-transformers' in-batch ranking losses, without the matrix of scores.

Embedding of the columns, gradient caching and constructors are the library's; the loss on given embeddings is
computed here. All terms are log-sum-exps over rows or columns of three products,

    query_to_doc     rows of      q D^T    D: all documents, positives first, then each column of hard negatives
    doc_to_query     columns of   q P^T    P: the positives, the first N of D's columns
    query_to_query   rows of      q q^T    without the query itself
    doc_to_doc       rows of      P D^T    without documents of the same query

so every choice of directions, partition and hardness is exact. With gather_across_devices the rows are those of this
process, and the columns those of all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor, distributed
from torch.nn import functional as F

from contrastile.distributed import Group, RowShare, refusals_told
from contrastile.functional import info_nce
from contrastile.integrations.common import as_autocast_multiplies, in_place_of
from contrastile.negatives import Place
from contrastile.objectives import Hardness, Scheme, directional
from contrastile.softmax_terms import Options

__all__ = ["CachedMultipleNegativesRankingLoss", "MultipleNegativesRankingLoss"]


class Terms(NamedTuple):
    """What the loss of given embeddings is made of."""

    scale: float
    normalize: bool  # to unit rows
    directions: tuple[str, ...]
    partition_mode: str
    hardness: Hardness
    false_negative_margin: float | None


DIRECTIONS = {"query_to_doc": "xy", "doc_to_query": "yx", "query_to_query": "xx", "doc_to_doc": "yy"}
HARDENED = {
    None: (False, False),
    "in_batch_negatives": (False, True),
    "hard_negatives": (True, False),
    "all_negatives": (True, True),
}  # own, others


@in_place_of(losses.__name__)
class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """InfoNCE of (anchor, positive) or (anchor, positive, negative_1, ..., negative_n), in-batch negatives included.

    Takes the place of MultipleNegativesRankingLoss of sentence-transformers 6.2, with all its options but that
    similarity_fct is cos_sim or dot_score. With gather_across_devices the negatives are those of all processes, as in
    the library: gradients are equal to its own. The value is the whole batch's in every process, where the library
    gives the mean over own queries, whose average over the processes it is.

    Args:
        false_negative_margin: a keyword of this class alone: candidates whose similarity is above that of query and
            positive by more than this are left out, see `contrastile.info_nce`; None for none.

    Raises:
        ValueError: similarity_fct is another function, or as the library's class does.
    """

    @functools.wraps(losses.MultipleNegativesRankingLoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, false_negative_margin: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _normalizes(self.similarity_fct)
        self.false_negative_margin = false_negative_margin

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | _given(false_negative_margin=self.false_negative_margin)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        """The mean loss over queries, (), float32, or float64 for float64 embeddings; labels are not read.

        Args:
            embeddings: queries, positives, and any number of hard negatives, (N, D) each. With gather_across_devices
                N may differ from process to process, and the mean is over all of them.

        Raises:
            ValueError: fewer than two columns, or their shapes differ; over processes, also in every process where
                an option, the number of columns or the dimension differs.
            RuntimeError: embeddings were refused in another process, or an exchange failed or timed out.
        """
        return _loss_of(self, embeddings)


@in_place_of(losses.__name__)
class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` whose model only holds the activations of one mini-batch.

    Takes the place of CachedMultipleNegativesRankingLoss of sentence-transformers 6.2. Its gradient caching is the
    library's, which knows how to cut the library's features; the loss between the two forwards is one pass over the
    whole batch here, instead of one with a backward for every mini-batch of queries.

    Args:
        false_negative_margin: as for `MultipleNegativesRankingLoss`.

    Raises:
        ValueError: similarity_fct is neither cos_sim nor dot_score, or as the library's class does.
    """

    @functools.wraps(losses.CachedMultipleNegativesRankingLoss.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, false_negative_margin: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _normalizes(self.similarity_fct)
        self.false_negative_margin = false_negative_margin

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | _given(false_negative_margin=self.false_negative_margin)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The mean loss over queries, (); with_backward, detached, and its gradients are in the embeddings.

        Args:
            reps: each column as a list of its mini-batches' embeddings.

        Raises:
            ValueError, RuntimeError: as `MultipleNegativesRankingLoss.compute_loss_from_embeddings` does.
        """
        loss = _loss_of(self, [torch.cat(column) for column in reps])
        if not with_backward:
            return loss
        loss.backward()
        return loss.detach()


def _loss_of(module: Any, columns: Sequence[Tensor]) -> Tensor:
    share_own, share_others = HARDENED[module.hardness_mode]
    terms = Terms(
        module.scale,
        _normalizes(module.similarity_fct),
        tuple(sorted(set(module.directions))),
        module.partition_mode,
        Hardness(share_own * module.hardness_strength, share_others * module.hardness_strength),
        module.false_negative_margin,
    )
    gathers = module.gather_across_devices and distributed.is_available() and distributed.is_initialized()
    return _ranking_loss(columns, terms, distributed.group.WORLD if gathers else None)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _normalizes(similarity_fct: Callable[[Tensor, Tensor], Tensor]) -> bool:
    if similarity_fct not in (cos_sim, dot_score):
        name = getattr(similarity_fct, "__name__", type(similarity_fct).__name__)
        raise ValueError(f"similarity_fct is {name}: expected sentence_transformers.util.cos_sim or dot_score")
    return similarity_fct is cos_sim


def _ranking_loss(columns: Sequence[Tensor], terms: Terms, group: Group | None) -> Tensor:
    """Of queries, positives and any number of columns of hard negatives, (N, D) each, of all processes of the group."""
    with nullcontext() if group is None else refusals_told(group):
        _check_columns(columns)
    share = None
    if group is not None:
        share = RowShare.of("ranking loss", group, None, len(columns[0]), columns=len(columns), **terms._asdict())
    if terms.normalize:
        columns = [F.normalize(column, dim=1) for column in columns]
    queries, *documents = (as_autocast_multiplies(column) for column in columns)
    directions = terms.directions
    jointly = terms.partition_mode == "joint" and len(directions) > 1
    if any(terms.hardness) or jointly or terms.false_negative_margin is not None:
        return _from_normalizers(queries, documents, terms, share)
    positives = documents[0]
    candidates = positives if len(documents) == 1 else torch.cat(documents)
    if "doc_to_query" in directions and candidates is positives:
        return info_nce(queries, positives, terms.scale, group=group)
    to_doc = info_nce(queries, candidates, terms.scale, symmetric=False, group=group)
    if "doc_to_query" not in directions:
        return to_doc
    return (to_doc + info_nce(positives, queries, terms.scale, symmetric=False, group=group)) / 2


def _check_columns(columns: Sequence[Tensor]) -> None:
    if len(columns) < 2 or any(column.dim() != 2 or column.shape != columns[0].shape for column in columns):
        shapes = ", ".join(str(tuple(column.shape)) for column in columns)
        raise ValueError(f"embeddings are {shapes}: expected at least queries and positives, (N, D) each")


def _from_normalizers(queries: Tensor, documents: list[Tensor], terms: Terms, share: RowShare | None) -> Tensor:
    """A query's candidates in "xy" are other queries' documents, and its own hard negatives beside them."""
    group = None if share is None else share.member.group
    first = 0 if share is None else share.own.start
    of_query = torch.arange(first, first + len(queries), device=queries.device)
    scheme = Scheme(
        tuple(ours for theirs, ours in DIRECTIONS.items() if theirs in terms.directions),
        terms.partition_mode,
        terms.hardness,
    )
    return directional(
        queries,
        torch.cat(documents),
        terms.scale,
        scheme,
        Options(
            hard_negatives=torch.stack(documents[1:], dim=1) if len(documents) > 1 else None,
            false_negative_margin=terms.false_negative_margin,
        ),
        Place(group),
        positives=None,
        groups=(of_query, of_query.repeat(len(documents))),
        reduction="mean",
    )
