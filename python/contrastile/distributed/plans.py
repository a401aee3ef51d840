"""Two ways for own rows to meet the columns of all processes, and for what is summed over rows to come home.

    gather   all columns come at once, one sweep, and every process's sums are sent to the columns' owners
    ring     blocks of columns pass from process to process, one a step, their sums one step behind them

A lap is one pass over all columns. In a ring the transfers of a step run beside its sweep: the next block comes in, and
so do the sums of the present one, gathered by the processes that had it before. A process's sums over its own rows and
columns stay at home, so sums make one hop less than a full round.

    step      0          1          2          3          home
    rank 0    [0]        [3]        [2] +3's   [1] +..    sums of block 0
    rank 1    [1]        [0]        [3] +..    [2] +..    sums of block 1

Steps 1 to home are done for one piece of all blocks after another, each sent off while sums of the last one come home:
what is under way, two blocks and three of sums, then takes that much less room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from contrastile.distributed.member import Member
from contrastile.statistics import finite

EXCHANGES = ("gather", "ring")
GATHERED_BYTES = 256 * 2**20  # of features and of sums over rows: above it the ring is chosen
PIECE_BYTES = 4 * 2**20  # of a block of features that is passed around at a time


class Sums(NamedTuple):
    """What a sweep finds by row or by column, K of them; None where not asked for. Accumulation dtype."""

    grad: Tensor | None = None  # (K, D)
    mass: Tensor | None = None  # (K,)
    moment: Tensor | None = None  # (K,)
    weight: Tensor | None = None  # (K,)
    top: Tensor | None = None  # (K,) with total: a sum of exponentials, total * exp(top)
    total: Tensor | None = None  # (K,)

    def tensors(self) -> list[Tensor]:
        """For a message: grad, then all others side by side, (K, ...)."""
        vectors = [t for t in self[1:] if t is not None]
        return [*([] if self.grad is None else [self.grad]), *([torch.stack(vectors, 1)] if vectors else [])]

    def of_tensors(self, tensors: Sequence[Tensor]) -> Sums:
        """Undoes tensors(), with the fields that this has."""
        grad = None if self.grad is None else tensors[0]
        vectors = iter(tensors[-1].unbind(1) if any(t is not None for t in self[1:]) else ())
        return Sums(grad, *(None if t is None else next(vectors) for t in self[1:]))

    def part(self, at: slice) -> Sums:
        """Views of some of the K."""
        return Sums(*(None if t is None else t[at] for t in self))

    def add(self, other: Sums) -> None:
        """Takes in what other summands give."""
        for own, more in zip(self[:4], other[:4], strict=True):
            if own is not None and more is not None:
                own.add_(more)
        if self.top is None or self.total is None or other.top is None or other.total is None:
            return
        joint = torch.maximum(self.top, other.top)
        shift = finite(joint)
        self.total.mul_((self.top - shift).exp()).add_(other.total * (other.top - shift).exp())
        self.top.copy_(joint)


Columns = dict[str, Tensor]  # tensors with a row for each column of the problem, (M, ...)
# Own rows against a block of columns, whose own columns begin at the number given, None: not in it. Sums by column.
Visit = Callable[[Columns, "int | None"], Sums]


class Plan(Protocol):
    def hold(self, columns: Columns) -> Columns:
        """Columns as laps take them: what is got from others here serves several laps."""

    def lap(self, held: Columns, vectors: Columns, visit: Visit, what: str) -> Sums:
        """Visits all columns, of which vectors are more. Sums over all processes' rows, of own columns."""


class GatherPlan:
    def __init__(self, member: Member, cols: Sequence[int]) -> None:
        self.member, self.cols = member, cols
        self.offset = sum(cols[: member.rank])

    def hold(self, columns: Columns) -> Columns:
        return {name: self.member.gathered(t, self.cols, name) for name, t in columns.items()}

    def lap(self, held: Columns, vectors: Columns, visit: Visit, what: str) -> Sums:
        found = visit(held | self.hold(vectors), self.offset)
        parts = [self.member.summands(t, self.cols, f"sums of the {what} lap") for t in found.tensors()]
        home = found.of_tensors([part[0] for part in parts])
        for others in zip(*(part[1:] for part in parts), strict=True):
            home.add(found.of_tensors(others))
        return home


class _Turn(NamedTuple):
    """What a process does while transfers run."""

    cols: slice | None  # meets these columns, of their owner's; None: has met all
    setting_out: slice | None = None  # own columns that it sends off; None: those that it meets move on
    coming_home: slice | None = None  # own columns whose sums all others have added to


class RingPlan:
    def __init__(self, member: Member, cols: Sequence[int]) -> None:
        self.member, self.cols = member, cols

    def hold(self, columns: Columns) -> Columns:
        return {name: t.contiguous() for name, t in columns.items()}

    def lap(self, held: Columns, vectors: Columns, visit: Visit, what: str) -> Sums:
        own = held | self.hold(vectors)
        turns = self._turns(own)
        home, done = Sums(), Sums()  # sums of own columns; of the block before, ready to move on
        block = own
        for at, turn in enumerate(turns):
            following = turns[at + 1].cols if at + 1 < len(turns) else None
            coming: Columns = {}
            leaving: Columns = {}
            if following is not None:
                coming = {name: _like(t, _length(following)) for name, t in own.items()}
                leaving = block if turn.setting_out is None else {name: t[turn.setting_out] for name, t in own.items()}
            moving = done.tensors()
            arriving = [_like(t, _length(turn.coming_home or turn.cols)) for t in moving]
            name = f"step {at + 1} of {len(turns)} of the {what} lap"
            with self.member.passing_on([*leaving.values(), *moving], [*coming.values(), *arriving], name):
                found = Sums() if turn.cols is None else visit(block, None if at else 0)
            if arriving:
                (home.part(turn.coming_home) if turn.coming_home else found).add(home.of_tensors(arriving))
            if at == 0:
                home = found
            else:
                done = found
            block = coming
        return home

    def _turns(self, columns: Columns) -> list[_Turn]:
        """Own columns first and whole. Then, piece by piece, those of the process before, of the one before it, and so
        on. As many pieces for all processes.
        """
        rank, size = self.member.rank, self.member.size
        row = sum(t.shape[1:].numel() * t.element_size() for t in columns.values())
        pieces = max(1, -(-max(self.cols) * row // PIECE_BYTES))

        def piece(owner: int, number: int) -> slice | None:
            if not 0 <= number < pieces:
                return None
            cols = self.cols[owner]
            return slice(cols * number // pieces, cols * (number + 1) // pieces)

        turns = [_Turn(slice(0, self.cols[rank]), piece(rank, 0))]
        for number in range(pieces):
            for step in range(1, size):
                setting_out = piece(rank, number + 1) if step == size - 1 else None
                coming_home = piece(rank, number - 1) if step == 1 else None
                turns.append(_Turn(piece((rank - step) % size, number), setting_out, coming_home))
        return [*turns, _Turn(None, coming_home=piece(rank, pieces - 1))]


def _length(cols: slice | None) -> int:
    return 0 if cols is None else cols.stop - cols.start


def _like(tensor: Tensor, length: int) -> Tensor:
    return tensor.new_empty((length, *tensor.shape[1:]))


def chosen_plan(
    member: Member, exchange: str | None, cols: Sequence[int], depth: int, itemsize: int, sum_itemsize: int
) -> Plan:
    """The plan that exchange names, else the one for this size: the same in every process.

    Args:
        cols: columns of each process.
        depth: features D.
        itemsize, sum_itemsize: bytes of a feature and of its gradient's sum; the latter 0 where none is formed.
    """
    if exchange is None:
        # Sums are held as they were found and as they arrive.
        gathered = max(cols) * member.size * depth * (itemsize + 2 * sum_itemsize)
        exchange = "gather" if gathered <= GATHERED_BYTES else "ring"
    return GatherPlan(member, cols) if exchange == "gather" else RingPlan(member, cols)
