"""NT-Xent with lightly's constructor and call: SimCLR within the batch, MoCo against a memory bank."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from contrastile.distributed import Group, default_group, refusals_told
from contrastile.functional import log_normalizers, nt_xent
from contrastile.validation import accumulation_dtype


class NTXentLoss(nn.Module):
    """Normalised temperature-scaled cross entropy of two views, without the matrix of their similarities.

    Takes the place of NTXentLoss of lightly 1.6. Without a bank every other view of the batch is
    a negative (Chen et al. 2020, eq. 1). With one, out0 is told from the bank's entries only (He et al. 2020, eq. 1):

        l_i = log( exp(s_i,pos) + sum_k exp(s_ik) ) - s_i,pos = softplus( log sum_k exp(s_ik) - s_i,pos )

    Args:
        temperature: above 0.
        memory_bank_size: (entries, dim) of the bank, or 0 for none.
        gather_distributed: negatives of all processes, where there are several: the loss is that of the whole batch,
            see `nt_xent`. Not with a memory bank, whose entries would differ between processes.
        group: process group to take instead of the default one; means gather_distributed.
        exchange, backend: as for `nt_xent`.

    Raises:
        ValueError: temperature is not above 0, memory_bank_size is neither 0 nor two numbers, or gather_distributed
            is set where torch has no distributed package.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        group: Group | None = None,
        exchange: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not temperature >= 1e-8:
            raise ValueError(f"temperature is {temperature}: expected a number above 1e-8")
        if gather_distributed and not distributed.is_available():
            raise ValueError("gather_distributed is set, but this torch has no torch.distributed")
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.memory_bank = MemoryBank(memory_bank_size)
        self.group = group
        self.exchange = exchange
        self.backend = backend

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The mean loss, (): over the 2 B views without a bank, over the B rows of out0 with one.

        The bank takes in out1 whenever out0 requires a gradient, after the loss was taken against what it held.

        Args:
            out0, out1: projections of the two views, (B, D) each; they are normalised here.

        Raises:
            ValueError: the shapes differ, or D is not the bank's dim.
            NotImplementedError: several processes and a memory bank.
            TypeError, RuntimeError: as `nt_xent` does.
        """
        group = self.group
        if group is None and self.gather_distributed and distributed.is_initialized():
            processes = distributed.get_world_size()
            group = default_group(processes) if processes > 1 else None
        with nullcontext() if group is None else refusals_told(group):
            view0, view1 = self._views(out0, out1, group)
        scale = 1 / self.temperature
        if self.memory_bank.size[0] == 0:
            views = torch.cat([view0, view1])
            return nt_xent(views, scale, group=group, exchange=self.exchange, backend=self.backend)
        negatives = self.memory_bank(view1, update=out0.requires_grad).to(view0.dtype)
        negative, _ = log_normalizers(view0, negatives, scale, columns=False, backend=self.backend)
        dtype = accumulation_dtype(view0.dtype)
        positive = scale * (view0.to(dtype) * view1.to(dtype)).sum(1)
        # Linear where float64 no longer tells the difference; the default of 20 is too early for it.
        return F.softplus(negative - positive, threshold=40).mean()

    def _views(self, out0: Tensor, out1: Tensor, group: Group | None) -> tuple[Tensor, Tensor]:
        if out0.dim() != 2 or out0.shape != out1.shape:
            raise ValueError(f"out0 is {tuple(out0.shape)} and out1 is {tuple(out1.shape)}: expected (B, D) each")
        if group is not None and self.memory_bank.size[0]:
            raise NotImplementedError(
                f"memory_bank_size {self.memory_bank.size} over a group: the bank would have to take in the views of "
                "all processes; gather_distributed=False keeps to each process's own"
            )
        return F.normalize(out0, dim=1), F.normalize(out1, dim=1)


class MemoryBank(nn.Module):
    """Normalised views of earlier batches, oldest overwritten first: `bank` (entries, dim), `bank_ptr` (1,).

    Not part of the state_dict, as in lightly: a resumed run starts with a bank of random directions.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(self, size: int | Sequence[int]) -> None:
        super().__init__()
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if min(self.size, default=-1) < 0:
            raise ValueError(f"memory_bank_size is {size}: expected no negative entries")
        if self.size != (0,) and len(self.size) != 2:
            raise ValueError(f"memory_bank_size is {size}: expected (entries, dim), or 0 for no bank")
        bank = F.normalize(torch.randn(self.size), dim=-1) if len(self.size) == 2 else torch.empty(0)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64), persistent=False)

    def forward(self, views: Tensor, update: bool) -> Tensor:
        """The bank as it was, (entries, dim); with update, views (B, dim) then take the place of its oldest."""
        held = self.bank
        if views.shape[1] != held.shape[1]:
            raise ValueError(f"out0 and out1 are {tuple(views.shape)}, but the memory bank is {tuple(held.shape)}")
        if update:
            self._take_in(views.detach().to(held.dtype))
        return held

    @torch.no_grad()
    def _take_in(self, views: Tensor) -> None:
        # A batch that reaches the end of the bank loses what lies beyond it, and the next one starts at the front.
        # Rows beyond the end repeat the write of the first row: no shape depends on the pointer's value.
        entries, ptr = len(self.bank), self.bank_ptr
        slots = ptr + torch.arange(len(views), device=views.device)
        fits = slots < entries
        rows = torch.where(fits[:, None], views, views[:1])
        # A new tensor: backward still needs the old one, and a compiled backward would read it after a write in place.
        self.bank = self.bank.index_copy(0, torch.where(fits, slots, ptr), rows)
        self.bank_ptr = torch.where(ptr + len(views) >= entries, 0, ptr + len(views))
