"""CUDA C++ backend: both sweeps on NVIDIA devices from sm_80 on, by the compiled kernels in csrc/cuda.

They need no compiler at run time. Rows of embeddings that do not start on 16 bytes, or are no multiples of that, are
copied first: O((N + M) D) memory more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from contrastile.backends.cuda_launches import CudaKernels
from contrastile.backends.tiled import sweeps
from contrastile.backends.tiled.gradients import ROW_ALIGNMENT, aligned_length, unavailable_products
from contrastile.pairs import GivenWeights, GradNeeds, PairGrads, PairProblem, PairStats, SoftmaxWeights

__all__ = ["CudaBackend", "pair_grad", "pair_stats", "positive_logits", "unavailable_reason"]

OLDEST = (8, 0)  # compute capability


def unavailable_reason() -> str | None:
    try:
        from contrastile import _C
    except ImportError as error:
        return f"the C++ extension contrastile._C is not there ({error})"
    if not hasattr(_C, "cuda"):
        return (
            "contrastile was built without its CUDA kernels (CONTRASTILE_CUDA=1 at installation says what is missing)"
        )
    if not torch.cuda.is_available() or torch.version.hip:
        return "no CUDA device"
    if torch.cuda.get_device_capability() < OLDEST:
        return "the CUDA kernels need compute capability 8.0 or newer"
    return unavailable_products()


@dataclass(frozen=True)
class CudaBackend:
    kernels: CudaKernels

    def positive_logits(self, problem: PairProblem) -> Tensor:
        return sweeps.positive_logits(self.kernels, _aligned_problem(problem))

    def pair_stats(self, problem: PairProblem, *, columns: bool = False, ranks: bool = False) -> PairStats:
        return sweeps.pair_stats(self.kernels, _aligned_problem(problem), columns, ranks)

    def pair_grad(self, problem: PairProblem, weights: GivenWeights | SoftmaxWeights, needs: GradNeeds) -> PairGrads:
        aligned = _aligned_problem(problem)
        depth = problem.anchors.shape[1]
        if aligned.anchors.shape[1] == depth:
            return sweeps.pair_grad(self.kernels, aligned, weights, needs)
        found = sweeps.pair_grad(self.kernels, aligned, weights, replace(needs, late=False))
        return replace(found, dx=_features(found.dx, depth), dy=_features(found.dy, depth))


@cache
def _backend() -> CudaBackend:
    from contrastile import _C

    return CudaBackend(CudaKernels(_C.cuda))


def positive_logits(problem: PairProblem) -> Tensor:
    return _backend().positive_logits(problem)


def pair_stats(problem: PairProblem, *, columns: bool = False, ranks: bool = False) -> PairStats:
    return _backend().pair_stats(problem, columns=columns, ranks=ranks)


def pair_grad(problem: PairProblem, weights: GivenWeights | SoftmaxWeights, needs: GradNeeds) -> PairGrads:
    return _backend().pair_grad(problem, weights, needs)


def _aligned_problem(problem: PairProblem) -> PairProblem:
    anchors = _aligned(problem.anchors)
    candidates = anchors if problem.candidates is problem.anchors else _aligned(problem.candidates)
    return replace(problem, anchors=anchors, candidates=candidates)


def _aligned(embeddings: Tensor) -> Tensor:
    """Rows that start on 16 bytes and are multiples of that, with zeros for features that there are not."""
    rows, depth = embeddings.shape
    lengths = (depth, embeddings.stride(0))
    starts_aligned = embeddings.data_ptr() % ROW_ALIGNMENT == 0
    if starts_aligned and all(aligned_length(n, embeddings.dtype) == n for n in lengths):
        return embeddings
    padded = embeddings.new_zeros(rows, aligned_length(depth, embeddings.dtype))
    padded[:, :depth] = embeddings
    return padded


def _features(gradient: Tensor | None, depth: int) -> Tensor | None:
    return None if gradient is None else gradient[:, :depth].contiguous()
