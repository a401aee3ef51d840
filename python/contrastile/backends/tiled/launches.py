"""What the tiled sweeps ask of a backend: its kernels, and how it cuts a problem into tiles."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from math import isqrt
from typing import Protocol

import torch
from torch import Tensor

from contrastile.kernels.arguments import Gradients, RowPass, Strip, Sums, Weights, Window
from contrastile.kernels.plans import TilePlan, window_plan
from contrastile.pairs import GivenWeights, PairProblem, PairStats, SoftmaxWeights, WeightFunction

FULL_TILES = 8  # of a window that is worth its launches, for each multiprocessor


class Sweep(ABC):
    """A problem made ready for the launches of one plan. None of them waits for the device."""

    def __init__(self, problem: PairProblem, plan: TilePlan) -> None:
        self.problem = _with_contiguous_vectors(problem)
        self.plan = plan

    def windows(self, most_pairs: int) -> Iterator[Window]:
        problem = self.problem
        smallest = isqrt(FULL_TILES * _multiprocessors(problem.anchors.device)) * self.multiple
        plan = window_plan(problem.rows, problem.cols, most_pairs, self.multiple, problem.self_similarity, smallest)
        return plan.windows(problem.rows, problem.cols, problem.self_similarity)

    @property
    def multiple(self) -> int:
        """Of which the sides of a window are multiples, unless they end with the problem."""
        return max(self.plan.block_rows, self.plan.block_cols)

    @abstractmethod
    def statistics(
        self, window: Window, row_sums: Sums, col_sums: Sums, positive_logit: Tensor | None, row_rank: Tensor | None
    ) -> None:
        """Sums over the negatives of each tile; ranks are added to what row_rank holds."""

    @abstractmethod
    def coefficients(
        self, window: Window, weights: Weights, strip: Strip, row_sums: Sums, col_sums: Sums, function: WeightFunction
    ) -> None:
        """Coefficients of each tile into the strip, and the sums met on the way."""

    @abstractmethod
    def gradient(
        self,
        window: Window,
        weights: Weights,
        gradients: Gradients,
        row_sums: Sums,
        col_sums: Sums,
        function: WeightFunction,
    ) -> None:
        """Both or one of the gradients by the fused kernel, and the sums met on the way."""

    @abstractmethod
    def merge(self, tiles: Sums, totals: Sums) -> None:
        """Lines of tiles into totals (length,), joined with what these hold."""

    @abstractmethod
    def positives(self) -> Tensor | None:
        """Logits of the positives, (N,), as the tiles compute them."""


class Kernels(Protocol):
    """Of a backend. A plan of the fused kernel is None where a strip serves better."""

    def sweep(self, problem: PairProblem, plan: TilePlan) -> Sweep: ...

    def statistics_plan(self, problem: PairProblem, ranks: bool) -> TilePlan: ...

    def strip_plan(self, problem: PairProblem, sums: bool) -> TilePlan: ...

    def fused_plan(self, problem: PairProblem, sums: bool, capped: bool) -> TilePlan | None: ...

    def tuned(self, sweep: str, problem: PairProblem, plan: TilePlan, run: Callable[[TilePlan], object]) -> TilePlan:
        """The fastest plan that is known for this sweep; `run` does it by a plan."""

    def softmax_weights(
        self, problem: PairProblem, stats: PairStats, weights: SoftmaxWeights
    ) -> tuple[GivenWeights, Tensor | None]:
        """As weights known before a sweep, and the losses of the rows, (N,), where they come with them."""

    def finish_rows(self, rows: RowPass) -> None:
        """The last pass over the rows of a gradient."""


def _with_contiguous_vectors(problem: PairProblem) -> PairProblem:
    """Kernels take strides of embeddings alone."""
    vectors = ("scale", "positives", "row_groups", "col_groups", "row_ceiling")
    given = {name: getattr(problem, name) for name in vectors}
    return replace(problem, **{name: vector.contiguous() for name, vector in given.items() if vector is not None})


@cache
def _multiprocessors(device: torch.device) -> int:
    """0 of a processor, which takes tiles one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
