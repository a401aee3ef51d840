"""What is trained on and measured on: pairs with edited captions, groups and families."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from contrastile.demo.data import EmojiPairs, load_pairs
from contrastile.demo.models import tokenize
from contrastile.demo.train import Dataset, dropped
from torch import Tensor

from examples.two_tower import captions, groups
from examples.two_tower.images import jittered

VARIANTS = 12  # edited captions of a pair: made once, as hashing n-grams costs more than a step of training
VALIDATION_FRACTION = 0.2  # of the training families


@dataclass(frozen=True)
class Corpus:
    pairs: EmojiPairs
    dataset: Dataset  # English captions; which pairs are trained on and which are held out
    edited: Tensor  # (len(dataset.train), VARIANTS, L) int16 buckets of n-grams, 0 for none
    groups: Tensor  # (n,) int64, positions in groups.NAMES
    families: Tensor  # (n,) int64

    def view(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented images and captions of the training pairs `index` (B,): (B, 3, S, S) float32 and (B, L) int64."""
        images = jittered(self.dataset.images[self.dataset.train[index]], generator)
        which = torch.randint(VARIANTS, index.shape, generator=generator)
        tokens = self.edited[index, which].long()
        longest = int((tokens != 0).sum(1).max())
        return images, dropped(tokens[:, :longest], generator)


@cache
def load(cache_folder: Path, keep_one_in: int, validate: bool) -> Corpus:
    """The pairs of every keep_one_in-th family.

    validate: what is called held out is then a part of the training families, and the held-out ones do not take part.
    """
    pairs = load_pairs(cache_folder, keep_one_in=keep_one_in)
    dataset = Dataset.of(pairs)
    if validate:
        train, held_out = validation_split(dataset.train, pairs.families)
        dataset = replace(dataset, train=train, held_out=held_out)
    characters = [pairs.characters[position] for position in dataset.train.tolist()]
    drawn = captions.variants(characters, VARIANTS, seed=0)
    edited = tokenize([caption for each in drawn for caption in each]).short().unflatten(0, (-1, VARIANTS))
    number_of = {family: number for number, family in enumerate(sorted(set(pairs.families)))}
    families = torch.tensor([number_of[family] for family in pairs.families])
    return Corpus(pairs, dataset, edited, groups.numbers(pairs.families), families)


def validation_split(train: Tensor, families: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Positions of `train` with and without those of VALIDATION_FRACTION of its families."""

    def is_validation(family: str) -> bool:
        digest = hashlib.sha256(f"validation {family}".encode()).digest()
        return int.from_bytes(digest[:4], "big") < VALIDATION_FRACTION * 2**32

    chosen = torch.tensor([is_validation(families[position]) for position in train.tolist()])
    return train[~chosen], train[chosen]
