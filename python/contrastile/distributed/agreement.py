"""What the processes of a group tell each other before anything else: one header of fixed size from each.

    rows, cols   of the process's own share; rows is -1 where its arguments were refused
    scale        1 / temperature where it is one number, else NaN
    text         name=value of everything that must be equal, or why the arguments were refused

A process whose arguments are refused still sends its header, so that the others can say so instead of waiting.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from contrastile.distributed.member import Member

HEADER_BYTES = 512
_LAYOUT = struct.Struct("<qqd488s")

# One scale, computed alike from equal parameters: devices of two kinds may round it differently.
SCALE_TOLERANCE = 1e-5

Prepared = TypeVar("Prepared")


class Facts(NamedTuple):
    rows: int
    cols: int
    scale: float  # NaN: by row
    common: Mapping[str, object]  # what must be equal in all processes

    def packed(self) -> bytes:
        return _packed(self.rows, self.cols, self.scale, ";".join(f"{k}={v}" for k, v in self.common.items()))


class Sizes(NamedTuple):
    """Of all processes' shares, by rank."""

    rows: tuple[int, ...]
    cols: tuple[int, ...]


class _Header(NamedTuple):
    rows: int
    cols: int
    scale: float
    text: str


def agree(member: Member, prepare: Callable[[], tuple[Facts, Prepared]]) -> tuple[Sizes, Prepared]:
    """Runs prepare, exchanges its facts, and gives the sizes of all shares beside what it prepared.

    Raises:
        Exception: what prepare raised, after the others have been told.
        RuntimeError: another process's arguments were refused.
        ValueError, TypeError: the processes' facts differ (TypeError for a dtype), or nobody has rows or columns.
    """
    refused: Exception | None = None
    prepared: Prepared | None = None
    try:
        facts, prepared = prepare()
        own = facts.packed()
    except Exception as error:  # whatever it is, the others wait for a header
        refused = error
        own = _refusal(error)
    try:
        headers = _exchanged(member, own)
    except RuntimeError:
        if refused is not None:
            raise refused from None
        raise
    if refused is not None:
        raise refused
    _check(headers)
    assert prepared is not None
    return Sizes(tuple(h.rows for h in headers), tuple(h.cols for h in headers)), prepared


def tell_refusal(member: Member, error: Exception) -> None:
    """Sends the header of a process that goes no further, and says why."""
    _exchanged(member, _refusal(error))


def _refusal(error: Exception) -> bytes:
    return _packed(-1, -1, math.nan, f"{type(error).__name__}: {error}")


def _packed(rows: int, cols: int, scale: float, text: str) -> bytes:
    return _LAYOUT.pack(rows, cols, scale, text.encode())


def _exchanged(member: Member, own: bytes) -> list[_Header]:
    local = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(member.header_device)
    found = bytes(member.gathered(local[None], [1] * member.size, "headers").cpu().numpy())
    headers = []
    for at in range(0, len(found), HEADER_BYTES):
        rows, cols, scale, text = _LAYOUT.unpack(found[at : at + HEADER_BYTES])
        headers.append(_Header(rows, cols, scale, text.rstrip(b"\0").decode(errors="ignore")))
    return headers


def _check(headers: Sequence[_Header]) -> None:
    refusals = [f"rank {rank} raised {h.text}" for rank, h in enumerate(headers) if h.rows < 0]
    if refusals:
        raise RuntimeError(f"arguments were refused in other processes of the group: {'; '.join(refusals)}")
    if any(header.text != headers[0].text for header in headers):
        facts = [dict(part.split("=", 1) for part in header.text.split(";")) for header in headers]
        names = [name for name in facts[0] if any(f.get(name) != facts[0][name] for f in facts)]
        # Other functions have other facts: which function it is comes first, and says it all.
        name = names[0] if names else "function"
        kind = TypeError if name == "dtype" else ValueError
        raise kind(_difference(name, [fact.get(name, "none") for fact in facts]))
    scales = [header.scale for header in headers]
    if not all(_same_scale(scale, scales[0]) for scale in scales):
        raise ValueError(_difference("scale", [f"{scale:.9g}" for scale in scales]))
    if sum(header.rows for header in headers) == 0 or sum(header.cols for header in headers) == 0:
        raise ValueError("no process of the group has rows of x, or of y: a loss over no rows is undefined")


def _same_scale(scale: float, other: float) -> bool:
    return (math.isnan(scale) and math.isnan(other)) or math.isclose(scale, other, rel_tol=SCALE_TOLERANCE)


def _difference(name: str, values: Sequence[str]) -> str:
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    found = ", ".join(f"{value} on rank {' and '.join(where)}" for value, where in ranks.items())
    return f"{name} differs between the processes of the group: {found}; expected one for all"
