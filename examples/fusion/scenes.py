"""Scenes: emoji in the cells of a grid, which of their combinations are held out, and pictures of them.

A scene has no object twice. A *triple* (a, "left of" or "above", b) says that a is in the cell next to that of b; right
of and below are the same triples read backwards. A fixed fifth of all triples is held out: no scene of training has one
of them, every scene that is measured on has at least one, and where a relation is asked about it is a held-out one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from contrastile.demo.data import drawings, render
from torch import Tensor

SIDE = 3
CELLS = SIDE * SIDE
HELD_OUT_FRACTION = 0.2
CELL_SIZE, SLACK = 16, 3  # pixels: of a cell, and by how many an object in it may be moved
FEWEST, MOST = 4, 6  # objects of a scene, boxes aside
BOX_SHARE = 0.5  # of scenes
WHITE = 255.0
BRIGHTNESS, CONTRAST = (0.85, 1.0), (0.7, 1.0)  # of paper and ink, as training sees them

Scene = tuple[str, ...]  # CELLS names, row by row; EMPTY where nothing is
Triple = tuple[str, str, str]
EMPTY = ""
BOX = "box"  # what is in it is not seen


class Object(NamedTuple):
    character: str
    kind: str
    colour: str | None


KINDS = ("animal", "food", "vehicle", "shape")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
OBJECTS = {
    **{
        name: Object(character, kind, None)
        for kind, line in {
            "animal": "🐸 frog 🐷 pig 🐼 panda 🐟 fish 🦀 crab 🐝 bee",
            "food": "🍎 apple 🍌 banana 🍐 pear 🥕 carrot 🍔 hamburger 🍪 cookie",
            "vehicle": "🚗 car 🚌 bus 🚲 bicycle ⛵ sailboat 🚀 rocket 🚜 tractor",
        }.items()
        for character, name in zip(line.split()[::2], line.split()[1::2], strict=True)
    },
    **{
        f"{colour} {shape}": Object(character, "shape", colour)
        for shape, line in {"heart": "❤️🧡💛💚💙💜", "circle": "🔴🟠🟡🟢🔵🟣", "square": "🟥🟧🟨🟩🟦🟪"}.items()
        for colour, character in zip(COLOURS, line.replace("\ufe0f", ""), strict=True)
    },
}
NAMES = tuple(OBJECTS)
OF_KIND = {kind: [name for name in NAMES if OBJECTS[name].kind == kind] for kind in KINDS}
DRAWN = (EMPTY, *NAMES, BOX)  # in the order of their numbers in a layout
NUMBER_OF = {name: number for number, name in enumerate(DRAWN)}

# Where the thing is that is left of another: a step in rows and one in columns, from the other.
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
DIRECTIONS = tuple(STEPS)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def triple(thing: str, direction: str, anchor: str) -> Triple:
    """What 'thing is direction of anchor' says, read from the left or from above."""
    return (thing, direction, anchor) if direction in ("left of", "above") else (anchor, OPPOSITE[direction], thing)


def is_held_out(of: Triple) -> bool:
    """A fixed choice of HELD_OUT_FRACTION of the triples, from their own words. A box is never in a held-out one."""
    first, _, second = of
    digest = hashlib.sha256(" ".join(of).encode()).digest()[:4]
    return BOX not in (first, second) and int.from_bytes(digest, "big") < HELD_OUT_FRACTION * 2**32


HELD_OUT = frozenset(
    each for a in NAMES for b in NAMES for way in ("left of", "above") if is_held_out(each := triple(a, way, b))
)


def cell_beside(cell: int, direction: str) -> int | None:
    """The cell in that direction, None outside the grid."""
    rows, cols = STEPS[direction]
    row, col = cell // SIDE + rows, cell % SIDE + cols
    return row * SIDE + col if 0 <= row < SIDE and 0 <= col < SIDE else None


# (cell, cell, direction): the first is in that direction of the second.
NEIGHBOURS = [
    (beside, cell, direction)
    for cell in range(CELLS)
    for direction in ("left of", "above")
    if (beside := cell_beside(cell, direction)) is not None
]


def triples(scene: Scene) -> Iterator[Triple]:
    """Those that hold in the scene, boxes included."""
    for first, second, direction in NEIGHBOURS:
        if scene[first] and scene[second]:
            yield scene[first], direction, scene[second]


def some_name(chance: random.Random, kinds: Sequence[str] = KINDS) -> str:
    """Kinds alike often, in a kind its objects."""
    return chance.choice(OF_KIND[chance.choice(kinds)])


def scene_of(
    chance: random.Random,
    held_out: bool,
    placed: Mapping[int, str] | None = None,
    present: Sequence[str] = (),
    fits: Callable[[str], bool] = lambda name: True,
    box: bool | None = None,
) -> Scene:
    """A scene of FEWEST to MOST objects.

    held_out: it has a held-out triple, else none.
    placed: what is in some cells, which may be EMPTY or a BOX. Together with held_out it has to be possible.
    present: names that are in other cells.
    fits: what the remaining names have in common.
    box: whether there is a box beside those placed, default in BOX_SHARE of the scenes.
    """
    placed = placed or {}
    given = [*placed.values(), *present]
    num_given = sum(name in OBJECTS for name in given)
    free = [cell for cell in range(CELLS) if cell not in placed]
    while True:
        others = list(present)
        while num_given + len(others) - len(present) < chance.randint(FEWEST, MOST):
            name = some_name(chance)
            if fits(name) and name not in given and name not in others:
                others.append(name)
        if chance.random() < BOX_SHARE if box is None else box:
            others.append(BOX)
        cells = [EMPTY] * CELLS
        for cell, name in [*placed.items(), *zip(chance.sample(free, len(others)), others, strict=True)]:
            cells[cell] = name
        scene = tuple(cells)
        if any(each in HELD_OUT for each in triples(scene)) == held_out:
            return scene


def layouts(scenes: Sequence[Scene]) -> Tensor:
    """(n, CELLS) int64, positions in DRAWN."""
    return torch.tensor([[NUMBER_OF[name] for name in scene] for scene in scenes])


class Sprites:
    """The drawings in the size of a cell."""

    def __init__(self) -> None:
        paths = {character.replace("\ufe0f", ""): path for character, path in drawings()}
        characters = {name: each.character for name, each in OBJECTS.items()} | {BOX: "📦"}
        self.padded = torch.full((len(DRAWN), CELL_SIZE + SLACK, CELL_SIZE + SLACK, 3), 255, dtype=torch.uint8)
        for name, character in characters.items():
            drawing = torch.from_numpy(np.array(render(paths[character], CELL_SIZE - SLACK)))
            self.padded[NUMBER_OF[name], SLACK:CELL_SIZE, SLACK:CELL_SIZE] = drawing

    def pictures(self, layout: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, CELLS) to (B, 3, S, S) float32 of 0 to 255, S = SIDE CELL_SIZE.

        generator: moves each object within its cell, and draws brightness and contrast; without it objects are in the
        middle of their cells.
        """
        if generator is None:
            offsets = torch.full((2, *layout.shape, 1), (SLACK + 1) // 2)
        else:
            offsets = torch.randint(SLACK + 1, (2, *layout.shape, 1), generator=generator)
        rows, cols = offsets + torch.arange(CELL_SIZE)
        cells = self.padded[layout[:, :, None, None], rows[:, :, :, None], cols[:, :, None, :]]
        # (batch, row, column, its pixels down, across, colour) to (batch, colour, row, down, column, across)
        grid = cells.unflatten(1, (SIDE, SIDE)).permute(0, 5, 1, 3, 2, 4)
        pictures = grid.reshape(len(layout), 3, SIDE * CELL_SIZE, SIDE * CELL_SIZE).float()
        if generator is None:
            return pictures
        (paper, ink) = (
            low + (high - low) * torch.rand(len(layout), 1, 1, 1, generator=generator)
            for low, high in (BRIGHTNESS, CONTRAST)
        )
        return WHITE * paper + ink * (pictures - WHITE)
