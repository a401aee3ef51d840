"""A temperature of its own for every sample, that outlives a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastile.normalizer import Float32State, check_count, mean_of_equals


class SampleTemperatures(Float32State):
    """One temperature per sample and side, r_i times that of the loss, moved at each visit down its own slope:

        m_i  <-  (1 - slope_rate) m_i + slope_rate dF_i / dr_i
        r_i  <-  r_i - step m_i,  held from lowest to highest

    F_i is the objective of `RobustContrastiveLoss`; its slope is rho less the divergence of the sample's weights from
    equal ones, so that a sample whose negatives are told apart by more than rho gets a higher temperature. They start
    at r_i = 1 and m_i = 0. A sample that occurs several times in a batch moves once, by the mean of its slopes. A slope
    that is not finite moves nothing. Qiu et al., "Not all semantics are created equal", ICML 2023, algorithm 1.

    Buffers, float32 whatever dtype the module is cast to or loads: 16 bytes a sample, half of it without columns.
        relative (2, num_samples), of rows and columns, or (1, num_samples): r_i.
        momentum, of the same shape: m_i.

    Args:
        num_samples: number of samples that indices run over.
        rho: divergence that temperatures aim at, in nats. That of B - 1 negatives is log(B - 1) at most: a rho beyond
            it drives every temperature down to `lowest`.
        step: length of a step, in units of the loss's temperature; 0 leaves all temperatures as they are (SogCLR).
        slope_rate: share of the visit in m_i, in (0, 1].
        lowest, highest: bounds of r_i, around 1.
        columns: keep temperatures of columns too.

    Raises:
        ValueError: an argument is out of its range.
    """

    relative: Tensor
    momentum: Tensor

    def __init__(
        self,
        num_samples: int,
        *,
        rho: float,
        step: float = 1.0,
        slope_rate: float = 0.9,
        lowest: float = 0.5,
        highest: float = 5.0,
        columns: bool = True,
    ) -> None:
        super().__init__()
        check_count(num_samples)
        for name, value in (("rho", rho), ("step", step)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}: expected a finite number of at least 0")
        if not 0 < slope_rate <= 1:
            raise ValueError(f"slope_rate is {slope_rate}: expected a number above 0, at most 1")
        if not 0 < lowest <= 1 <= highest < float("inf"):
            raise ValueError(f"lowest is {lowest} and highest {highest}: expected 0 < lowest <= 1 <= highest")
        self.rho, self.step, self.slope_rate = rho, step, slope_rate
        self.lowest, self.highest = lowest, highest
        sides = 2 if columns else 1
        self.register_buffer("relative", torch.ones(sides, num_samples, dtype=torch.float32))
        self.register_buffer("momentum", torch.zeros(sides, num_samples, dtype=torch.float32))

    def forward(self, index: Tensor) -> Tensor:
        """r of the samples `index` (B,) int64, (sides, B)."""
        return self.relative[:, index]

    @torch.no_grad()
    def update(self, index: Tensor, slopes: Tensor) -> None:
        """Takes in dF_i / dr_i of the samples `index` (B,), (sides, B)."""
        slopes = mean_of_equals(index, slopes.to(self.momentum.dtype))
        before = self.momentum[:, index]
        momentum = torch.lerp(before, slopes, self.slope_rate)
        momentum = torch.where(slopes.isfinite(), momentum, before)
        relative = self.relative[:, index]
        moved = (relative - self.step * momentum).clamp(self.lowest, self.highest)
        # Equal indices carry equal values by now, so the order of these writes does not matter.
        self.momentum.index_copy_(1, index, momentum)
        self.relative.index_copy_(1, index, torch.where(slopes.isfinite(), moved, relative))

    def stats(self) -> dict[str, Tensor]:
        """Of all samples and sides, each (): mean of r_i, and the shares that lie at either bound."""
        return {
            "temperature": self.relative.mean(),
            "at_lowest": (self.relative <= self.lowest).float().mean(),
            "at_highest": (self.relative >= self.highest).float().mean(),
        }

    def extra_repr(self) -> str:
        sides, samples = self.relative.shape
        return (
            f"{samples}, rho={self.rho}, step={self.step}, slope_rate={self.slope_rate}, lowest={self.lowest}, "
            f"highest={self.highest}, columns={sides == 2}"
        )
