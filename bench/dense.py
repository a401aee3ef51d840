"""Plain PyTorch: each loss with its whole score matrix, and in checkpointed strips of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from contrastile.bench.cases import SCALE, Inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

STRIP_ROWS = 1024


def one_direction(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(SCALE * x @ y.T, torch.arange(x.shape[0], device=x.device))


def symmetric(x: Tensor, y: Tensor) -> Tensor:
    logits = SCALE * x @ y.T
    targets = torch.arange(x.shape[0], device=x.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def nt_xent(z: Tensor) -> Tensor:
    rows = z.shape[0]
    logits = (SCALE * z @ z.T).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(rows, device=z.device).roll(-(rows // 2)))


def gamma(x: Tensor, y: Tensor, log_u: Tensor, log_v: Tensor) -> Tensor:
    logits = (SCALE * x @ y.T).to(log_u.dtype)
    positive = logits.diagonal()
    rows = _phi(logits + log_u[:, None]).sum(1) - positive - log_u - 1
    columns = _phi(logits + log_v).sum(0) - positive - log_v - 1
    return (rows + columns).mean() / 2


def _phi(t: Tensor) -> Tensor:
    return torch.where(t <= 0, t.clamp(max=0).exp(), 1 + t)


Form = Callable[..., Tensor]
FORMS: dict[str, Form] = {
    "one_direction": one_direction,
    "symmetric": symmetric,
    "nt_xent": nt_xent,
    "gamma": gamma,
}


def evaluate(loss: str, wrap: Callable[[Form], Form] | None = None) -> Callable[[Inputs], Tensor]:
    """The dense form as a function of Inputs; `wrap` is applied to it first (torch.compile)."""
    function = wrap(FORMS[loss]) if wrap else FORMS[loss]
    if loss == "gamma":
        return lambda inputs: function(*inputs.pair, inputs.log_u, inputs.log_v)
    return lambda inputs: function(*inputs.leaves)


def evaluate_in_strips(loss: str) -> Callable[[Inputs], Tensor]:
    """Checkpointed strips of STRIP_ROWS rows: backward computes each strip's scores a second time."""

    def run(inputs: Inputs) -> Tensor:
        x, y = inputs.pair
        strips = [
            checkpoint(_strip, loss, strip, y, index * STRIP_ROWS, inputs, use_reentrant=False)
            for index, strip in enumerate(torch.split(x, STRIP_ROWS))
        ]
        total = torch.stack([strip_total for strip_total, _ in strips]).sum() / x.shape[0]
        if loss != "symmetric":
            return total
        col_lse = torch.stack([strip_lse for _, strip_lse in strips]).logsumexp(0)
        return (total + (col_lse - SCALE * (x * y).sum(1)).mean()) / 2

    return run


def _strip(loss: str, x: Tensor, y: Tensor, begin: int, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Sum of the strip's row losses, and its columns' log-sum-exp (only symmetric uses it)."""
    rows = torch.arange(begin, begin + x.shape[0], device=x.device)
    logits = SCALE * x @ y.T
    nothing = logits.new_zeros(())
    if loss == "gamma":
        positive = logits.gather(1, rows[:, None]).squeeze(1)
        mass = _phi(logits + inputs.log_u[rows, None]).sum() + _phi(logits + inputs.log_v).sum()
        return (mass - (2 * positive + inputs.log_u[rows] + inputs.log_v[rows] + 2).sum()) / 2, nothing
    if loss == "nt_xent":
        logits = logits.scatter(1, rows[:, None], -torch.inf)
        return F.cross_entropy(logits, (rows + y.shape[0] // 2) % y.shape[0], reduction="sum"), nothing
    row_total = F.cross_entropy(logits, rows, reduction="sum")
    return row_total, logits.logsumexp(0) if loss == "symmetric" else nothing
