"""InfoNCE over several kinds of pairs as a function, in the manner of functional.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from contrastile import objectives
from contrastile.distributed import Group
from contrastile.functional import place_of
from contrastile.softmax_terms import Options
from contrastile.validation import Groups

__all__ = ["directional_info_nce"]


def directional_info_nce(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    *,
    directions: Sequence[str] = ("xy", "xx", "yy"),
    partition: str = "joint",
    positives: Tensor | None = None,
    groups: Groups | None = None,
    hard_negatives: Tensor | None = None,
    label_smoothing: float = 0.0,
    prior: float | Tensor | None = None,
    false_negative_margin: float | None = None,
    reduction: str = "mean",
    group: Group | None = None,
    exchange: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE whose negatives are also those within x and within y, without any N x N matrix.

        xy    s_ij = scale_i <x_i, y_j>         j a negative of row i, and the row's hard negatives
        yx    s_ji = scale_j <x_j, y_pos(i)>    j a row whose positive is another column
        xx    scale_i <x_i, x_j>                j != i
        yy    scale_i <y_pos(i), y_j>           j != pos(i)

    partition "joint": one normaliser, l_i = log( exp(s_i,pos) + sum of exp over all directions' negatives ) - s_i,pos.
    ("xy", "xx", "yy") with false_negative_margin=0.1 is then the loss of Qwen3-Embedding (Zhang et al. 2025); all four
    without a margin that of GTE (Li et al. 2023), which sums the positive twice, once from each end: so with "yx" here.
    "per_direction": the mean of one such loss for each direction, every one with its own normaliser.

    "xy" and "yx" share their sweeps (4 products of N x M x D), xx and yy take up to 4 more each, or 2 where one scale
    and no groups make their logits symmetric (yy: and N == M without positives). With a margin each takes its 4.

    Args:
        directions: "xy", and any others of "yx", "xx", "yy"; one name alone need not be in a sequence.
        groups: (row_ids (N,), col_ids (M,)), integers: pairs of equal ids are no negatives, in xx by row_ids on both
            sides, in yy by col_ids.
        positives: (N,) integers, distinct with "yx".
        hard_negatives, label_smoothing, prior: as for `info_nce`; hard negatives are in "xy" alone. The last two count
            all candidates of a normaliser, and are refused where it has the positive twice.
        false_negative_margin: as for `info_nce`, of all directions by <x_i, y_pos(i)>; with "yx" needs one scale.
        x, y, scale, reduction, group, exchange, backend: as for `info_nce`.

    Returns:
        The loss, () or (N,), float32, or float64 for float64 inputs.

    Raises:
        ValueError: as `info_nce` does; directions or partition are others, or label_smoothing or prior is given with
            "yx" in a joint normaliser.
        TypeError, RuntimeError: as `info_nce` does.
    """
    alone = isinstance(directions, str) or not isinstance(directions, Iterable)
    names: Iterable[str] = (directions,) if alone else directions  # type: ignore[assignment]
    return objectives.directional(
        x,
        y,
        scale,
        objectives.Scheme(tuple(names), partition),
        Options(hard_negatives, label_smoothing, prior, false_negative_margin),
        place_of(group, exchange, backend),
        positives=positives,
        groups=groups,
        reduction=reduction,
    )
