"""The rows that a loss of latent structure is a mean over: of one batch, or of a process group's shares of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from contrastile import backends
from contrastile.distributed import RowShare, refusals_told, summed_over
from contrastile.negatives import Place

__all__ = ["BatchRows", "check_rows"]


class BatchRows(NamedTuple):
    total: int  # of all processes
    place: Place
    share: RowShare | None  # None: no group

    @property
    def processes(self) -> int:
        return 1 if self.share is None else self.share.member.size

    def sum(self, local: Tensor) -> Tensor:
        """Of own rows' sums, over all processes."""
        return summed_over(local, self.place.group)

    def of_all(self, values: Tensor) -> Tensor:
        """Own rows' values -> all rows', (total, ...), without a gradient."""
        return values if self.share is None else self.share.gathered(values)


def check_rows(
    function: str, prepare: Callable[[bool], list[Tensor]], place: Place, **options: object
) -> tuple[list[Tensor], BatchRows]:
    """Checked embeddings of the same samples, and what they are a share of.

    Args:
        prepare: checks own arguments; told whether there may be no rows.
        function, options: what all processes of a group must have alike.

    Raises:
        ValueError, TypeError: as prepare does, or the processes' arguments differ, or nobody has rows.
        RuntimeError: arguments were refused in another process.
    """
    if place.group is None:
        embeddings = prepare(False)
        return embeddings, BatchRows(len(embeddings[0]), place, None)
    with refusals_told(place.group):
        embeddings = prepare(True)
        backends.resolve(place.backend, embeddings[0].device.type, embeddings[0].dtype)
    rows, features = embeddings[0].shape
    # Facts are compared as text, in which 1 is not 1.0.
    alike = {name: float(value) if type(value) is int else value for name, value in options.items()}
    facts = {"features": features, "dtype": str(embeddings[0].dtype).removeprefix("torch."), **alike}
    share = RowShare.of(function, place.group, place.exchange, rows, **facts)
    return embeddings, BatchRows(share.total, place, share)
