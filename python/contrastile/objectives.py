"""InfoNCE whose softmax has more in it than the pairs of a batch: hard negatives, a prior, smoothed labels, and the
pairs within x and within y. Their arguments have been told apart in functional.py; the checks are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from contrastile.negatives import (
    Negatives,
    Place,
    Swept,
    among,
    of_columns,
    of_hard,
    of_rows,
    row_losses,
    sweep_negatives,
)
from contrastile.softmax_terms import Options, SoftmaxTerms
from contrastile.validation import (
    Groups,
    PairInputs,
    check_pairs,
    check_positives,
    check_reduction,
    check_views,
)

DIRECTIONS = ("xy", "yx", "xx", "yy")
PARTITIONS = ("joint", "per_direction")


class Hardness(NamedTuple):
    """What is added to the scale of a row's scores, in their values alone."""

    own: float = 0.0  # of its own hard negatives
    others: float = 0.0  # of the other candidates in y


class Scheme(NamedTuple):
    """Which pairs are summed, and how they are put together."""

    directions: tuple[str, ...]
    partition: str
    hardness: Hardness = Hardness()


def info_nce(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    options: Options,
    place: Place,
    *,
    symmetric: bool,
    positives: Tensor | None,
    groups: Groups | None,
    reduction: str,
) -> Tensor:
    def prepare(may_be_empty: bool) -> tuple[PairInputs, SoftmaxTerms]:
        check_reduction(reduction)
        inputs = check_pairs(x, y, scale, positives, groups, both_directions=symmetric, may_be_empty=may_be_empty)
        return options.checked(inputs, columns=symmetric)

    found = sweep_negatives(
        prepare,
        place,
        columns=symmetric and options.false_negative_margin is None,
        function="info_nce",
        in_order=positives is None,
        reduction=reduction,
        **options.facts(),
    )
    losses = _losses_of_rows(found, place)
    if symmetric:
        losses = (losses + _losses_of([of_columns(_with_columns(found, place))], found)) / 2
    return found.reduced(losses, reduction)


def nt_xent(
    z: Tensor, scale: float | Tensor, options: Options, place: Place, *, positives: Tensor | None, reduction: str
) -> Tensor:
    def prepare(may_be_empty: bool) -> tuple[PairInputs, SoftmaxTerms]:
        check_reduction(reduction)
        inputs = check_views(z, scale, positives, may_be_empty=may_be_empty)
        return options.checked(inputs, columns=False)

    found = sweep_negatives(prepare, place, columns=False, function="nt_xent", reduction=reduction, **options.facts())
    return found.reduced(_losses_of_rows(found, place), reduction)


def directional(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    scheme: Scheme,
    options: Options,
    place: Place,
    *,
    positives: Tensor | None,
    groups: Groups | None,
    reduction: str,
) -> Tensor:
    """A hardness needs a number as scale, and no prior and no smoothing."""
    directions, hardness = scheme.directions, scheme.hardness
    by_column = "yx" in directions

    def prepare(may_be_empty: bool) -> tuple[PairInputs, SoftmaxTerms]:
        check_reduction(reduction)
        check_scheme(scheme, options)
        inputs = check_pairs(x, y, scale, positives, groups, both_directions=False, may_be_empty=may_be_empty)
        if by_column and positives is not None:  # a column that is nobody's positive has no loss
            check_positives(positives, x, len(y), distinct=True)
        inputs, terms = options.checked(inputs, columns=by_column)
        return (_scaled(inputs, terms, inputs.scale + hardness.others) if hardness.others else inputs), terms

    swept = sweep_negatives(
        prepare,
        place,
        columns=by_column and not hardness.others and options.false_negative_margin is None,
        function="directional_info_nce",
        in_order=positives is None,
        reduction=reduction,
        directions=",".join(map(str, directions)),
        partition=scheme.partition,
        hardness=":".join(map(str, hardness)),
        default_positives=positives is None,
        **options.facts(),
    )
    found = _given_back(swept, scale, hardness.others)
    parts: list[list[Negatives]] = []
    for direction in directions:
        if direction == "xy":
            parts.append([of_rows(found), *of_hard(found, place, hardness.own)])
        elif direction == "yx":
            parts.append([of_columns(_with_columns(found, place))])
        else:
            parts.append([among(found, place, of_y=direction == "yy")])
    if scheme.partition == "per_direction":
        losses = torch.stack([_losses_of(kinds, found) for kinds in parts]).mean(0)
    else:
        kinds = [kind for part in parts for kind in part]
        if by_column:  # the pair is summed from both its ends
            assert found.positive is not None
            kinds.append(Negatives(found.positive, None, None))
        losses = _losses_of(kinds, found)
    return found.reduced(losses, reduction)


def check_scheme(scheme: Scheme, options: Options) -> None:
    directions, partition = scheme.directions, scheme.partition
    if not set(directions) <= set(DIRECTIONS) or len(set(directions)) != len(directions) or "xy" not in directions:
        raise ValueError(
            f"directions is {directions!r}: expected 'xy', and any others of {', '.join(map(repr, DIRECTIONS))}, once"
        )
    if partition not in PARTITIONS:
        raise ValueError(f"partition is {partition!r}: expected one of {', '.join(map(repr, PARTITIONS))}")
    if partition == "joint" and "yx" in directions:
        for name in options.counting:
            raise ValueError(
                f"{name} with directions {directions!r} and partition 'joint': the sum has the positive twice, "
                "once from each end; expected directions without 'yx', or partition 'per_direction'"
            )


def _losses_of_rows(found: Swept, place: Place) -> Tensor:
    return _losses_of([of_rows(found), *of_hard(found, place)], found)


def _losses_of(kinds: Sequence[Negatives], found: Swept) -> Tensor:
    assert found.positive is not None
    return row_losses(kinds, found.positive, found.inputs.scale, found.terms)


# Hardness: values at scale + hardness, gradients at scale


def _scaled(inputs: PairInputs, terms: SoftmaxTerms, scale: Tensor) -> PairInputs:
    return inputs._replace(scale=scale, row_ceiling=terms.ceiling(scale))


def _given_back(found: Swept, scale: float | Tensor, others: float) -> Swept:
    """The same with the positive's logit, and the gradients, at the scale without hardness."""
    if not others:
        return found
    assert not isinstance(scale, Tensor)
    assert found.positive is not None
    rate = scale / (scale + others)
    inputs = _scaled(found.inputs, found.terms, torch.full_like(found.inputs.scale, scale))
    row = rate * found.row + (1 - rate) * found.row.detach()
    return replace(found, inputs=inputs, row=row, positive=rate * found.positive)


def _with_columns(found: Swept, place: Place) -> Swept:
    """The same with the columns' log-sums, where the rows' sweep has none: positives against x, without hardness, and
    with a ceiling for each column.
    """
    if found.col is not None:
        return found
    x, y, scale, positives, row_ids, col_ids, _ = found.inputs
    assert y is not None
    assert positives is not None
    own = torch.arange(len(x), device=x.device)
    of_paired = None if col_ids is None else col_ids[positives]
    inputs = PairInputs(found.paired, x, scale, own, of_paired, row_ids, found.terms.ceiling(scale))
    swept = sweep_negatives(lambda _: (inputs, found.terms), place, columns=False, function="columns")
    col = swept.row.new_full((len(y),), -torch.inf).scatter(0, positives, swept.row)
    return replace(found, col=col)
