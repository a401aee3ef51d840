"""A memory of log-normalisers spread over the processes of a group, for more samples than one device has room for.

Nobody asks an owner and nobody tells one: every process knows the indices of all rows of the batch, so it puts what it
keeps of them into a vector with an entry for each row, zero where a sample is another's, and these vectors are summed.

    estimate   indices gathered, levels of all rows summed        (P - 1) B (8 + 8 sides) bytes sent by each
    update     levels of all rows summed                          (P - 1) B 8 sides

for P processes of B rows each, and one side or two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from contrastile.distributed import Group, RowShare
from contrastile.distributed.member import Member
from contrastile.normalizer import UPDATE_RATE, LogNormalizerMemory, PairBatch, check_count, same_dtype


class ShardedLogNormalizerMemory(LogNormalizerMemory):
    """`LogNormalizerMemory` of which each of P processes keeps ceil(num_samples / P) consecutive entries.

    Estimates, `visits` and `rejected` are those of a memory that every process has all of, to the bit. Every process
    makes the same calls; the loss that it serves has the same group.

    Its state has the keys and shapes of `LogNormalizerMemory`, with level as a DTensor sharded along dimension 1, so
    that torch.distributed.checkpoint loads it with another number of processes, and into and from a memory that is not
    spread. Of a plain tensor (sides, num_samples) each process loads its part. level is no buffer, as
    DistributedDataParallel makes the buffers of all processes equal.

    Args:
        num_samples: number of samples that indices run over, of all processes.
        group: process group of torch.distributed.
        update_rate, columns: as for `LogNormalizerMemory`.

    Raises:
        ValueError: as `LogNormalizerMemory` does; this process is not in the group.
        TypeError, RuntimeError: group is no process group; torch.distributed is not initialised.
    """

    def __init__(
        self, num_samples: int, group: Group, *, update_rate: float = UPDATE_RATE, columns: bool = True
    ) -> None:
        check_count(num_samples)
        member = Member(group)
        most = -(-num_samples // member.size)
        super().__init__(most + 1, update_rate=update_rate, columns=columns)
        self.spare = most  # what others keep is written here, and not read
        self.num_samples = num_samples
        self.member = member
        self.first = min(member.rank * most, num_samples)
        self.count = min(most, num_samples - self.first)
        level = self.level
        del self.level
        self.level = level

    def estimate(self, index: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor | None]:
        """Of own rows: see `LogNormalizerMemory`.

        Raises:
            ValueError: the batch is not one of this memory's group.
        """
        share = self._share_of(batch)
        rows, cols = super().estimate(share.gathered(index), batch)
        return rows[share.own], None if cols is None else cols[share.own]

    def stats(self) -> dict[str, Tensor]:
        """As `LogNormalizerMemory.stats`, but seen: of the samples that this process keeps."""
        return {**super().stats(), "seen": (self._kept()[0] > -torch.inf).float().mean()}

    def _kept(self) -> Tensor:
        return self.level[:, : self.count]

    def _place(self, index: Tensor) -> Tensor:
        """Where the levels of the samples are here, (B,): spare for those of others, past the end for no sample."""
        at = index - self.first
        at = torch.where((at >= 0) & (at < self.count), at, self.spare)
        return torch.where((index >= 0) & (index < self.num_samples), at, self.spare + 1)

    def _recall(self, index: Tensor, batch: PairBatch) -> Tensor:
        at = self._place(index)
        return self._share_of(batch).summed(torch.where(at == self.spare, 0, self.level[:, at]))

    def _keep(self, index: Tensor, level: Tensor) -> None:
        super()._keep(self._place(index), level)

    def _share_of(self, batch: PairBatch) -> RowShare:
        if batch.share is None or batch.group != self.member.group:
            whose = "one process" if batch.share is None else "another group"
            raise ValueError(
                f"the batch is of {whose}, the memory of a group of {self.member.size}: expected a loss with that group"
            )
        return batch.share

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShardedLogNormalizerMemory:
        self.level = same_dtype(fn)(self.level)
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        mesh = DeviceMesh.from_group(self.member.group, self.level.device.type)
        shape = self._shape()
        destination[prefix + "level"] = DTensor.from_local(
            self._kept(), mesh, [Shard(1)], run_check=False, shape=shape, stride=(shape[1], 1)
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "level"
        found = state_dict.pop(key, None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if found is None:
            missing_keys.append(key)
        elif found.shape != self._shape():
            error_msgs.append(f"{key} is {tuple(found.shape)}: expected {tuple(self._shape())}")
        elif isinstance(found, DTensor):
            self._kept().copy_(found.redistribute(placements=[Shard(1)]).to_local())
        else:
            self._kept().copy_(found[:, self.first : self.first + self.count])

    def _shape(self) -> torch.Size:
        return torch.Size((len(self.level), self.num_samples))
