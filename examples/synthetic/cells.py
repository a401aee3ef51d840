"""Which experiments are run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from examples.synthetic.named import SWEPT
from examples.synthetic.train import Cell

NOISES, TEMPERATURES, BATCHES = (0.5, 1.5), (0.02, 0.05, 0.2), (8, 32, 128)
# Heavy noise at low temperature, where the article's claim is made: once in the sweep, once with more to learn from.
HEADLINE = {"samples": 1024, "noise": 1.5, "temperature": 0.02, "batch": 32}
MORE_SAMPLES = {**HEADLINE, "samples": 8192, "batch": 8}


def more_samples(methods: Sequence[str] = tuple(SWEPT), steps: int = 8000) -> Iterator[Cell]:
    for method in methods:
        yield Cell(method, **MORE_SAMPLES, steps=steps)


def sweep(
    methods: Sequence[str] = tuple(SWEPT), samples: int = 1024, steps: int = 1500, full_batch_steps: int = 300
) -> Iterator[Cell]:
    for noise, temperature in itertools.product(NOISES, TEMPERATURES):
        for batch, method in itertools.product(BATCHES, methods):
            yield Cell(method, samples, noise, temperature, batch, steps)
        yield Cell("InfoNCE", samples, noise, temperature, samples, full_batch_steps, learning_rate=3e-2)


def headline(methods: Sequence[str] = tuple(SWEPT)) -> Iterator[Cell]:
    """The cell of the article's claim by every method, and InfoNCE over all pairs at once beside it."""
    for cell in sweep(methods):
        setting = {"samples": cell.samples, "noise": cell.noise, "temperature": cell.temperature}
        if setting.items() <= HEADLINE.items() and cell.batch in (HEADLINE["batch"], cell.samples):
            yield cell
