"""Examples of the three tasks: scenes, a text about them, and the right answer.

    answering    a question about a scene; the answers are all objects, colours, kinds and small numbers
    reasoning    a statement about two scenes, true or false
    entailment   a hypothesis about a scene: it entails it, contradicts it, or leaves it open, because of a box

Answers cannot be guessed from the texts: those of a question are drawn alike often, by kind of thing or by number, and
every statement and every hypothesis comes with as many scenes as there are answers, one for each.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import NamedTuple

from examples.fusion import language
from examples.fusion.language import A_KIND, NUMBERS, ORDINALS, PLURAL, a
from examples.fusion.scenes import (
    BOX,
    CELLS,
    COLOURS,
    DIRECTIONS,
    EMPTY,
    HELD_OUT,
    KINDS,
    NAMES,
    OBJECTS,
    OF_KIND,
    OPPOSITE,
    Scene,
    Triple,
    cell_beside,
    scene_of,
    some_name,
    triple,
)

ANSWERS = {
    "answering": (*NAMES, *COLOURS, *KINDS, *NUMBERS),
    "reasoning": ("false", "true"),
    "entailment": ("contradicts", "neutral", "entails"),
}
TASKS = tuple(ANSWERS)


class Example(NamedTuple):
    sort: str  # which templates
    text: str
    scenes: tuple[Scene, ...]  # one, or two for reasoning
    answer: str
    about: Triple | None = None  # what is asked or stated, where it is a relation


class Fact(NamedTuple):
    thing: str
    direction: str
    anchor: str

    @property
    def triple(self) -> Triple:
        return triple(*self)


def draw(task: str, count: int, chance: random.Random, held_out: bool) -> list[Example]:
    """The first `count` examples; held_out: of scenes with held-out triples, and about these."""
    endless = {"answering": questions, "reasoning": statements, "entailment": hypotheses}[task]
    return list(islice(endless(chance, held_out), count))


def questions(chance: random.Random, held_out: bool) -> Iterator[Example]:
    while True:
        sort = chance.choice(list(language.QUESTIONS))
        words, about, answer = {}, None, ""
        if sort == "own colour":
            name = chance.choice(OF_KIND["shape"])
            answer, shape = name.split()
            words = {"shape": shape}
            others = {name for name in NAMES if not name.endswith(shape)}
            scene = scene_of(chance, held_out, present=[name], fits=others.__contains__)
        elif sort == "count":
            kind, number = chance.choice(KINDS), chance.randrange(len(NUMBERS))
            words, answer = {"kinds": PLURAL[kind]}, NUMBERS[number]
            scene = _with_number(chance, held_out, kind, number)
        else:
            said = _fact(chance, held_out, ("shape",) if sort == "colour" else KINDS)
            words, about = said._asdict(), said.triple
            is_a = OBJECTS[said.thing]
            answer = {"object": said.thing, "colour": is_a.colour or "", "kind": is_a.kind}[sort]
            scene = scene_of(chance, held_out, _cells(chance, said))
        yield Example(sort, chance.choice(language.QUESTIONS[sort]).format(**words), (scene,), answer, about)


def statements(chance: random.Random, held_out: bool) -> Iterator[Example]:
    """A statement's two examples, true and false, follow each other."""
    while True:
        sort = chance.choice(list(language.STATEMENTS))
        which = chance.randrange(2)
        said, kind = _fact(chance, held_out), chance.choice(KINDS)
        words = {"which": ORDINALS[which], "kinds": PLURAL[kind], "direction": said.direction}
        words |= {"thing": a(said.thing), "anchor": a(said.anchor)}
        text = chance.choice(language.STATEMENTS[sort]).format(**words)
        for truth in (False, True):
            if sort == "more":
                fewer, more = sorted(chance.sample(range(len(NUMBERS)), 2))
                of_which, of_other = (more, fewer) if truth else (fewer, more)
                pair = [_with_number(chance, held_out, kind, number) for number in (of_which, of_other)]
            elif sort == "relation":
                pair = [_related(chance, held_out, said, holds) for holds in (truth, chance.random() < 0.5)]
            else:
                if sort == "both":
                    has = (True, True) if truth else chance.choice([(True, False), (False, True)])
                else:
                    has = (True, False) if truth else (chance.random() < 0.5, True)
                pair = [_with_thing(chance, held_out, said.thing, present, box=False) for present in has]
            about = said.triple if sort == "relation" else None
            yield Example(sort, text, tuple(pair if which == 0 else pair[::-1]), str(truth).lower(), about)


def hypotheses(chance: random.Random, held_out: bool) -> Iterator[Example]:
    """A hypothesis' three examples follow each other.

    Where it is a relation each scene has both objects and a box: only where they are decides.
    """
    while True:
        sort = chance.choice(list(language.HYPOTHESES))
        said = _fact(chance, held_out)
        words = {"direction": said.direction, "anchor": said.anchor, "kind": A_KIND[OBJECTS[said.thing].kind]}
        text = chance.choice(language.HYPOTHESES[sort]).format(**words, thing=a(said.thing))
        if sort == "presence":
            scenes = [
                _with_thing(chance, held_out, said.thing, False, box=False),
                _with_thing(chance, held_out, said.thing, False, box=True),
                _with_thing(chance, held_out, said.thing, True, box=None),
            ]
        else:
            of_kind = sort == "kind"
            scenes = [
                _related(chance, held_out, said, False, box=True, of_kind=of_kind),
                scene_of(chance, held_out, _cells(chance, said._replace(thing=BOX)), [said.thing], box=False),
                _related(chance, held_out, said, True, box=True),
            ]
        about = None if sort == "presence" else said.triple
        for scene, answer in zip(scenes, ANSWERS["entailment"], strict=True):
            yield Example(sort, text, (scene,), answer, about)


@cache
def _things(held_out: bool, direction: str, anchor: str) -> dict[str, list[str]]:
    """Of each kind what may be in that direction of the anchor, as held-out triples or as others."""
    found: dict[str, list[str]] = {}
    for name in NAMES:
        if name != anchor and (triple(name, direction, anchor) in HELD_OUT) == held_out:
            found.setdefault(OBJECTS[name].kind, []).append(name)
    return found


def _fact(chance: random.Random, held_out: bool, kinds: tuple[str, ...] = KINDS) -> Fact:
    """Of two objects, held out or not; of the thing, kinds alike often. Another kind could be in its place."""
    while True:
        kind, direction, anchor = chance.choice(kinds), chance.choice(DIRECTIONS), some_name(chance)
        things = _things(held_out, direction, anchor)
        if kind in things and len(things) > 1:
            return Fact(chance.choice(things[kind]), direction, anchor)


def _cells(chance: random.Random, said: Fact) -> dict[int, str]:
    anchors = [cell for cell in range(CELLS) if cell_beside(cell, said.direction) is not None]
    cell = chance.choice(anchors)
    return {cell: said.anchor, cell_beside(cell, said.direction): said.thing}


def _related(
    chance: random.Random, held_out: bool, said: Fact, holds: bool, box: bool = False, of_kind: bool = False
) -> Scene:
    """A scene of both objects in which the fact holds, or does not hold.

    Then the thing is at the anchor's other side, or another thing, of another kind if of_kind, is in its place.
    """
    if holds:
        return scene_of(chance, held_out, _cells(chance, said), box=box)
    turned = said._replace(direction=OPPOSITE[said.direction])
    if chance.random() < 0.5 and (turned.triple not in HELD_OUT or held_out):
        cells = _cells(chance, turned)
        anchor = next(cell for cell, name in cells.items() if name == said.anchor)
        beside = cell_beside(anchor, said.direction)
        return scene_of(chance, held_out, cells if beside is None else {**cells, beside: EMPTY}, box=box)
    things, own = _things(held_out, said.direction, said.anchor), OBJECTS[said.thing].kind
    others = {
        kind: found
        for kind, names in things.items()
        if (found := [name for name in names if name != said.thing]) and not (of_kind and kind == own)
    }
    other = said._replace(thing=chance.choice(others[chance.choice(list(others))]))
    return scene_of(chance, held_out, _cells(chance, other), present=[said.thing], box=box)


def _with_thing(chance: random.Random, held_out: bool, thing: str, present: bool, box: bool | None) -> Scene:
    return scene_of(chance, held_out, present=[thing] * present, fits=lambda name: name != thing, box=box)


def _with_number(chance: random.Random, held_out: bool, kind: str, number: int) -> Scene:
    """A scene without boxes that has so many things of a kind."""
    names = chance.sample(OF_KIND[kind], number)
    return scene_of(chance, held_out, present=names, fits=lambda name: OBJECTS[name].kind != kind, box=False)
