"""Gamma draws that depend on nothing but a seed and a step, both tensors.

A counter-based generator (SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014) in integer tensor operations: it has no hidden state, so a checkpoint resumes it exactly, it gives the same
bits on every device, it never waits for a device, and it can be traced by torch.compile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

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
        key = _mixed(self.seed + _mixed(self.step))
        self.step.add_(1)
        if self.shape == 1:
            return -_uniforms(key, 1, count)[0].log()
        # Marsaglia and Tsang, "A simple method for generating gamma variables", 2000, all proposals at once.
        radius, angle, threshold = _uniforms(key, 3 * PROPOSALS, count).view(3, PROPOSALS, count)
        normal = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
        d = self.shape - 1 / 3
        v = (1 + normal / math.sqrt(9 * d)) ** 3
        accepted = (v > 0) & (threshold.log() < normal**2 / 2 + d * (1 - v + v.clamp(min=1e-30).log()))
        first = accepted.to(torch.int8).argmax(0, keepdim=True)
        chosen = torch.where(accepted.any(0), v.gather(0, first)[0], 1)
        return chosen * (d / self.shape)


def _uniforms(key: Tensor, streams: int, count: int) -> Tensor:
    """(streams, count), float32, in (0, 1)."""
    counter = torch.arange(1, streams * count + 1, device=key.device).view(streams, count)
    bits = _mixed(key + counter * _signed(0x9E3779B97F4A7C15))
    return (_shifted(bits, 64 - UNIFORM_BITS).float() + 0.5) * 2.0**-UNIFORM_BITS


def _mixed(word: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose products wrap."""
    word = (word ^ _shifted(word, 30)) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ _shifted(word, 27)) * _signed(0x94D049BB133111EB)
    return word ^ _shifted(word, 31)


def _shifted(word: Tensor, bits: int) -> Tensor:
    """Right by `bits`, with zeros moving in."""
    return word.bitwise_right_shift(bits).bitwise_and(2 ** (64 - bits) - 1)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant
