"""Triton backend: both sweeps on NVIDIA and AMD devices, by the kernels in contrastile.kernels.

With TRITON_INTERPRET=1 the kernels run in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from contrastile.backends.tiled import sweeps
from contrastile.backends.tiled.gradients import unavailable_products
from contrastile.backends.triton_launches import TritonKernels, interpreting
from contrastile.pairs import GivenWeights, GradNeeds, PairGrads, PairProblem, PairStats, SoftmaxWeights

__all__ = ["interpreting", "pair_grad", "pair_stats", "positive_logits", "unavailable_reason"]

KERNELS = TritonKernels()
OLDEST = (3, 5)  # of Triton: before, a kernel's function that calls itself by constants never ends


def unavailable_reason() -> str | None:
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return (
            f"Triton {triton.__version__} does not compile the kernels: {'.'.join(map(str, OLDEST))} or newer is needed"
        )
    return unavailable_products()


def positive_logits(problem: PairProblem) -> Tensor:
    return sweeps.positive_logits(KERNELS, problem)


def pair_stats(problem: PairProblem, *, columns: bool = False, ranks: bool = False) -> PairStats:
    return sweeps.pair_stats(KERNELS, problem, columns, ranks)


def pair_grad(problem: PairProblem, weights: GivenWeights | SoftmaxWeights, needs: GradNeeds) -> PairGrads:
    return sweeps.pair_grad(KERNELS, problem, weights, needs)
