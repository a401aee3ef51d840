"""CLIP's loss with open_clip's constructor and call."""

from __future__ import annotations

from torch import Tensor, nn

from contrastile.distributed import Group, default_group
from contrastile.functional import info_nce
from contrastile.validation import one_number


class ClipLoss(nn.Module):
    """Symmetric InfoNCE between image and text features, without the N x N logits.

    Takes the place of ClipLoss of open_clip 3.3 (Radford et al. 2021, figure 3); the features are used as given, so
    normalise them first. With world_size above 1 the batch is that of all processes. local_loss, gather_with_grad and
    rank are moot: every process has the loss of the whole batch, and gradients as open_clip has them with
    gather_with_grad, whose average over processes is the batch's. cache_labels is moot, as no labels are formed.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as in open_clip.
        group: process group to take instead of the default one of world_size processes.
        exchange, backend: as for `info_nce`.

    Raises:
        NotImplementedError: use_horovod with world_size above 1.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        group: Group | None = None,
        exchange: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if use_horovod and world_size > 1:
            raise NotImplementedError(
                f"use_horovod with world_size {world_size}: processes exchange by torch.distributed alone"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.group = group
        self.exchange = exchange
        self.backend = backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, (), or {"contrastive_loss": loss}.

        Args:
            image_features, text_features: (N, D) each, one dtype; in a group N may differ between processes.
            logit_scale: 1 / temperature, one number; a tensor gets its gradient.
            logit_bias: one number. It moves all logits alike, which no softmax sees. A tensor still gets a gradient,
                of zero, rather than none: DistributedDataParallel waits for every parameter of the model.
            output_dict: wrap the loss in a dictionary.

        Raises:
            ValueError: logit_bias has several entries, or as `info_nce` does; torch.distributed has not world_size
                processes.
            TypeError: as `info_nce` does.
            RuntimeError: as `info_nce` does; world_size is above 1 and torch.distributed not initialised.
        """
        group = self.group
        if group is None and self.world_size > 1:
            group = default_group(self.world_size)
        loss = info_nce(
            image_features,
            text_features,
            one_number(logit_scale),
            group=group,
            exchange=self.exchange,
            backend=self.backend,
        )
        if isinstance(logit_bias, Tensor):
            if logit_bias.numel() != 1:
                raise ValueError(f"logit_bias has shape {tuple(logit_bias.shape)}: expected one number")
            loss = loss + 0 * logit_bias.reshape(()).to(loss.dtype)
        return {"contrastive_loss": loss} if output_dict else loss
