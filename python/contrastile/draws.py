"""Gamma draws that depend on nothing but a seed and a step, both tensors.

A counter-based generator in integer tensor operations: it has no hidden state, so a checkpoint resumes it exactly; it
gives the same bits on every device, never waits for one, and can be traced by torch.compile. Words are 32 bits in
int64, and no product leaves int64: in the C++ that a compiler makes of this, a signed overflow would be undefined.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

WORD = 2**32 - 1
UNIFORM_BITS = 23  # then k + 1/2 is exact in float32, and no uniform is 0 or 1
# Marsaglia and Tsang reject less than one proposal in twenty for a shape of at least 1: eight in a row, once in 10^10.
PROPOSALS = 8


class GammaDraws(nn.Module):
    """Draws of mean one: G ~ Gamma(shape) / shape, coefficient of variation 1 / sqrt(shape).

    Args:
        shape: at least 1; 1 draws from the exponential distribution.
        generator: where the seed is drawn from; default torch's own, so that torch.manual_seed fixes it.

    Raises:
        ValueError: shape is below 1.
    """

    seed: Tensor
    step: Tensor

    def __init__(self, shape: float = 1.0, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not (shape >= 1 and math.isfinite(shape)):
            raise ValueError(f"shape is {shape}: expected a finite number of at least 1")
        self.shape = shape
        device = "cpu" if generator is None else generator.device
        seed = torch.randint(2**62, (), generator=generator, device=device).cpu()
        self.register_buffer("seed", seed)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, count: int) -> Tensor:
        """The draws of the next step, (count,), float32, above 0."""
        low, high = self.seed & WORD, self.seed >> 32
        key = _mixed((self.step & WORD) ^ low)  # differs from step to step
        keys = key, key ^ high
        self.step.add_(1)
        if self.shape == 1:
            return -_uniforms(keys, 1, count)[0].log()
        # Marsaglia and Tsang, "A simple method for generating gamma variables", 2000, all proposals at once.
        radius, angle, threshold = _uniforms(keys, 3 * PROPOSALS, count).view(3, PROPOSALS, count)
        normal = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
        d = self.shape - 1 / 3
        v = (1 + normal / math.sqrt(9 * d)) ** 3
        accepted = (v > 0) & (threshold.log() < normal**2 / 2 + d * (1 - v + v.clamp(min=1e-30).log()))
        first = accepted.to(torch.int8).argmax(0, keepdim=True)
        chosen = torch.where(accepted.any(0), v.gather(0, first)[0], 1)
        return chosen * (d / self.shape)


def _uniforms(keys: tuple[Tensor, Tensor], streams: int, count: int) -> Tensor:
    """(streams, count), float32, in (0, 1): the position is hashed under one key, and the result under the other."""
    position = torch.arange(streams * count, device=keys[0].device).view(streams, count)
    bits = _mixed(_mixed(position ^ keys[0]) ^ keys[1])
    return ((bits >> (32 - UNIFORM_BITS)).float() + 0.5) * 2.0**-UNIFORM_BITS


def _mixed(word: Tensor) -> Tensor:
    """Bijection of 32-bit words in which every bit moves every other: triple32 of C. Wellons' hash prospector."""
    # Two factors lie above 2^31. Less 2^32 they are the same to the masked product, and small enough for int64.
    word = word ^ (word >> 17)
    word = (word * (0xED5AD4BB - 2**32)) & WORD
    word = word ^ (word >> 11)
    word = (word * (0xAC4C1B51 - 2**32)) & WORD
    word = word ^ (word >> 15)
    word = (word * 0x31848BAB) & WORD
    return word ^ (word >> 14)
