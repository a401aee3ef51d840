"""A share of the rows of a batch, for losses that keep something of every row: the gamma loss with its memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from contrastile.distributed.agreement import Facts, agree, tell_refusal
from contrastile.distributed.member import Group, Member


class RowShare(NamedTuple):
    """Rows of one process among those of all, in the order of ranks."""

    member: Member
    exchange: str | None
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, function: str, group: Group, exchange: str | None, rows: int, **options: object) -> RowShare:
        """Exchanges headers.

        Args:
            function, options: what must be equal in all processes.
            rows: of this process.

        Raises:
            ValueError, RuntimeError: as `contrastile.distributed.agreement.agree` does.
        """
        member = Member(group)
        facts = Facts(rows, rows, math.nan, {"function": function, **options})
        sizes, _ = agree(member, lambda: (facts, True))
        return cls(member, exchange, sizes.rows)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def own(self) -> slice:
        first = sum(self.sizes[: self.member.rank])
        return slice(first, first + self.sizes[self.member.rank])

    def gathered(self, values: Tensor) -> Tensor:
        """(rows, ...) of each process -> (total, ...)."""
        return self.member.gathered(values, self.sizes, "values by row")

    def summed(self, values: Tensor) -> Tensor:
        return self.member.sum(values, "statistics")


@contextmanager
def refusals_told(group: Group) -> Iterator[None]:
    """An error within the block goes to the other processes, who wait for a header, before it is raised."""
    try:
        yield
    except Exception as error:
        tell_refusal(Member(group), error)
        raise
