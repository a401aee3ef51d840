"""What a softmax over candidates may have beside its pairs of a batch, and the checks of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastile.validation import (
    EMBEDDING_DTYPES,
    PairInputs,
    accumulation_dtype,
    check_number,
    check_vector,
)


class Prior(NamedTuple):
    """tau, the chance that a negative is of its row's class; numbers, or one for each row (N,)."""

    log: float | Tensor  # log tau
    log_rest: float | Tensor  # log (1 - tau)


class SoftmaxTerms(NamedTuple):
    hard_negatives: Tensor | None = None  # (N, K, D) each row's own, or (L, D) shared; still attached to its graph
    label_smoothing: float = 0.0
    prior: Prior | None = None
    most_similar: Tensor | None = None  # (N,) a negative of a larger product <x_i, y_j> is masked

    def ceiling(self, scale: Tensor) -> Tensor | None:
        """In logits of that scale, () or (N,)."""
        return None if self.most_similar is None else self.most_similar * scale.detach().to(self.most_similar.dtype)


class Options(NamedTuple):
    """The same as users pass them in."""

    hard_negatives: Tensor | None = None
    label_smoothing: float = 0.0
    prior: float | Tensor | None = None
    false_negative_margin: float | None = None

    @property
    def given(self) -> bool:
        objects = self.hard_negatives, self.prior, self.false_negative_margin
        return self.label_smoothing != 0 or any(option is not None for option in objects)

    @property
    def counting(self) -> list[str]:
        """Names of those given that need the number of candidates."""
        given = {"label_smoothing": self.label_smoothing != 0, "prior": self.prior is not None}
        return [name for name, is_given in given.items() if is_given]

    def facts(self) -> dict[str, Any]:
        """What must be equal in all processes of a group."""
        prior, hard = self.prior, self.hard_negatives
        return {
            "label_smoothing": self.label_smoothing,
            "false_negative_margin": self.false_negative_margin,
            "prior": "by row" if isinstance(prior, Tensor) and prior.dim() else prior is not None,
            "hard_negatives": hard if not isinstance(hard, Tensor) else {2: "shared", 3: "by row"}.get(hard.dim()),
        }

    def checked(
        self, inputs: PairInputs, *, columns: bool, scale_name: str = "scale"
    ) -> tuple[PairInputs, SoftmaxTerms]:
        """Checked against the embeddings, which autocast may widen.

        Args:
            columns: a softmax over columns takes part.
        """
        inputs, hard = _check_hard_negatives(self.hard_negatives, inputs)
        smoothing = check_number("label_smoothing", self.label_smoothing, 0, 1)
        prior = None if self.prior is None else _check_prior(self.prior, inputs.x)
        if prior is not None and columns and inputs.scale.dim():
            raise ValueError(
                f"prior with a {scale_name} of shape {tuple(inputs.scale.shape)}: over columns the floor "
                f"exp(-{scale_name}) needs one {scale_name}"
            )
        terms = SoftmaxTerms(hard, smoothing, prior, self._most_similar(inputs, columns, scale_name))
        return inputs._replace(row_ceiling=terms.ceiling(inputs.scale)), terms

    def _most_similar(self, inputs: PairInputs, columns: bool, scale_name: str) -> Tensor | None:
        margin = self.false_negative_margin
        if margin is None:
            return None
        check_number("false_negative_margin", margin, -math.inf)
        for name in self.counting:
            raise ValueError(
                f"{name} with a false_negative_margin: both would need the number of negatives that it leaves; "
                "expected one of them"
            )
        if columns and inputs.scale.dim():
            raise ValueError(
                f"false_negative_margin with a {scale_name} of shape {tuple(inputs.scale.shape)}: over columns it "
                f"needs one {scale_name}"
            )
        columns_of = inputs.x if inputs.y is None else inputs.y
        assert inputs.positives is not None
        with torch.no_grad():
            dtype = accumulation_dtype(inputs.x.dtype)
            return (inputs.x.to(dtype) * columns_of[inputs.positives].to(dtype)).sum(1) + margin


def _check_hard_negatives(hard: Tensor | None, inputs: PairInputs) -> tuple[PairInputs, Tensor | None]:
    if hard is None:
        return inputs, None
    rows, depth = inputs.x.shape
    expected = f"expected ({rows}, K, {depth}), each row's own, or (L, {depth}), shared"
    if not isinstance(hard, Tensor):
        raise TypeError(f"hard_negatives is {type(hard).__name__}: {expected}")
    if hard.dtype not in EMBEDDING_DTYPES:
        raise TypeError(f"hard_negatives is {hard.dtype}: expected float16, bfloat16, float32 or float64")
    if hard.dim() not in (2, 3) or hard.shape[-1] != depth or (hard.dim() == 3 and hard.shape[0] != rows):
        raise ValueError(f"hard_negatives has shape {tuple(hard.shape)}: {expected}")
    if hard.device != inputs.x.device:
        raise ValueError(f"hard_negatives is on {hard.device}, the embeddings are on {inputs.x.device}")
    if hard.dtype != inputs.x.dtype:
        if not torch.is_autocast_enabled(inputs.x.device.type):
            raise TypeError(
                f"x is {inputs.x.dtype} but hard_negatives is {hard.dtype}: both need the same dtype outside autocast"
            )
        wider = torch.promote_types(inputs.x.dtype, hard.dtype)
        y = None if inputs.y is None else inputs.y.to(wider)
        inputs, hard = inputs._replace(x=inputs.x.to(wider), y=y), hard.to(wider)
    return inputs, hard


def _check_prior(prior: float | Tensor, like: Tensor) -> Prior:
    if not isinstance(prior, Tensor):
        _check_below_one(check_number("prior", prior, 0))
        return Prior(math.log(prior) if prior > 0 else -math.inf, math.log1p(-prior))
    if prior.dim():
        prior = check_vector("prior", prior, like.shape[0], like)
    elif prior.dtype.is_floating_point:
        prior = prior.detach().to(device=like.device, dtype=accumulation_dtype(like.dtype))
    else:
        raise TypeError(f"prior is {prior.dtype}: expected a number or a floating-point tensor, () or ({len(like)},)")
    if not torch.compiler.is_compiling() and like.device.type == "cpu" and not bool(((prior >= 0) & (prior < 1)).all()):
        raise ValueError(
            f"prior of shape {tuple(prior.shape)} holds {prior[~((prior >= 0) & (prior < 1))][0].item()}: "
            "expected numbers from 0 to below 1"
        )
    return Prior(prior.log(), (-prior).log1p())


def _check_below_one(prior: float) -> None:
    if prior >= 1:
        raise ValueError(f"prior is {prior}: expected a number from 0 to below 1")
