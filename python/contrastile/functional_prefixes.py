"""InfoNCE over prefixes of the features in one sweep, in the manner of functional.py; `matryoshka` asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from contrastile import autograd, backends, formulas_prefixes
from contrastile.formulas import NOTHING, wants_of
from contrastile.formulas_prefixes import PrefixTerms
from contrastile.validation import check_pairs
from contrastile.version import __version__

# Options of info_nce that the sweep over prefixes has, beside `backend`; and those that it is without.
SWEPT = ("scale", "symmetric", "positives", "reduction")
ABSENT = ("groups", "hard_negatives", "prior", "false_negative_margin", "group", "exchange")

# Products must be spared that outweigh what one sweep has more of: passes over several logits of a pair, and windows,
# the workspace being shared by them, whose logits are formed twice.
LEAST_FEATURES_SPARED = 12  # for each of the prefixes
LEAST_SHARE_SPARED = 1 / 4  # of the longest prefix


def pays(dims: Sequence[int]) -> bool:
    """Whether one sweep over these prefixes, which are distinct, is faster than one for each."""
    spared = sum(dims) - max(dims)
    return spared >= LEAST_FEATURES_SPARED * len(dims) and spared >= LEAST_SHARE_SPARED * max(dims)


def fits(embeddings: Sequence[Tensor], dims: Sequence[int], options: Mapping[str, Any]) -> bool:
    """Whether one sweep of the C++ backend serves info_nce over all the prefixes, and pays.

    What info_nce refuses is left to it, and its words: this raises nothing but what `backends.resolve` does.
    """
    absent = all(options.get(name) is None for name in ABSENT) and options.get("label_smoothing", 0.0) == 0
    known = {*SWEPT, *ABSENT, "label_smoothing", "backend"}
    if not absent or not options.keys() <= known or "scale" not in options:
        return False
    if len(set(dims)) < len(dims) or not pays(dims) or options.get("reduction", "mean") not in ("mean", "sum"):
        return False
    if len(embeddings) != 2 or any(rows.device.type != "cpu" or rows.dim() != 2 for rows in embeddings):
        return False
    x, y = embeddings
    return x.dtype == y.dtype and backends.resolve(options.get("backend"), "cpu", x.dtype) == "cpu"


def info_nce_over_prefixes(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    *,
    dims: Sequence[int],
    weights: Sequence[float],
    normalize: bool,
    symmetric: bool = True,
    positives: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """sum_k weight_k info_nce( first dims_k features ), on the C++ backend. Arguments as for `matryoshka`."""
    in_order = sorted(zip(dims, weights, strict=True))
    longest = in_order[-1][0]
    inputs = check_pairs(x[:, :longest], y[:, :longest], scale, positives, None, both_directions=symmetric)
    terms = PrefixTerms(
        [int(dim) for dim, _ in in_order], [weight for _, weight in in_order], normalize, bool(symmetric), reduction
    )
    wants = wants_of(inputs)
    if torch.compiler.is_compiling():
        loss: Tensor = torch.ops.contrastile.prefixes(*inputs, *terms, *wants, __version__)[0]
        return loss
    if autograd.needs_no_derivative(wants, *inputs[:3]):
        return formulas_prefixes.prefixes_forward(inputs, terms, NOTHING)[0]
    apply: Any = autograd.PrefixesFunction.apply
    loss = apply(*inputs, *terms)
    return loss
