"""Losses over a batch whose rows are spread over the processes of a torch.distributed group.

    agreement    a header of fixed size from every process first: what they ask for must fit together
    member       a process within its group: what it sends and receives, with errors that name it
    plans        how blocks of columns and what is summed over them get from process to process
    shares       rows of this process among those of all
    sweeps       the pairwise operations over own rows and all columns, as one more backend
    losses       the losses of contrastile.functional over a group

A process holds rows of x and of y, and a row's positive is among its own columns. docs/distributed.md has the contract.
"""

from contrastile.distributed.agreement import HEADER_BYTES
from contrastile.distributed.member import Group, added_up, default_group, summed_over
from contrastile.distributed.plans import EXCHANGES, GATHERED_BYTES, PIECE_BYTES
from contrastile.distributed.shares import RowShare, refusals_told

__all__ = [
    "EXCHANGES",
    "GATHERED_BYTES",
    "HEADER_BYTES",
    "PIECE_BYTES",
    "Group",
    "RowShare",
    "added_up",
    "default_group",
    "refusals_told",
    "summed_over",
]
