"""What the model is pre-trained by: a contrast, matching, masked words, and the structure of a row.

    base   contrast + matching + masked words
    Sep    base + feature separation
    Br     base + Brownian bridge
    GC     base + geometric consistency
    all    base + the three                  (Jiang et al. 2023)

contrast       the article's four: pictures against texts and against pictures, texts against pictures and against
               texts; anchors are the encoders' features, candidates those of the slow copies, of the batch and of a
               queue of earlier ones
matching       whether a text belongs to a picture, with a hard negative of either drawn by similarity
masked words   which words stood in a text, given its picture

ALBEF's momentum distillation, soft targets from the slow copies, is left out.
"""

from __future__ import annotations

from typing import NamedTuple

import contrastile as ct
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.common.embedded import Embedded, structure_loss
from examples.fusion.language import MASK, SPECIAL, WORD_NUMBER
from examples.fusion.model import EMBEDDING_DIM, FusionModel

STRUCTURES = ("base", "Sep", "Br", "GC", "all")
STRUCTURE_WEIGHT = 0.1  # of each of the three, as in examples/two_tower
QUEUE = 1024  # pairs
MASKED_SHARE = 0.3  # of the words; at least one of a text


class Losses(NamedTuple):
    """Numbers, ()."""

    contrast: Tensor
    matching: Tensor
    masked_words: Tensor
    structure: Tensor

    def total(self) -> Tensor:
        return self.contrast + self.matching + self.masked_words + STRUCTURE_WEIGHT * self.structure


class FeatureQueue:
    """The latest features of the slow copies, with the scenes they are of. A full queue forgets the oldest first."""

    def __init__(self, size: int = QUEUE, dim: int = EMBEDDING_DIM) -> None:
        self.size = size
        self.v, self.t, self.scenes = torch.empty(0, dim), torch.empty(0, dim), torch.empty(0, dtype=torch.int64)

    def push(self, v: Tensor, t: Tensor, scenes: Tensor) -> None:
        """(B, D) each and (B,); the last row is the newest."""
        self.v = torch.cat([self.v, v.detach()])[-self.size :]
        self.t = torch.cat([self.t, t.detach()])[-self.size :]
        self.scenes = torch.cat([self.scenes, scenes])[-self.size :]


def contrast(batch: Embedded, slow: Embedded, scenes: Tensor, queue: FeatureQueue, scale: Tensor) -> Tensor:
    """(V2T + T2V + V2V + T2T) / 4, (). Another pair of the same scene is no negative."""
    groups = scenes, torch.cat([scenes, queue.scenes])
    pictures, texts = torch.cat([slow.v, queue.v]), torch.cat([slow.t, queue.t])
    pairs = ((batch.v, texts), (batch.t, pictures), (batch.v, pictures), (batch.t, texts))
    losses = [ct.info_nce(x, y, scale, symmetric=False, groups=groups) for x, y in pairs]
    return torch.stack(losses).mean()


def hard_negatives(logits: Tensor, scenes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each picture a text and for each text a picture, of another scene, drawn by the softmax of logits (B, B).

    Rows of the logits are pictures. Every scene has to have another one in the batch.
    """
    others = logits.detach().masked_fill(scenes[:, None] == scenes, -torch.inf)
    text_for, picture_for = (
        torch.multinomial(each.softmax(1), 1, generator=generator)[:, 0] for each in (others, others.T)
    )
    return text_for, picture_for


def masked(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (B, L) with MASKED_SHARE of their words, at least one, hidden; and which ones, (B, L) bool."""
    chance = torch.rand(tokens.shape, generator=generator).masked_fill(tokens < len(SPECIAL), torch.inf)
    hidden = (chance < MASKED_SHARE) | (chance == chance.amin(1, keepdim=True))
    return tokens.masked_fill(hidden, WORD_NUMBER[MASK]), hidden


class Objective:
    def __init__(self, structure: str, generator: torch.Generator) -> None:
        self.structure, self.generator, self.queue = structure, generator, FeatureQueue()

    def __call__(self, model: FusionModel, views: tuple[Tensor, Tensor], tokens: Tensor, scenes: Tensor) -> Losses:
        """Of two views (B, 3, S, S) of the scenes (B,), the second for the slow copies, and texts (B, L)."""
        patches, words = model.encoders.image(views[0]), model.encoders.text(tokens)
        batch, slow = model.encoders.embed(patches, words), model.embed_slowly(views[1], tokens)
        losses = Losses(
            contrast(batch, slow, scenes, self.queue, model.scale),
            self._matching(model, patches, words, tokens, model.scale * batch.v @ batch.t.T, scenes),
            self._masked_words(model, patches, tokens),
            torch.as_tensor(structure_loss(self.structure, batch, slow, model.scale)),
        )
        self.queue.push(slow.v, slow.t, scenes)
        return losses

    def _matching(
        self, model: FusionModel, patches: Tensor, words: Tensor, tokens: Tensor, logits: Tensor, scenes: Tensor
    ) -> Tensor:
        text_for, picture_for = hard_negatives(logits, scenes, self.generator)
        every = torch.arange(len(tokens))
        pictures, texts = torch.cat([every, every, picture_for]), torch.cat([every, text_for, every])
        fused = model.fuse(words[texts], tokens[texts], patches[pictures])
        return F.cross_entropy(model.matching(fused[:, 0]), (pictures == texts).long())

    def _masked_words(self, model: FusionModel, patches: Tensor, tokens: Tensor) -> Tensor:
        seen, hidden = masked(tokens, self.generator)
        fused = model.fuse(model.encoders.text(seen), seen, patches)
        return F.cross_entropy(model.word(fused[hidden]), tokens[hidden])
