"""Unicode's groups of emoji, and how they are asked for in words.

groups.txt has a line a group, its name and one emoji of each family, after emoji-test.txt of Unicode 17 (licence:
Unicode License v3). No family is in two groups. The prompts are the names that Unicode gives a group's subgroups.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from contrastile.demo.data import family_of
from torch import Tensor

LINES = [line.split("\t") for line in Path(__file__).with_name("groups.txt").read_text(encoding="utf-8").splitlines()]
NAMES = tuple(name for name, _ in LINES)
NUMBER_OF = {family_of(character): number for number, (_, line) in enumerate(LINES) for character in line.split()}

PROMPTS: dict[str, Sequence[str]] = {
    "Smileys & Emotion": (
        *("smiling face", "face with affection", "face with tongue", "face with hand", "neutral face"),
        *("sleepy face", "unwell face", "face with hat", "face with glasses", "concerned face", "negative face"),
        *("costume face", "cat face", "monkey face", "heart", "emotion"),
    ),
    "People & Body": (
        *("hand with fingers open", "hand with fingers partial", "hand with single finger", "hand with fingers closed"),
        *("hands", "hand prop", "body parts", "person", "person gesture", "person role", "person fantasy"),
        *("person activity", "person sport", "person resting", "family", "person symbol"),
    ),
    "Animals & Nature": (
        *("animal mammal", "animal bird", "animal amphibian", "animal reptile", "animal marine", "animal bug"),
        *("plant flower", "plant"),
    ),
    "Food & Drink": (
        *("food fruit", "food vegetable", "food prepared", "asian food", "sweet food", "drink", "dishware"),
    ),
    "Travel & Places": (
        *("place map", "geographic place", "place building", "religious place", "place", "ground transport"),
        *("water transport", "air transport", "hotel", "time", "sky and weather"),
    ),
    "Activities": ("event", "award medal", "sport", "game", "arts and crafts"),
    "Objects": (
        *("clothing", "sound", "music", "musical instrument", "phone", "computer", "light and video", "book paper"),
        *("money", "mail", "writing", "office", "lock", "tool", "science", "medical", "household", "object"),
    ),
    "Symbols": (
        *("transport sign", "warning", "arrow", "religion", "zodiac", "audio and video symbol", "gender", "math"),
        *("punctuation", "currency", "symbol", "keycap", "alphanumeric", "geometric"),
    ),
    "Flags": ("flag", "country flag", "subdivision flag"),
}


def numbers(families: Sequence[str]) -> Tensor:
    """(n,) int64: the group of each family, a position in NAMES."""
    return torch.tensor([NUMBER_OF[family] for family in families])
