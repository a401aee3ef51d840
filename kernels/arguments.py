"""What the kernels take, in groups: tensors at a launch, pointers in a kernel."""

from __future__ import annotations

from typing import Any, NamedTuple


class Pairs(NamedTuple):
    """Embeddings and masks of a problem. Where one triangle is launched, positives are mutual and all scales equal."""

    anchors: Any  # (N, D), unit stride along D
    candidates: Any  # (M, D), likewise
    anchor_stride: Any  # elements from a row to the next
    candidate_stride: Any
    scale: Any  # (N,) float32
    positives: Any  # (N,) int64 or None
    row_groups: Any  # (N,) int64 or None
    col_groups: Any  # (M,) int64 or None
    row_ceiling: Any  # (N,) float32 or None
    self_offset: Any  # row i and column i + self_offset are one sample; None: all are different
    rows: Any  # N
    cols: Any  # M


class Window(NamedTuple):
    """The pairs of one launch. Its sides end with a whole tile or with all pairs."""

    first_row: Any
    first_col: Any
    rows: Any
    cols: Any


class Sums(NamedTuple):
    """Of exponentials, by row or by column; None where not asked for. One line for each tile on the way."""

    max: Any  # (tiles, length): a shift, at most 55 above the largest logit (14 in totals); -inf where there is none
    sum: Any  # (tiles, length): sum of exp(logit - shift)
    mass: Any  # (tiles, length): sum of phi, the primitive of the weights; of the gradient sweep alone
    weight: Any = None  # (tiles, length): sum of the weights f themselves; of sigmoids, by row alone


class Weights(NamedTuple):
    """GivenWeights as a kernel takes them; a direction without a shift is absent."""

    row_shift: Any  # (N,) float32, as all below
    row_gain: Any  # (N,)
    col_shift: Any  # (M,)
    col_gain: Any  # (M,)
    positive_coeff: Any  # (N,)


class Strip(NamedTuple):
    """Where the coefficients go."""

    coefficients: Any  # (window rows, window columns); None: only sums are wanted
    stride: Any  # elements from a row to the next
    factor: Any  # (1,) float32 that all are multiplied with, to fit float16; None: 1
    rows: Any = None  # (N,) bool: tiles without any of these rows stay as they are, and give no sums; None: all do


class Gradients(NamedTuple):
    """What the products are added to, contiguous and float32, two arrays also where X is Y. The owned side's is not
    None.
    """

    anchors: Any  # (N, D) or None
    candidates: Any  # (M, D) or None
    factor: Any  # (1,) float32 that all coefficients are multiplied with, to fit float16; None: 1


class RowPass(NamedTuple):
    """gradient = factor * (row_factors * sums + other_sums), rounded to its dtype, and moments, the dot products of
    embeddings with the part that sums have in it. What is None is left out.
    """

    sums: Any  # (N, D) float32, contiguous
    row_factors: Any  # (N,) float32
    other_sums: Any  # (N, D) float32, contiguous
    factor: Any  # (1,) float32
    embeddings: Any  # (N, D)
    gradient: Any  # (N, D), contiguous, written; may be sums
    moments: Any  # (N,) float32, written
