"""What is said about scenes: captions, questions and statements from templates, and the numbers of their words."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from examples.fusion.scenes import BOX, COLOURS, DIRECTIONS, KINDS, NAMES, OPPOSITE, Scene, triples

FACTS = 2  # of a caption
CAPTIONS = ("{} and {}", "{} , {}", "there is {} and {}")
NUMBERS = ("zero", "one", "two", "three")
ORDINALS = ("first", "second")
PLURAL = {kind: f"{kind}s" for kind in KINDS}
A_KIND = {"animal": "an animal", "food": "a food", "vehicle": "a vehicle", "shape": "a shape"}

QUESTIONS = {
    "object": ("what is {direction} the {anchor} ?", "which thing is {direction} the {anchor} ?"),
    "colour": (
        "what colour is the thing {direction} the {anchor} ?",
        "which colour has the thing {direction} the {anchor} ?",
    ),
    "own colour": ("what colour is the {shape} ?", "which colour has the {shape} ?"),
    "kind": ("what kind of thing is {direction} the {anchor} ?", "which kind is the thing {direction} the {anchor} ?"),
    "count": ("how many {kinds} are there ?", "what is the number of {kinds} ?"),
}
STATEMENTS = {
    "relation": (
        "the {which} picture has {thing} {direction} {anchor}",
        "in the {which} picture {thing} is {direction} {anchor}",
    ),
    "both": ("both pictures have {thing}", "there is {thing} in both pictures"),
    "only": ("only the {which} picture has {thing}", "there is {thing} in the {which} picture alone"),
    "more": ("the {which} picture has more {kinds}", "there are more {kinds} in the {which} picture"),
}
HYPOTHESES = {
    "object": ("the thing {direction} the {anchor} is {thing}", "{direction} the {anchor} is {thing}"),
    "kind": ("the thing {direction} the {anchor} is {kind}", "{direction} the {anchor} is {kind}"),
    "presence": ("there is {thing}", "the picture has {thing}"),
}

PAD, START, MASK = "[pad]", "[start]", "[mask]"
SPECIAL = (PAD, START, MASK)


def a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def fact(chance: random.Random, first: str, direction: str, second: str) -> str:
    """A triple in words, read forwards or backwards."""
    if chance.random() < 0.5:
        return f"{a(first)} {direction} {a(second)}"
    return f"{a(second)} {OPPOSITE[direction]} {a(first)}"


def caption(scene: Scene, chance: random.Random) -> str:
    """FACTS of the scene's triples in words; it has to have as many."""
    told = chance.sample(list(triples(scene)), FACTS)
    return chance.choice(CAPTIONS).format(*(fact(chance, *each) for each in told))


def _all_words() -> list[str]:
    templates = [text for each in (QUESTIONS, STATEMENTS, HYPOTHESES) for texts in each.values() for text in texts]
    plain = [word for text in (*templates, *CAPTIONS) for word in text.split() if "{" not in word]
    filled = (*NAMES, BOX, *DIRECTIONS, *COLOURS, *NUMBERS, *ORDINALS, *PLURAL.values(), *A_KIND.values(), "a an")
    return sorted({*plain, *(word for text in filled for word in text.split())})


WORDS = (*SPECIAL, *_all_words())
WORD_NUMBER = {word: number for number, word in enumerate(WORDS)}


def tokenize(texts: Sequence[str]) -> Tensor:
    """(n, longest) int64 of positions in WORDS: START, the words, and PAD after them."""
    rows = [[WORD_NUMBER[word] for word in (START, *text.split())] for text in texts]
    longest = max(map(len, rows))
    return torch.tensor([row + [WORD_NUMBER[PAD]] * (longest - len(row)) for row in rows])
