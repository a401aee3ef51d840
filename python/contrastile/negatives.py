"""The kinds of negatives that a softmax may sum, and the loss of a row from them.

Each kind is the log-sum of its exponentials; where a loss needs them, also how many there are and the sum of their
logits, which is an inner product with a sum of embeddings: O(N D). Everything here is plain autograd around the sweeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from contrastile import autograd, backends, formulas, formulas_negatives
from contrastile.distributed import Group, added_up
from contrastile.distributed import losses as shared_losses
from contrastile.distributed.losses import Shared
from contrastile.distributed.member import Member
from contrastile.distributed.sums_by_id import sum_of_all_others
from contrastile.formulas import wants_of
from contrastile.softmax_terms import Prior, SoftmaxTerms
from contrastile.statistics import SOFTPLUS_THRESHOLD, finite
from contrastile.sums_by_id import SumsOfOthers, number_of_others
from contrastile.validation import PairInputs, accumulation_dtype
from contrastile.version import __version__

Prepare = Callable[[bool], tuple[PairInputs, SoftmaxTerms]]  # may_be_empty


class Place(NamedTuple):
    """Where a sweep runs."""

    group: Group | None = None
    exchange: str | None = None
    backend: str | None = None


@dataclass(frozen=True)
class Swept:
    """What a sweep over the negatives found, and of what."""

    inputs: PairInputs
    terms: SoftmaxTerms
    row: Tensor  # (N,)
    col: Tensor | None  # (M,)
    positive: Tensor | None  # (N,)
    shared: Shared | None  # over a group
    in_order: bool  # row i's positive is column i

    @property
    def paired(self) -> Tensor:
        """The rows' positives, (N, D): y or a part of it where they are in order, and no copy."""
        x, y, _, positives, *_ = self.inputs
        assert positives is not None
        columns = x if y is None else y
        if not self.in_order:
            return columns[positives]
        return columns if len(columns) == len(x) else columns[: len(x)]

    @property
    def rows(self) -> Sequence[int]:
        """Of each process."""
        return (len(self.inputs.x),) if self.shared is None else self.shared.sizes.rows

    @property
    def cols(self) -> Sequence[int]:
        y = self.inputs.x if self.inputs.y is None else self.inputs.y
        return (len(y),) if self.shared is None else self.shared.sizes.cols

    @property
    def group(self) -> Group | None:
        return None if self.shared is None else self.shared.group

    def reduced(self, losses: Tensor, reduction: str) -> Tensor:
        if self.shared is None:
            return formulas.reduce(losses, reduction)
        return self.shared.reduced(losses if reduction == "none" else losses.sum(), reduction)


class Negatives(NamedTuple):
    """One kind, of each row. Numbers and totals are None where no loss asks for them."""

    log_sum: Tensor  # (N,)  log of the sum of exp(s); -inf for none
    number: float | Tensor | None  # (N,)
    total: Tensor | None  # (N,)  sum of s


class Ids(NamedTuple):
    """Columns of a row's own id are no negatives, nor is its own column."""

    row: Tensor  # (N,)
    col: Tensor  # (M,)
    own: Tensor  # (N,) of the row's own column


def sweep_negatives(
    prepare: Prepare, place: Place, *, columns: bool, function: str, in_order: bool = False, **facts: Any
) -> Swept:
    """One statistics sweep over the negatives, whose backward is one gradient sweep.

    Args:
        prepare: checks own arguments.
        function, facts: what all processes of a group must have alike.
    """
    if place.group is not None:
        shared = shared_losses.share(
            function,
            lambda: prepare(True),
            *place,
            columns=columns,
            **facts,
        )
        found = shared_losses.log_negatives(shared, columns)
        assert isinstance(shared.terms, SoftmaxTerms)
        return Swept(shared.inputs, shared.terms, found.row, found.col, found.positive, shared, in_order)
    inputs, terms = prepare(False)
    name = backends.resolve(place.backend, inputs.x.device.type, inputs.x.dtype)
    if torch.compiler.is_compiling():
        row, col, positive, *_ = torch.ops.contrastile.log_negatives(*inputs, columns, name, __version__)
        positive = None if inputs.positives is None else positive
        return Swept(inputs, terms, row, col if columns else None, positive, None, in_order)
    if autograd.needs_no_derivative(wants_of(inputs), *inputs[:3]):
        plain, _ = formulas_negatives.log_negatives_forward(inputs, columns, name)
        return Swept(inputs, terms, plain.row, plain.col, plain.positive, None, in_order)
    apply: Any = autograd.LogNegativesFunction.apply
    row, col, positive = apply(*inputs, columns, name)
    return Swept(inputs, terms, row, col, positive, None, in_order)


# Kinds


def of_rows(found: Swept) -> Negatives:
    """A row's candidates but its positive, and itself where x meets x."""
    x, y, scale, *_ = found.inputs
    columns = x if y is None else y
    if not _counts(found.terms):
        return Negatives(found.row, None, None)
    own = [found.paired] if y is not None else [x, found.paired]
    return _kind(found, found.row, x, columns, own, _ids_of_rows(found.inputs), found.cols, scale)


def of_columns(found: Swept) -> Negatives:
    """For each row the candidates of its positive's column: the other rows."""
    x, _, scale, positives, row_ids, col_ids, _ = found.inputs
    assert found.col is not None
    assert positives is not None
    log_sum = found.col[positives]
    if not _counts(found.terms):
        return Negatives(log_sum, None, None)
    rows = x if scale.dim() == 0 else x.to(accumulation_dtype(x.dtype)) * scale[:, None]
    ids = None if row_ids is None or col_ids is None else Ids(col_ids[positives], row_ids, row_ids)
    factor = scale if scale.dim() == 0 else torch.ones_like(scale)
    return _kind(found, log_sum, found.paired, rows, [rows], ids, found.rows, factor)


def of_hard(found: Swept, place: Place, hardness: float = 0.0) -> list[Negatives]:
    """The hard negatives, if there are any, for each row.

    hardness: added to the scale of each row's own ones, in their values alone.
    """
    x, _, scale, *_ = found.inputs
    hard, dtype, ceiling = found.terms.hard_negatives, accumulation_dtype(x.dtype), found.terms.ceiling(scale)
    if hard is None or (hard.shape[-2] == 0 and (hard.dim() == 3 or place.group is None)):
        return []
    if hard.dim() == 3:
        # Not a matrix product, whose backward autocast would round to 16 bits.
        products = (hard.to(dtype) * x.to(dtype)[:, None]).sum(2)
        logits = scale.to(dtype).reshape(-1, 1) * products
        if hardness:
            logits = logits + hardness * products.detach()
        if found.terms.most_similar is not None:
            logits = logits.masked_fill(products > found.terms.most_similar[:, None], -math.inf)
        return [Negatives(log_sum(logits), hard.shape[1], logits.sum(1) if found.terms.label_smoothing else None)]
    inputs = PairInputs(x, hard, scale, None, None, None, ceiling)
    swept = sweep_negatives(lambda _: (inputs, found.terms), place, columns=False, function="hard negatives")
    if not _counts(found.terms):
        return [Negatives(swept.row, None, None)]
    return [_kind(swept, swept.row, x, hard, [], None, swept.cols, scale)]


def among(found: Swept, place: Place, *, of_y: bool) -> Negatives:
    """Each row against the others of its own side: x against x, or with of_y its positive against y."""
    x, y, scale, positives, row_ids, col_ids, _ = found.inputs
    assert y is not None
    assert positives is not None
    ceiling = found.terms.ceiling(scale)
    if of_y:
        # Whether logits are symmetric is one question to all processes.
        whole = found.in_order and list(found.rows) == list(found.cols)
        rows, columns = y if whole else found.paired, y
        ids = None if col_ids is None else Ids(col_ids[positives], col_ids, col_ids[positives])
    else:
        rows, columns = x, x
        ids = None if row_ids is None else Ids(row_ids, row_ids, row_ids)
    if ids is not None:
        inputs = PairInputs(rows, columns, scale, None, ids.row, ids.col, ceiling)
    elif rows is columns:  # logits are symmetric, if the scale is one
        inputs = PairInputs(rows, None, scale, None, None, None, ceiling)
    else:
        inputs = PairInputs(rows, columns, scale, positives, None, None, ceiling)
    swept = sweep_negatives(lambda _: (inputs, found.terms), place, columns=False, function="one side")
    if not _counts(found.terms):
        return Negatives(swept.row, None, None)
    return _kind(swept, swept.row, rows, columns, [rows], ids, swept.cols, scale)


# Losses


def row_losses(kinds: Sequence[Negatives], positive: Tensor, scale: Tensor, terms: SoftmaxTerms) -> Tensor:
    """Cross-entropy of the positive against all negatives, (N,): log(1 + exp(log_sum - positive)), and what terms ask.

    With a prior the negatives' sum is the debiased one (Chuang et al. 2020, with one positive); with
    smoothing, label_smoothing of the target is spread over positive and negatives alike.
    """
    negative = kinds[0].log_sum if len(kinds) == 1 else log_sum(torch.stack([kind.log_sum for kind in kinds], 1))
    count: Any = sum(kind.number for kind in kinds if kind.number is not None)
    if terms.prior is not None:
        negative = debiased(negative, positive, count, terms.prior, scale)
    # What is added is 0, or NaN where the positive's logit is not finite: then the loss is not defined.
    losses = F.softplus(negative - positive, threshold=SOFTPLUS_THRESHOLD).add(positive, alpha=0)
    if not terms.label_smoothing:
        return losses
    total: Any = sum(kind.total for kind in kinds if kind.total is not None)
    smoothed: Tensor = losses + terms.label_smoothing * (count * positive - total) / (1 + count)
    return smoothed


def debiased(negative: Tensor, positive: Tensor, count: float | Tensor, prior: Prior, scale: Tensor) -> Tensor:
    """log( count * max( (mean_neg exp(s) - tau exp(s_pos)) / (1 - tau), exp(-scale) ) ), (N,).

    With the sum S of exp(s) over negatives that is log S + log(1 - tau count exp(s_pos) / S) - log(1 - tau), without
    an exponential of a logit. Where the floor holds, the negatives have no gradient, and the scale has -1.
    """
    count = torch.as_tensor(count, dtype=negative.dtype, device=negative.device).expand_as(negative)
    alone = count == 0
    count = count.masked_fill(alone, 1)
    negative = negative.masked_fill(alone, 0)
    lowest = count.log() - scale.to(negative.dtype)
    taken = prior.log + count.log() + positive - negative  # log of the share of S that is taken off
    with torch.no_grad():
        left = (-torch.expm1(taken)).log()  # NaN where nothing is left
        floored = (taken >= 0) | (negative + left - prior.log_rest < lowest) | alone
    # Where it is not used, at a place where it has a gradient.
    taken = taken.masked_fill(floored, -1)
    corrected = negative + (-torch.expm1(taken)).log() - prior.log_rest
    return torch.where(floored, lowest, corrected).masked_fill(alone, -math.inf)


def log_sum(terms: Tensor) -> Tensor:
    """log sum_k exp(terms_ik), (N,); -inf for a row of nothing but -inf, which torch.logsumexp cannot derive."""
    top = finite(terms.detach().amax(1))
    total = (terms - top[:, None]).exp().sum(1)
    nothing = total == 0
    return (top + total.masked_fill(nothing, 1).log()).masked_fill(nothing, -math.inf)


# Counts and sums of candidates


def _counts(terms: SoftmaxTerms) -> bool:
    return terms.prior is not None or terms.label_smoothing != 0


def _ids_of_rows(inputs: PairInputs) -> Ids | None:
    if inputs.row_groups is None or inputs.col_groups is None:
        return None
    assert inputs.positives is not None
    return Ids(inputs.row_groups, inputs.col_groups, inputs.col_groups[inputs.positives])


def _kind(
    found: Swept,
    log_sum: Tensor,
    rows: Tensor,
    columns: Tensor,
    own: Sequence[Tensor],
    ids: Ids | None,
    sizes: Sequence[int],
    scale: Tensor,
) -> Negatives:
    """rows (N, D) against columns (M, D) but a row's own ones, (N, D) each; sizes are each process's columns."""
    dtype = accumulation_dtype(rows.dtype)
    count: float | Tensor = sum(sizes) - len(own)
    if ids is not None:
        cols = ids.col if found.group is None else Member(found.group).gathered(ids.col, sizes, "ids")
        apart = ids.own != ids.row
        count = (number_of_others(ids.row, cols) - apart.to(torch.int64)).to(dtype)
    if not found.terms.label_smoothing:
        return Negatives(log_sum, count, None)
    if ids is None:
        vectors = added_up(columns.sum(0, dtype=dtype), found.group) - sum(t.to(dtype) for t in own)
    else:
        vectors = _sum_of_others(found, ids, columns.to(dtype), sizes) - apart[:, None] * own[0].to(dtype)
    return Negatives(log_sum, count, scale.to(dtype) * (rows.to(dtype) * vectors).sum(1))


def _sum_of_others(found: Swept, ids: Ids, columns: Tensor, sizes: Sequence[int]) -> Tensor:
    """Of another id than the row's, (N, D)."""
    if found.shared is None:
        return SumsOfOthers(ids.col, columns).of(ids.row)
    of_rows, of_cols = (found.shared.plan_of_sums(each, columns) for each in (found.rows, sizes))
    return sum_of_all_others(ids.row, ids.col, columns, of_rows, of_cols)
