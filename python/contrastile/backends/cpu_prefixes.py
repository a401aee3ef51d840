"""InfoNCE over several prefixes of the features in one sweep, in C++: csrc/cpu/prefix_sweep.h, through contrastile._C.

It is beside the two sweeps of pairs.py because it has several logits for a pair, which are partial sums of one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from contrastile.backends import workspace_bytes
from contrastile.backends.cpu import address, embedding_view, extension
from contrastile.pairs import GradNeeds, PairProblem, PairStats


class Prefix(NamedTuple):
    length: int
    gain: float  # of every row's loss in the objective; with columns of every column's


class PrefixGrads(NamedTuple):
    """Of sum_k gain_k (losses of prefix k), in the accumulation dtype; None where not asked for."""

    dx: Tensor | None  # (N, D)
    dy: Tensor | None  # (M, D)
    row_moment: Tensor | None  # (N,)  scale_i * dL/dscale_i


def prefix_softmax(
    problem: PairProblem, prefixes: Sequence[Prefix], *, columns: bool, normalize: bool, needs: GradNeeds
) -> tuple[list[PairStats], PrefixGrads]:
    """The statistics of every prefix's negatives, and the gradients that are asked for.

    problem: with positives, which are distinct where columns take part, and neither masks nor self_similarity.
    prefixes: ascending, the last one all features.
    normalize: every prefix of a row to unit length, as F.normalize does it; else logits of the rows as they are.
    """
    c, dtype = extension(), problem.scale.dtype
    suffix = "_float64" if dtype == torch.float64 else "_float32"
    positives = problem.positives
    assert positives is not None
    (n, depth), m, count = problem.anchors.shape, problem.cols, len(prefixes)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu")

    row_max, row_sum, positive_logit = empty(count, n), empty(count, n), empty(count, n)
    col_max, col_sum = (empty(count, m), empty(count, m)) if columns else (None, None)
    grads = PrefixGrads(
        dx=empty(n, depth) if needs.dx else None,
        dy=empty(m, depth) if needs.dy else None,
        row_moment=empty(n) if needs.moment else None,
    )
    native_problem = getattr(c, "PrefixProblem" + suffix)(
        anchors=embedding_view(problem.anchors, "x"),
        candidates=embedding_view(problem.candidates, "y"),
        scale=address(problem.scale, "scale"),
        positives=address(positives, "positives"),
        ends=[prefix.length for prefix in prefixes],
        gains=[prefix.gain for prefix in prefixes],
        columns=columns,
        normalize=normalize,
    )
    results = {"row_max": row_max, "row_sum": row_sum, "col_max": col_max, "col_sum": col_sum}
    results |= {"positive_logit": positive_logit, **grads._asdict()}
    native_results = getattr(c, "PrefixResults" + suffix)(
        **{name: None if result is None else result.data_ptr() for name, result in results.items()}
    )
    execution = c.Execution(threads=torch.get_num_threads(), workspace_bytes=workspace_bytes())
    getattr(c, "prefix_softmax" + suffix)(native_problem, native_results, execution)
    stats = [
        PairStats(
            row_max[k],
            row_sum[k],
            None if col_max is None else col_max[k],
            None if col_sum is None else col_sum[k],
            positive_logit[k],
        )
        for k in range(count)
    ]
    return stats, grads
