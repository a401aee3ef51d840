"""The rows that a loss of latent structure is a mean over: of one batch, or of a process group's shares of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from contrastile.distributed import RowShare, refusals_told, summed_over
from contrastile.negatives import Place

__all__ = ["BatchRows", "check_rows"]


class BatchRows(NamedTuple):
    total: int  # of all processes
    place: Place

    def sum(self, local: Tensor) -> Tensor:
        """Of own rows' sums, over all processes."""
        return summed_over(local, self.place.group)


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
        return embeddings, BatchRows(len(embeddings[0]), place)
    with refusals_told(place.group):
        embeddings = prepare(True)
    rows, features = embeddings[0].shape
    facts = {"features": features, "dtype": str(embeddings[0].dtype).removeprefix("torch."), **options}
    share = RowShare.of(function, place.group, place.exchange, rows, **facts)
    return embeddings, BatchRows(share.total, place)
