"""What is trained on and measured on, as numbers: captioned scenes, and the examples of each task."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from examples.fusion.language import FACTS, caption, tokenize
from examples.fusion.questions import ANSWERS, TASKS, Example, draw
from examples.fusion.scenes import Scene, Sprites, layouts, scene_of, triples


class Captioned(NamedTuple):
    layouts: Tensor  # (n, CELLS) int64
    tokens: Tensor  # (n, L) int64


class Asked(NamedTuple):
    """Examples of a task."""

    layouts: Tensor  # (n, scenes of an example, CELLS) int64
    tokens: Tensor  # (n, L) int64
    answers: Tensor  # (n,) int64, positions in ANSWERS[task]
    examples: list[Example]

    @classmethod
    def of(cls, task: str, examples: list[Example]) -> Asked:
        return cls(
            torch.stack([layouts(example.scenes) for example in examples]),
            tokenize([example.text for example in examples]),
            torch.tensor([ANSWERS[task].index(example.answer) for example in examples]),
            examples,
        )


@dataclass(frozen=True)
class Corpus:
    sprites: Sprites
    captioned: Captioned
    train: dict[str, Asked]
    held_out: dict[str, Asked]  # scenes with held-out triples, and asked about these


@cache
def load(scenes: int, examples: int, measured: int) -> Corpus:
    """So many captioned scenes, examples of each task to train on, and others to measure on. The same in every call."""
    chance = random.Random(0)
    captioned: list[Scene] = []
    while len(captioned) < scenes:
        if len(list(triples(scene := scene_of(chance, held_out=False)))) >= FACTS:
            captioned.append(scene)
    return Corpus(
        Sprites(),
        Captioned(layouts(captioned), tokenize([caption(scene, chance) for scene in captioned])),
        *(
            {task: Asked.of(task, draw(task, count, chance, held_out)) for task in TASKS}
            for count, held_out in ((examples, False), (measured, True))
        ),
    )


def cut(tokens: Tensor) -> Tensor:
    """(B, L) without the columns that only pad."""
    return tokens[:, : int((tokens != 0).sum(1).max())]
