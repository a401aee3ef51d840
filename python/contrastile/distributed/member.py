"""A process within its group: what it sends and receives.

Every message of the package between processes passes here, but for the Gram matrices of geometric consistency.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

Group = Any  # torch.distributed.ProcessGroup, which not every torch has


class Member:
    """This process in a group.

    Args:
        group: a process group of torch.distributed.

    Raises:
        TypeError: group is no process group.
        ValueError: this process is not in it.
        RuntimeError: torch has no torch.distributed, or it is not initialised; the caller is being compiled.
    """

    def __init__(self, group: Group) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "a loss over a group cannot be traced by torch.compile: call it outside of the compiled function"
            )
        if not distributed.is_available() or not distributed.is_initialized():
            raise RuntimeError("group is given, but torch.distributed is not there or not initialised")
        if group == distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group is one that this process does not belong to: expected a group with it")
        if not isinstance(group, distributed.ProcessGroup):
            raise TypeError(f"group is {type(group).__name__}: expected a torch.distributed.ProcessGroup")
        self.group = group
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)
        # "cpu:gloo,cuda:nccl"
        self.device_types = [part.split(":")[0] for part in str(distributed.get_backend_config(group)).split(",")]

    @property
    def header_device(self) -> torch.device:
        """Where small facts are exchanged: the processor if the group serves it, so that no device is waited for."""
        return torch.device("cpu" if "cpu" in self.device_types else self.device_types[0])

    def gathered(self, local: Tensor, sizes: Sequence[int], what: str) -> Tensor:
        """Rows of all processes, (sum of sizes, ...): local is (sizes[rank], ...). As bytes, so NaN keep theirs.

        Shares of unequal size are padded to the largest.
        """
        most = max(sizes)
        if sum(sizes) == 0 or local.shape[1:].numel() == 0:
            return local.new_empty((sum(sizes), *local.shape[1:]))
        padded = local.contiguous()
        if len(local) < most:
            padded = torch.cat([padded, local.new_zeros((most - len(local), *local.shape[1:]))])
        found = local.new_empty((self.size * most, *local.shape[1:]))
        with self._named(f"gathering {what}"):
            _all_gather(_bytes_of(found), _bytes_of(padded), self.group)
        if min(sizes) == most:
            return found
        return torch.cat([found[rank * most : rank * most + size] for rank, size in enumerate(sizes)])

    def summands(self, partial: Tensor, sizes: Sequence[int], what: str) -> Tensor:
        """What every process has for this process's rows, (size, sizes[rank], ...): partial is (sum of sizes, ...).

        A reduce-scatter but for the sum, which the caller takes in the order of ranks: the same bits every time.
        """
        own = sizes[self.rank]
        found = partial.new_empty((self.size * own, *partial.shape[1:]))
        with self._named(f"scattering {what}"):
            distributed.all_to_all_single(found, partial.contiguous(), [own] * self.size, list(sizes), group=self.group)
        return found.view(self.size, own, *partial.shape[1:])

    @contextmanager
    def passing_on(self, sent: Sequence[Tensor], received: Sequence[Tensor], what: str) -> Iterator[None]:
        """Sends to the next process of the ring and receives from the one before, while the block runs."""
        following = distributed.get_global_rank(self.group, (self.rank + 1) % self.size)
        previous = distributed.get_global_rank(self.group, (self.rank - 1) % self.size)
        operations = [
            distributed.P2POp(distributed.isend, _bytes_of(t), following, self.group) for t in sent if t.numel()
        ]
        operations += [
            distributed.P2POp(distributed.irecv, _bytes_of(t), previous, self.group) for t in received if t.numel()
        ]
        operation = f"{what}, to process {following} and from process {previous},"
        with self._named(operation):
            transfers = distributed.batch_isend_irecv(operations) if operations else []
        yield
        with self._named(operation):
            for transfer in transfers:
                transfer.wait()

    def sum(self, values: Tensor, what: str) -> Tensor:
        """Of the values of all processes."""
        total = values.detach().clone()
        with self._named(f"summing {what}"):
            distributed.all_reduce(total, group=self.group)
        return total

    @contextmanager
    def _named(self, operation: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(f"rank {self.rank} of {self.size} in the group: {operation} failed: {error}") from error


def default_group(world_size: int) -> Group:
    """The group of all processes, of which there are to be world_size.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: there are more, or fewer.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        raise RuntimeError(f"world_size is {world_size}, but torch.distributed is not initialised")
    found = distributed.get_world_size()
    if found != world_size:
        raise ValueError(f"world_size is {world_size}, but torch.distributed has {found} processes")
    return distributed.group.WORLD


def summed_over(local: Tensor, group: Group | None) -> Tensor:
    """The sum of local over all processes of the group, which all differentiate alike.

    The gradient is that of the sum of all processes' results: the upstream gradient times the number of processes.
    """
    if group is None:
        return local
    apply: Any = _SumFunction.apply
    total: Tensor = apply(local, Member(group))
    return total


class _SumFunction(torch.autograd.Function):
    """apply(local, member) -> the sum over all processes."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, member: Member) -> Tensor:
        ctx.processes = member.size
        return member.sum(local, "the loss")

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return ctx.processes * upstream, None


def added_up(local: Tensor, group: Group | None) -> Tensor:
    """The sum of local over all processes of the group, which each goes on with in its own way.

    The gradient is that of the sum of all processes' results: upstream gradients are summed over the processes, each of
    which calls backward.
    """
    if group is None:
        return local
    apply: Any = _SumForEachFunction.apply
    total: Tensor = apply(local, Member(group))
    return total


class _SumForEachFunction(torch.autograd.Function):
    """apply(local, member) -> the sum over all processes."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, member: Member) -> Tensor:
        ctx.member = member
        return member.sum(local, "candidates")

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return ctx.member.sum(upstream, "gradients of the candidates' sum"), None


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _all_gather(found: Tensor, local: Tensor, group: Group) -> None:
    # The second is the same under its older name, which later releases of PyTorch warn about.
    gather: Any = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    gather(found, local, group=group)
