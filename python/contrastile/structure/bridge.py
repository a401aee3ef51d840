"""The Brownian bridge between the two embeddings of a pair, as a distance of an augmented one to its mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from contrastile.distributed import Group
from contrastile.negatives import Place
from contrastile.structure.batch import check_rows
from contrastile.structure.row_pass import BridgeDistance, row_pass, unit_gain
from contrastile.validation import accumulation_dtype, check_alike, check_number, check_reduction, check_vector

__all__ = ["BrownianBridgeLoss", "brownian_bridge"]


def brownian_bridge(
    v_aug: Tensor,
    v: Tensor,
    t: Tensor,
    *,
    time: float | Tensor = 0.25,
    likelihood_weight: bool = False,
    detach_aug: bool = False,
    reduction: str = "mean",
    group: Group | None = None,
    backend: str | None = None,
) -> Tensor:
    """Squared distance of v_aug to the mean of the bridge from t to v, brought to length 1 (Jiang et al. 2023, L_Br).

        l_j = |v^a_j - m_j / |m_j||^2,   m_j = time v_j + (1 - time) t_j

    Computed as this distance, for any rows: nothing cancels where v^a is near the mean. For unit rows it equals
    2 - 2 <m, v^a> / |m|, which is not what the paper's second line has (docs/structure.md). Where m is 0, which has no
    direction, l_j is |v^a_j|^2 and gives v and t no gradient.

    Args:
        v_aug, v, t: (N, D), float16, bfloat16, float32 or float64.
        time: from 0 (at t) to 1 (at v): a number, or a tensor () or (N,), a constant.
        likelihood_weight: divides by 2 time (1 - time), twice the variance of a standard bridge: l_j is then its
            negative log-likelihood of v^a_j, up to a term that no embedding changes [derived]. time may not be 0 or 1.
        detach_aug: no gradient into v_aug, as for a momentum encoder's.
        reduction: "mean" or "sum" over rows, or "none".
        group: process group whose processes hold the rows of a larger batch: the loss is the whole batch's in every
            process ("none": of own rows), with the gradients of `info_nce`. One number is summed over it.
        backend: name of a backend instead of the automatic choice.

    Returns:
        The loss, () or (N,), float32, or float64 for float64 inputs.

    Raises:
        ValueError: a shape, a device or a value does not fit, e.g. time is 1.5.
        TypeError: a dtype does not fit.
        RuntimeError: the named backend cannot run.
    """

    def prepare(may_be_empty: bool) -> list[Tensor]:
        check_reduction(reduction)
        alike = check_alike({"v_aug": v_aug, "v": v, "t": t}, may_be_empty=may_be_empty)
        return [*alike, _check_time(time, alike[1], likelihood_weight)]

    (v_aug, v, t, times), rows = check_rows(
        "brownian_bridge", prepare, Place(group, None, backend), reduction=reduction
    )
    gain = unit_gain(v, 1 / rows.total if reduction == "mean" else 1.0)
    if likelihood_weight:
        gain = gain / (2 * times * (1 - times))
    inputs = (v_aug.detach() if detach_aug else v_aug, v, t)
    found = row_pass(BridgeDistance(times), inputs, gain, reduction, backend)
    return found if reduction == "none" else rows.sum(found)


class BrownianBridgeLoss(nn.Module):
    """`brownian_bridge` as a module (Jiang et al. 2023).

    Args:
        time: from 0 to 1, or "uniform": drawn anew for every row and call, in training and evaluation alike.
        likelihood_weight: as for `brownian_bridge`; not with "uniform" times, under which its mean is infinite.
        detach_aug, reduction, group, backend: as for `brownian_bridge`.
        generator: of the draws; default PyTorch's.

    Raises:
        ValueError: a value does not fit.
    """

    def __init__(
        self,
        time: float | str = 0.25,
        *,
        likelihood_weight: bool = False,
        detach_aug: bool = False,
        reduction: str = "mean",
        generator: torch.Generator | None = None,
        group: Group | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        if isinstance(time, str):
            if time != "uniform":
                raise ValueError(f"time is {time!r}: expected a number from 0 to 1 or 'uniform'")
            if likelihood_weight:
                raise ValueError("likelihood_weight with time='uniform': its mean over the times is infinite")
        else:
            check_number("time", time, 0, 1)
        self.time = time
        self.likelihood_weight = likelihood_weight
        self.detach_aug = detach_aug
        self.reduction = reduction
        self.generator = generator
        self.group = group
        self.backend = backend

    def forward(self, v_aug: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """The loss, () or (N,). Arguments and errors are those of `brownian_bridge`."""
        time: float | Tensor
        if isinstance(self.time, str):
            dtype = accumulation_dtype(v.dtype)
            time = torch.rand(len(v), dtype=dtype, device=v.device, generator=self.generator)
        else:
            time = self.time
        return brownian_bridge(
            v_aug,
            v,
            t,
            time=time,
            likelihood_weight=self.likelihood_weight,
            detach_aug=self.detach_aug,
            reduction=self.reduction,
            group=self.group,
            backend=self.backend,
        )


def _check_time(time: float | Tensor, v: Tensor, inside: bool) -> Tensor:
    """(N,), accumulation dtype."""
    rows, expected = len(v), "expected times between 0 and 1" if inside else "expected times from 0 to 1"
    if not isinstance(time, Tensor):
        check_number("time", time, 0, 1)
        if inside and time in (0, 1):
            raise ValueError(f"time is {time}, where the bridge has no variance: {expected} with likelihood_weight")
        return torch.full((rows,), time, dtype=accumulation_dtype(v.dtype), device=v.device)
    times = check_vector("time", time.expand(rows) if time.dim() == 0 else time, rows, v)
    if not torch.compiler.is_compiling() and v.device.type == "cpu":
        fits = (times > 0) & (times < 1) if inside else (times >= 0) & (times <= 1)
        if not bool(fits.all()):
            wrong = times[~fits][0].item()
            raise ValueError(f"time of shape {tuple(times.shape)} holds {wrong}: {expected}")
    return times
