"""Captions of an emoji as training sees them: of several languages, and edited.

The edits are those of EDA (Wei and Zou, "Easy data augmentation techniques for boosting performance on text
classification tasks", EMNLP 2019): synonym replacement, insertion, swap and deletion, one of the four a caption.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache

import emoji
from contrastile.demo.data import caption_of

LANGUAGES = ("de", "es", "fr", "it", "pt")  # one script, and many words of one root
ENGLISH_SHARE = 0.5  # of captions: what is asked for later is English
EDITED_SHARE = 0.2  # of a caption's words, at least one

# Words that may stand for each other, of those in several emoji's names.
SYNONYMS = """
face visage head
smiling beaming happy
grinning laughing
frowning sad unhappy
crying weeping tearful
man male gentleman
woman female lady
men males gentlemen
women females ladies
person human individual
people humans persons
baby infant
child kid youngster
boy lad
girl lass
light pale bright
dark deep
medium middle
skin complexion
tone shade colour
hair hairstyle
flag banner ensign
island isle
islands isles
button key badge
heart love
arrow pointer
hand palm
raised lifted
open opened
closed shut
large big
small little tiny
sign notice
symbol emblem
square box
circle round disc
red crimson scarlet
green emerald
blue azure
white blank
black ebony
brown tan
hot warm
new novel
cat kitten feline
dog puppy hound
horse pony
pig swine
mouse rodent
fish seafood
bird fowl
tree plant
flower blossom bloom
leaf foliage
cloud overcast
rain shower
sun sunshine
moon lunar
star stellar
mountain peak hill
building edifice
house home
car automobile vehicle
truck lorry
airplane plane aircraft
boat ship vessel
railway railroad train
food meal
bread loaf
cake pastry
beverage drink
ball sphere
game play
medal award
book volume
pen biro
computer machine
camera photo
phone telephone
money cash
card ticket
bag sack
hat cap
shoe boot
glasses spectacles
bell chime
knife blade
bottle flask
box carton
clock watch
envelope letter
running jogging
pointing indicating
holding carrying
broken cracked
fast quick rapid
prohibited forbidden banned
worker employee
police officer
"""

Words = list[str]
Edit = Callable[[Words, random.Random], Words]


@cache
def synonyms() -> dict[str, Words]:
    """Every word of SYNONYMS and those that it shares a line with."""
    found: dict[str, Words] = {}
    for line in SYNONYMS.strip().splitlines():
        words = line.split()
        for word in words:
            found.setdefault(word, []).extend(other for other in words if other != word)
    return found


def names(character: str) -> list[str]:
    """The English caption, then those of LANGUAGES."""
    for language in LANGUAGES:
        emoji.config.load_language(language)
    others = (str(emoji.EMOJI_DATA[character][language]) for language in LANGUAGES)
    return [caption_of(character), *(other.strip(":").replace("_", " ").lower() for other in others)]


def replace(words: Words, chance: random.Random) -> Words:
    """Words by synonyms, where they have any."""
    places = [place for place, word in enumerate(words) if word in synonyms()]
    edited = list(words)
    for place in chance.sample(places, min(_edits(words), len(places))):
        edited[place] = chance.choice(synonyms()[words[place]])
    return edited


def insert(words: Words, chance: random.Random) -> Words:
    """Synonyms of words of the caption, anywhere."""
    known = [word for word in words if word in synonyms()]
    edited = list(words)
    for word in chance.sample(known, min(_edits(words), len(known))):
        edited.insert(chance.randint(0, len(edited)), chance.choice(synonyms()[word]))
    return edited


def swap(words: Words, chance: random.Random) -> Words:
    edited = list(words)
    for _ in range(_edits(words)):
        one, other = chance.randrange(len(words)), chance.randrange(len(words))
        edited[one], edited[other] = edited[other], edited[one]
    return edited


def delete(words: Words, chance: random.Random) -> Words:
    """Each word left out with probability EDITED_SHARE, but one of them stays."""
    kept = [word for word in words if chance.random() >= EDITED_SHARE]
    return kept or [chance.choice(words)]


EDITS: tuple[Edit, ...] = (replace, insert, swap, delete)


def edited(caption: str, chance: random.Random) -> str:
    """The caption after one of EDITS. Where there is nothing to edit it is the caption as it was."""
    return " ".join(chance.choice(EDITS)(caption.split(), chance))


def variants(characters: Sequence[str], count: int, seed: int) -> list[list[str]]:
    """`count` edited captions of each character, English ones at ENGLISH_SHARE. Equal for equal seeds."""
    chance = random.Random(seed)
    drawn = []
    for character in characters:
        english, *others = names(character)
        chosen = [english if chance.random() < ENGLISH_SHARE else chance.choice(others) for _ in range(count)]
        drawn.append([edited(caption, chance) for caption in chosen])
    return drawn


def _edits(words: Words) -> int:
    return max(1, round(EDITED_SHARE * len(words)))
