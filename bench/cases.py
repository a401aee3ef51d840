"""What is measured: a loss of one implementation on random unit rows, and what it must cost at least.

Products are counted, nothing else: one product of (N, D) with (D, M) is 2 N M D flop.

    gamma           3 products   scores, dX, dY: the weights are known before the sweep
    one_direction   3 products   the row sums of a strip are complete before its gradient is formed
    symmetric       4 products   column sums end with the last row, so scores are needed twice
    nt_xent         2 products   N rows against themselves: half of the scores, one gradient, scores twice

The count is that of the fused algorithm for every implementation, so that fractions of peak compare:
one that computes more products is that much further from the peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from contrastile import reference
from torch import Tensor

PRODUCTS = {"gamma": 3, "one_direction": 3, "symmetric": 4, "nt_xent": 2}
LOSSES = tuple(PRODUCTS)
SQUARE_LOSSES = ("gamma", "symmetric", "nt_xent")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Where tensors are. "cuda" is ROCm's name too. "interpreter" is the CPU, with Triton's kernels interpreted: a dry run.
DEVICES = ("cpu", "cuda", "interpreter")
SCALE = 20.0
ERROR_ROWS = 512  # where a float64 truth is cheap
PRODUCT_BUFFER_BYTES = 1 << 30  # for the scores of the product that is timed beside each case


@dataclass(frozen=True)
class Case:
    """One thing to measure. backend is for contrastile only; None is its automatic choice."""

    loss: str
    implementation: str
    rows: int
    cols: int
    dim: int = 512
    dtype: str = "float32"
    threads: int = 2
    backend: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.loss not in PRODUCTS:
            raise ValueError(f"loss is {self.loss!r}, expected one of {', '.join(LOSSES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}, expected one of {', '.join(DEVICES)}")
        if min(self.rows, self.cols, self.dim, self.threads) < 1:
            raise ValueError(f"rows, cols, dim and threads must be positive, got {self}")
        if self.loss in SQUARE_LOSSES and self.rows != self.cols:
            raise ValueError(f"{self.loss} needs rows == cols, got {self.rows} and {self.cols}")
        if self.loss == "nt_xent" and self.rows % 2:
            raise ValueError(f"nt_xent needs an even number of rows (two views of each), got {self.rows}")

    @property
    def label(self) -> str:
        return f"{self.implementation}[{self.backend}]" if self.backend else self.implementation

    @property
    def tensor_device(self) -> str:
        return "cuda" if self.device == "cuda" else "cpu"

    @property
    def flop(self) -> int:
        """Of the products alone."""
        return 2 * PRODUCTS[self.loss] * self.rows * self.cols * self.dim

    @property
    def embedding_bytes(self) -> int:
        """Of the inputs, and as much again of their gradients."""
        count = self.rows if self.loss == "nt_xent" else self.rows + self.cols
        return count * self.dim * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Inputs:
    """Leaves that want gradients, and the constants of the gamma loss."""

    x: Tensor  # (N, D)
    y: Tensor | None  # (M, D); None for nt_xent, whose x holds both views
    log_u: Tensor  # (N,)
    log_v: Tensor  # (M,)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x] if self.y is None else [self.x, self.y]

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        return self.x, self.x if self.y is None else self.y


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """The same numbers on every device: drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    dtype, device = DTYPES[case.dtype], case.tensor_device

    def unit_rows(count: int) -> Tensor:
        rows = torch.randn(count, case.dim, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        return rows.to(device, dtype).requires_grad_()

    # E exp(s) of random unit rows is near exp(scale^2 / 2D): weights as a well trained memory would hold
    # them, with a spread, and no sweep needed to find them.
    def log_weights(count: int, others: int) -> Tensor:
        spread = 0.1 * torch.randn(count, generator=generator)
        return (spread - math.log(others) - SCALE**2 / (2 * case.dim)).to(device)

    x = unit_rows(case.rows)
    y = None if case.loss == "nt_xent" else unit_rows(case.cols)
    return Inputs(x, y, log_weights(case.rows, case.cols), log_weights(case.cols, case.rows))


def true_loss(loss: str, inputs: Inputs) -> Tensor:
    """The loss by its definition, in the precision of the inputs."""
    x, y = inputs.pair
    if loss == "gamma":
        return reference.gamma_contrastive(x, y, SCALE, inputs.log_u, inputs.log_v).loss
    if loss == "nt_xent":
        return reference.nt_xent(x, SCALE)
    return reference.info_nce(x, y, SCALE, symmetric=loss == "symmetric")
