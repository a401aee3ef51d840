"""The pairwise operations: what they are given and what they give back.

Everything in this package that touches a pair (i, j) goes through one of two sweeps over all pairs,

    pair_stats   maxima and sums of exponentials of the logits, by row and by column
    pair_grad    dX = scale * C Y and dY = (scale * C)^T X for a coefficient C_ij that depends on s_ij

with logits s_ij = scale_i * <x_i, y_j>, or through positive_logits, which gives those of the positives alone. A backend
implements these functions over the types of this file and knows nothing of losses; a loss knows nothing of backends.
backends/cpu_prefixes.py has the one exception, for several logits of a pair.

Three kinds of pair are told apart:

    positive    (i, positives[i])
    negative    every other pair that is not masked
    masked      equal group ids, a sample paired with itself (self_offset), or a logit above its row's ceiling; a
                positive is never masked

Statistics cover the negatives only, and the positive's logit is returned beside them. That makes the
positive's own gradient coefficient p - 1 = -(negative mass), exact however confident the model is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairProblem:
    """Embeddings and masks over which a sweep runs. Validated: backends do not check it again."""

    anchors: Tensor  # x (N, D), float16 | bfloat16 | float32 | float64, unit stride along D
    candidates: Tensor  # y (M, D), dtype, device and unit stride of anchors
    scale: Tensor  # (N,), accumulation dtype
    positives: Tensor | None = None  # (N,) int64 column of each row's positive; None: no pair is positive
    row_groups: Tensor | None = None  # (N,) int64
    col_groups: Tensor | None = None  # (M,) int64
    self_offset: int | None = None  # row i and column i + self_offset are one sample, hence masked
    row_ceiling: Tensor | None = None  # (N,) accumulation dtype: a logit above it is masked; not with self_similarity
    # candidates is anchors, scale uniform, positives an involution, self_offset 0: logits are symmetric
    # and one triangle suffices.
    self_similarity: bool = False

    @property
    def rows(self) -> int:
        return self.anchors.shape[0]

    @property
    def cols(self) -> int:
        return self.candidates.shape[0]


@dataclass(frozen=True)
class PairStats:
    """Over the negatives: sum_j exp(s_ij) = row_sum_i * exp(row_max_i); likewise by column.

    row_max is the largest logit, or a number so near it that the sum keeps its precision, and at most 14 above the
    sum's logarithm. Accumulation dtype.
    A row without negatives has max -inf and sum 0.
    """

    row_max: Tensor  # (N,)
    row_sum: Tensor  # (N,)
    col_max: Tensor | None  # (M,)
    col_sum: Tensor | None  # (M,)
    positive_logit: Tensor | None  # (N,)
    row_rank: Tensor | None = None  # (N,) int64: negatives not at most the positive (a NaN counts)
    row_loss: Tensor | None = None  # (N,) of SoftmaxWeights, where their sweep had it; symmetric: by both directions


class WeightFunction(Enum):
    """f of a coefficient gain * f(s - shift), and its primitive phi, whose sum is the mass."""

    EXPONENTIAL = "exponential"  # f(t) = phi(t) = exp(t)
    CAPPED = "capped"  # f(t) = min(exp(t), 1), phi(t) = exp(t) for t <= 0 and 1 + t above
    SIGMOID = "sigmoid"  # f(t) = 1 / (1 + exp(-t)), phi(t) = log(1 + exp(t))


@dataclass(frozen=True)
class GivenWeights:
    """Coefficients known before the sweep. For negatives

        C_ij = row_gain_i * f(s_ij - row_shift_i) + col_gain_j * f(s_ij - col_shift_j)

    with the function f; C at the positives is positive_coeff; masked pairs have C = 0. A direction whose
    shift is None is absent. With self_similarity both directions are given, equal, and positive_coeff holds
    what a pair counts from both its ends: C is symmetric.
    """

    row_shift: Tensor | None  # (N,) accumulation dtype, as all below
    row_gain: Tensor | None  # (N,)
    col_shift: Tensor | None  # (M,)
    col_gain: Tensor | None  # (M,)
    positive_coeff: Tensor | None  # (N,)
    function: WeightFunction = WeightFunction.EXPONENTIAL


@dataclass(frozen=True)
class SoftmaxWeights:
    """Coefficients of gain * sum_i (logsumexp_j s_ij - s_i,pos), plus the same over columns if asked.

    The backend finds the normalisers itself and chooses the fewest products. The problem has positives.
    """

    columns: bool
    gain: float = 1.0


@dataclass(frozen=True)
class GradNeeds:
    dx: bool
    dy: bool
    moment: bool = False  # row_moment
    row_weight: bool = False  # with GivenWeights of sigmoids by row, and no self_similarity
    stats: bool = False  # PairStats of the same sweep; always given with SoftmaxWeights
    positives: bool = True  # their logits in these; with GivenWeights they may be left out
    late: bool = False  # dx, dy and row_moment may be left as PairGrads.rows


class FinishedRows(NamedTuple):
    dx: Tensor | None  # (N, D)
    dy: Tensor | None  # (M, D)
    row_moment: Tensor | None  # (N,), accumulation dtype


class Rows(Protocol):
    """dx, dy and row_moment of a sweep before the last pass over them, which may overwrite them: it comes once."""

    def finish(self, anchors: Tensor, upstream: Tensor | None, dtype: torch.dtype, *, joined: bool) -> FinishedRows:
        """All times upstream, (), then dx and dy rounded to dtype; joined, dx is the sum of both and dy None.

        anchors are those of the sweep, with any strides.
        """


@dataclass(frozen=True)
class PairGrads:
    """Results of pair_grad, in the accumulation dtype; None where not asked for.

    With self_similarity, dx is the whole gradient of the embeddings and dy is None; row_moment is then
    meaningful only as a sum over rows, half of sum_ij C_ij s_ij.
    """

    dx: Tensor | None  # (N, D)  scale_i * sum_j C_ij y_j
    dy: Tensor | None  # (M, D)  sum_i scale_i * C_ij x_i
    row_moment: Tensor | None  # (N,)  sum_j C_ij s_ij, that is scale_i * dL/dscale_i
    # sum over negatives of phi(s_ij - row_shift_i), the primitive of f. GivenWeights only.
    row_mass: Tensor | None  # (N,)
    col_mass: Tensor | None  # (M,)
    stats: PairStats | None
    rows: Rows | None = None  # where asked for late: in place of dx, dy and row_moment
    row_weight: Tensor | None = None  # (N,)  sum over negatives of f(s_ij - row_shift_i)


class Backend(Protocol):
    """A module or object that implements the operations."""

    def unavailable_reason(self) -> str | None:
        """None where the backend can run, otherwise why it cannot."""

    def positive_logits(self, problem: PairProblem) -> Tensor:
        """Logits of the positives, (N,), accumulation dtype. 2 N D flop."""

    def pair_stats(self, problem: PairProblem, *, columns: bool = False, ranks: bool = False) -> PairStats:
        """One product, 2 N M D flop (half for self_similarity)."""

    def pair_grad(self, problem: PairProblem, weights: GivenWeights | SoftmaxWeights, needs: GradNeeds) -> PairGrads:
        """One product more for each of dx and dy, and what SoftmaxWeights costs."""
