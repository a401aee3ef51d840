"""InfoNCE with what its softmax may have beside the pairs of a batch, as modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from contrastile.distributed import Group
from contrastile.functional import info_nce
from contrastile.functional_directional import directional_info_nce
from contrastile.matryoshka import matryoshka
from contrastile.validation import Groups


class InfoNCELoss(nn.Module):
    """`info_nce` as a module.

    Args:
        symmetric, label_smoothing, prior, false_negative_margin, group, exchange, backend: as for `info_nce`; prior is
            a number or None.
    """

    def __init__(
        self,
        *,
        symmetric: bool = True,
        label_smoothing: float = 0.0,
        prior: float | None = None,
        false_negative_margin: float | None = None,
        group: Group | None = None,
        exchange: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.label_smoothing = label_smoothing
        self.prior = prior
        self.false_negative_margin = false_negative_margin
        self.group = group
        self.exchange = exchange
        self.backend = backend

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        scale: float | Tensor,
        hard_negatives: Tensor | None = None,
        *,
        positives: Tensor | None = None,
        groups: Groups | None = None,
        prior: Tensor | None = None,
    ) -> Tensor:
        """The loss, (). prior, (N,), in the place of the module's; other arguments and errors as `info_nce`."""
        options = self.options() if prior is None else self.options() | {"prior": prior}
        return info_nce(x, y, scale, positives=positives, groups=groups, hard_negatives=hard_negatives, **options)

    def options(self) -> dict[str, Any]:
        """Arguments of `info_nce` that the module keeps."""
        return {
            "symmetric": self.symmetric,
            "label_smoothing": self.label_smoothing,
            "prior": self.prior,
            "false_negative_margin": self.false_negative_margin,
            "group": self.group,
            "exchange": self.exchange,
            "backend": self.backend,
        }


class DirectionalInfoNCELoss(nn.Module):
    """`directional_info_nce` as a module.

    Args:
        directions, partition, label_smoothing, prior, false_negative_margin, group, exchange, backend: as for
            `directional_info_nce`; prior is a number or None.
    """

    def __init__(
        self,
        directions: Sequence[str] = ("xy", "xx", "yy"),
        partition: str = "joint",
        *,
        label_smoothing: float = 0.0,
        prior: float | None = None,
        false_negative_margin: float | None = None,
        group: Group | None = None,
        exchange: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.directions = directions if isinstance(directions, str) else tuple(directions)
        self.partition = partition
        self.label_smoothing = label_smoothing
        self.prior = prior
        self.false_negative_margin = false_negative_margin
        self.group = group
        self.exchange = exchange
        self.backend = backend

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        scale: float | Tensor,
        hard_negatives: Tensor | None = None,
        *,
        positives: Tensor | None = None,
        groups: Groups | None = None,
        prior: Tensor | None = None,
    ) -> Tensor:
        """The loss, (). prior, (N,), in the place of the module's; others and errors as `directional_info_nce`."""
        return directional_info_nce(
            x,
            y,
            scale,
            directions=self.directions,
            partition=self.partition,
            positives=positives,
            groups=groups,
            hard_negatives=hard_negatives,
            label_smoothing=self.label_smoothing,
            prior=self.prior if prior is None else prior,
            false_negative_margin=self.false_negative_margin,
            group=self.group,
            exchange=self.exchange,
            backend=self.backend,
        )


class MatryoshkaLoss(nn.Module):
    """`matryoshka` around a loss module, or around one for each of the dims.

    Args:
        losses: a module for all dims, or one for each, as a loss with a memory needs.
        dims, weights, normalize: as for `matryoshka`.
    """

    def __init__(
        self,
        losses: nn.Module | Sequence[nn.Module],
        dims: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.losses = losses if isinstance(losses, nn.Module) else nn.ModuleList(losses)
        self.dims = tuple(dims)
        self.weights = None if weights is None else tuple(weights)
        self.normalize = normalize

    def forward(self, *embeddings: Tensor, **options: Any) -> Tensor:
        """The weighted sum. options, such as scale=20.0, go to every loss by name; errors as `matryoshka`."""
        losses: Any = list(self.losses) if isinstance(self.losses, nn.ModuleList) else self.losses
        kept = _options_of(self.losses) if options.keys() <= {"scale", "positives"} else None
        if kept is not None:  # by its function's name one sweep may serve all prefixes
            losses, options = info_nce, kept | options
        return matryoshka(
            losses, *embeddings, dims=self.dims, weights=self.weights, normalize=self.normalize, **options
        )


def _options_of(loss: nn.Module) -> dict[str, Any] | None:
    """Of an InfoNCELoss whose calls nobody listens to, who would miss them."""
    if type(loss) is not InfoNCELoss:
        return None
    hooks = (loss._forward_hooks, loss._forward_pre_hooks, loss._backward_hooks, loss._backward_pre_hooks)
    return None if any(hooks) else loss.options()
