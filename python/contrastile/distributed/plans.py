"""Two ways for own rows to meet the columns of all processes, and for what is summed over rows to come home.

    gather   all columns come at once, one sweep, and every process's sums are sent to the columns' owners
    ring     blocks of columns pass from process to process, one a step, their sums one step behind them

A lap is one pass over all columns. In a ring the transfers of a step run beside its sweep: the next block comes in, and
so do the sums of the present one, gathered by the processes that had it before. A process's sums over its own rows and
columns stay at home, so sums make one hop less than a full round.

    step      0          1          2          3          home
    rank 0    [0]        [3]        [2] +3's   [1] +..    sums of block 0
    rank 1    [1]        [0]        [3] +..    [2] +..    sums of block 1
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


class RingPlan:
    def __init__(self, member: Member, cols: Sequence[int]) -> None:
        self.member, self.cols = member, cols

    def hold(self, columns: Columns) -> Columns:
        return {name: t.contiguous() for name, t in columns.items()}

    def lap(self, held: Columns, vectors: Columns, visit: Visit, what: str) -> Sums:
        rank, size = self.member.rank, self.member.size
        block = held | self.hold(vectors)
        home, done = Sums(), Sums()  # sums of own columns over own rows; sums of the last block, ready to move on
        for step in range(size):
            owner = (rank - step) % size
            coming: Columns = {}
            if step + 1 < size:
                coming = {name: _like(t, self.cols[owner - 1]) for name, t in block.items()}
            moving = done.tensors()
            arriving = [_like(t, self.cols[owner]) for t in moving]
            sent = [*(block[name] for name in coming), *moving]
            name = f"step {step + 1} of {size} of the {what} lap"
            with self.member.passing_on(sent, [*coming.values(), *arriving], name):
                found = visit(block, 0 if step == 0 else None)
            if step == 0:
                home = found
            else:
                if arriving:
                    found.add(found.of_tensors(arriving))
                done = found
            block = coming
        moving = done.tensors()
        arriving = [_like(t, self.cols[rank]) for t in moving]
        with self.member.passing_on(moving, arriving, f"the last step of the {what} lap"):
            pass
        if arriving:
            home.add(home.of_tensors(arriving))
        return home


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
