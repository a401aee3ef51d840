"""Launches of the CUDA C++ kernels in csrc/cuda."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from contrastile.backends.float32 import float32_products
from contrastile.backends.tiled.launches import Sweep
from contrastile.kernels.arguments import Gradients, RowPass, Strip, Sums, Weights, Window
from contrastile.kernels.plans import TilePlan
from contrastile.pairs import GivenWeights, PairProblem, PairStats, SoftmaxWeights, WeightFunction
from contrastile.statistics import softmax_weights

ELEMENT_TYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


class CudaSweep(Sweep):
    def __init__(self, problem: PairProblem, plan: TilePlan, native: ModuleType) -> None:
        super().__init__(problem, plan)
        problem = self.problem
        self.native = native
        self.device = problem.anchors.device
        self.pairs = native.Pairs(
            anchors=_at(problem.anchors),
            candidates=_at(problem.candidates),
            element_type=ELEMENT_TYPES[problem.anchors.dtype],
            float32_products=float32_products("sm_80") if problem.anchors.dtype == torch.float32 else "ieee",
            anchor_stride=problem.anchors.stride(0),
            candidate_stride=problem.candidates.stride(0),
            rows=problem.rows,
            cols=problem.cols,
            depth=problem.anchors.shape[1],
            scale=_at(problem.scale),
            positives=_at(problem.positives),
            row_groups=_at(problem.row_groups),
            col_groups=_at(problem.col_groups),
            row_ceiling=_at(problem.row_ceiling),
            self_offset=problem.self_offset,
        )

    def statistics(
        self, window: Window, row_sums: Sums, col_sums: Sums, positive_logit: Tensor | None, row_rank: Tensor | None
    ) -> None:
        sums = self._sums(row_sums), self._sums(col_sums)
        self._start("statistics", self.pairs, self._window(window), *sums, _at(positive_logit), _at(row_rank))

    def coefficients(
        self, window: Window, weights: Weights, strip: Strip, row_sums: Sums, col_sums: Sums, function: WeightFunction
    ) -> None:
        coefficients, stride, factor, rows = strip
        is_float32 = coefficients is not None and coefficients.dtype == torch.float32
        into = self.native.Strip(_at(coefficients), is_float32, stride, _at(factor), _at(rows))
        sums = self._sums(row_sums), self._sums(col_sums)
        self._start("coefficients", self.pairs, self._window(window), self._weights(weights, function), into, *sums)

    def gradient(
        self,
        window: Window,
        weights: Weights,
        gradients: Gradients,
        row_sums: Sums,
        col_sums: Sums,
        function: WeightFunction,
    ) -> None:
        into = self.native.Gradients(*map(_at, gradients))
        sums = self._sums(row_sums), self._sums(col_sums)
        self._start("gradient", self.pairs, self._window(window), self._weights(weights, function), into, *sums)

    def merge(self, tiles: Sums, totals: Sums) -> None:
        lines, length = next(lines for lines in tiles if lines is not None).shape
        self._start("merge", self._sums(tiles), self._sums(totals), lines, length)

    def positives(self) -> Tensor | None:
        if self.problem.positives is None:
            return None
        found = torch.empty_like(self.problem.scale)
        self._start("positives", self.pairs, _at(found))
        return found

    def _window(self, window: Window) -> Any:
        return self.native.Window(*window)

    def _sums(self, sums: Sums) -> Any:
        return self.native.Sums(*map(_at, sums))

    def _weights(self, weights: Weights, function: WeightFunction) -> Any:
        return self.native.Weights(*map(_at, weights), function.value)

    def _start(self, kernel: str, *arguments: Any) -> None:
        start(self.native, self.device, kernel, *arguments)


@dataclass(frozen=True)
class CudaKernels:
    """contrastile.backends.tiled.launches.Kernels."""

    native: ModuleType  # contrastile._C.cuda, or what offers the same launches

    def sweep(self, problem: PairProblem, plan: TilePlan) -> CudaSweep:
        return CudaSweep(problem, plan, self.native)

    def statistics_plan(self, problem: PairProblem, ranks: bool) -> TilePlan:
        return _plan(self.native.SUMS_TILE)

    def strip_plan(self, problem: PairProblem, sums: bool) -> TilePlan:
        return _plan(self.native.SUMS_TILE)

    def fused_plan(self, problem: PairProblem, sums: bool, capped: bool) -> TilePlan | None:
        x = problem.anchors
        if problem.self_similarity or x.dtype == torch.float32 or x.shape[1] > self.native.MOST_FUSED_FEATURES:
            return None
        return _plan(self.native.GRADIENT_TILE)

    def tuned(self, sweep: str, problem: PairProblem, plan: TilePlan, run: Callable[[TilePlan], object]) -> TilePlan:
        return plan  # tiles are compiled in

    def softmax_weights(
        self, problem: PairProblem, stats: PairStats, weights: SoftmaxWeights
    ) -> tuple[GivenWeights, Tensor | None]:
        assert problem.positives is not None
        gain = torch.full_like(stats.row_max, weights.gain)
        col_gain = gain if weights.columns else None
        return softmax_weights(stats, problem.positives, gain, col_gain, problem.self_similarity), None

    def finish_rows(self, rows: RowPass) -> None:
        embeddings = None if rows.embeddings is None else rows.embeddings.contiguous()
        given = rows.gradient if embeddings is None else embeddings
        assert given is not None
        row_sums = self.native.RowSums(
            values=_at(rows.sums),
            other_values=_at(rows.other_sums),
            row_factors=_at(rows.row_factors),
            factor=_at(rows.factor),
            embeddings=_at(embeddings),
            embedding_stride=given.stride(0),
            element_type=ELEMENT_TYPES[given.dtype],
            gradient=_at(rows.gradient),
            rounds=rows.gradient is not None and rows.gradient.dtype != torch.float32,
            moments=_at(rows.moments),
            rows=rows.sums.shape[0],
            depth=rows.sums.shape[1],
        )
        start(self.native, rows.sums.device, "finish_rows", row_sums)


def start(native: ModuleType, device: torch.device, kernel: str, *arguments: Any) -> None:
    """On the current stream of the device."""
    is_cuda = device.type == "cuda"
    guard: AbstractContextManager[Any] = torch.cuda.device(device) if is_cuda else nullcontext()
    with guard:
        stream = torch.cuda.current_stream(device).cuda_stream if is_cuda else 0
        getattr(native, kernel)(*arguments, stream)


def _plan(tile: tuple[int, int]) -> TilePlan:
    rows, cols = tile
    return TilePlan(rows, cols, block_depth=64, group_rows=8, num_warps=4, num_stages=2, descriptors=False)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
