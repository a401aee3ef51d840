"""The gamma-weighted decomposable contrastive loss, with its memory, its draws and its temperature."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from contrastile.draws import GammaDraws
from contrastile.functional import gamma_contrastive, log_normalizers
from contrastile.normalizer import LogNormalizerMemory, Normalizer
from contrastile.validation import INTEGER_DTYPES

MODES = ("mixed", "lagged")
DRAWS = ("gamma", "mean")

LogNormalizers = tuple[Tensor, Tensor | None]  # of rows and of columns, (B,) each


class GammaContrastiveLoss(nn.Module):
    """Contrastive loss over all num_samples pairs, trained from small batches with a remembered normaliser.

        L_i = -s_pos + g_i sum_j phi(s_ij - log Z_i) - log g_i + log Z_i - 1,      g_i ~ Gamma(shape) / shape

    where each negative of the batch counts (virtual_batch - 1) / (B - 1) times: an upper bound of the InfoNCE loss
    with that many samples, tight at the right log Z_i (see `gamma_contrastive`). After Chen et al., "Why do we need
    large batchsizes in contrastive learning?", NeurIPS 2022; memory, modes, cap and multiplier are derived here.

    mode="mixed" moves the memory towards the batch first and takes log Z from there: 4 products in both directions,
    and no negative weighs more than 1 / update_rate. mode="lagged" takes log Z as the memory had it, which may be
    an epoch old: 3 products, and only the cap keeps it stable. A sample's first visit takes the batch's own log Z,
    which costs "lagged" a fourth product: on a CPU in batches with such a sample, elsewhere always, as asking
    would wait for the device.

    In eval mode nothing is remembered and nothing drawn: log Z is the batch's own, which makes the bound tight, and
    the value InfoNCE's with the multiplier. index may then be None.

    Args:
        num_samples: size of the data set that indices run over, at least 2.
        init_scale: 1 / temperature, where forward is not given one.
        learnable_scale: make it a parameter, its logarithm `log_scale` (); hand it to the optimiser.
        max_scale: training holds the learned scale at this at most, as CLIP does.
        mode: "mixed" or "lagged".
        draws: "gamma" samples g_i, "mean" takes g_i = 1.
        shape: of the gamma draws, at least 1; the larger, the closer to "mean".
        update_rate: share of the batch in the remembered average, in (0, 1]; default 0.7.
        normalizer: what remembers instead of `LogNormalizerMemory(num_samples, update_rate=update_rate)`.
        cap: hold every weight at 1 at most; default for "lagged" only, since "mixed" is bounded without.
        symmetric: both directions, else the rows of x alone.
        virtual_batch: number of samples that a batch stands for, at least 2; default num_samples.
        generator: chooses the seed of the draws; default torch's own, so that torch.manual_seed fixes the run.
        backend: name of a backend instead of the automatic choice.

    Raises:
        ValueError: an option is out of its range, or both update_rate and normalizer are given.
    """

    weight_sums: Tensor
    drift: Tensor

    def __init__(
        self,
        num_samples: int,
        *,
        init_scale: float = 1 / 0.07,
        learnable_scale: bool = False,
        max_scale: float = 100.0,
        mode: str = "mixed",
        draws: str = "gamma",
        shape: float = 1.0,
        update_rate: float | None = None,
        normalizer: Normalizer | None = None,
        cap: bool | None = None,
        symmetric: bool = True,
        virtual_batch: int | None = None,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        virtual_batch = num_samples if virtual_batch is None else virtual_batch
        _check_options(num_samples, virtual_batch, init_scale, max_scale, mode, draws)
        if normalizer is None:
            rate = {} if update_rate is None else {"update_rate": update_rate}
            normalizer = LogNormalizerMemory(num_samples, columns=symmetric, **rate)
        elif update_rate is not None:
            raise ValueError("update_rate and normalizer are both given: the rate belongs to the default normaliser")
        self.num_samples = num_samples
        self.init_scale = init_scale
        self.max_scale = max_scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(init_scale))) if learnable_scale else None
        self.mode = mode
        self.normalizer = normalizer
        self.draws = GammaDraws(shape, generator=generator) if draws == "gamma" else None
        self.cap = mode == "lagged" if cap is None else cap
        self.symmetric = symmetric
        self.virtual_batch = virtual_batch
        self.backend = backend
        self.register_buffer("weight_sums", torch.zeros(2, dtype=torch.int64))  # above one, all
        self.register_buffer("drift", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor, index: Tensor | None, scale: float | Tensor | None = None) -> Tensor:
        """The bound, (), float32, or float64 for float64 inputs.

        Two rows of equal index are one sample, hence no negatives of each other. A batch of one sample has no
        negatives: it is scored with what the memory knows, and not remembered.

        Args:
            x, y: the two sides of B pairs, (B, D) each, used as given: normalise them first.
            index: which samples these are, (B,) integers from 0 to num_samples - 1.
            scale: 1 / temperature, a number or a tensor () that gets its gradient; default the loss's own.

        Raises:
            ValueError: x and y differ in rows; index has another length, or leaves its range (looked at on a CPU
                only); index is missing in training; a scale is given to a loss that learns its own.
            TypeError: index holds no integers.
            ValueError, TypeError, RuntimeError: as `gamma_contrastive` does.
        """
        if x.shape[:1] != y.shape[:1]:
            raise ValueError(f"x is {tuple(x.shape)} but y is {tuple(y.shape)}: both need one row per sample")
        index = self._checked(index, x)
        scale = self._scale(scale)
        rows = x.shape[0]
        log_multiplier = _log_ratio(self.virtual_batch - 1, rows - 1) if rows > 1 else 0.0
        groups = None if index is None else (index, index)
        arguments = (x, y, scale, groups, self.symmetric, log_multiplier, self.backend)

        remembers = self.training and index is not None and rows > 1
        if index is None or not self.training:
            row_log_z, col_log_z = _batch_log_normalizers(*arguments)
        elif self.mode == "mixed":
            fresh = _batch_log_normalizers(*arguments)
            if remembers:
                self.normalizer.update(index, *fresh)
            row_log_z, col_log_z = _known_or(fresh, self.normalizer.estimate(index))
        else:
            row_log_z, col_log_z = _with_first_visits(self.normalizer.estimate(index), *arguments)

        row_draws, col_draws = self._draw(rows)
        loss, row_lse, col_lse = gamma_contrastive(
            x,
            y,
            scale,
            -row_log_z,
            None if col_log_z is None else -col_log_z,
            groups=groups,
            log_multiplier=log_multiplier,
            cap=self.cap and self.training,
            row_draws=row_draws,
            col_draws=col_draws,
            backend=self.backend,
        )
        if remembers and index is not None:
            if self.mode == "lagged":
                self.normalizer.update(index, row_lse, col_lse)
            self._take_note(row_lse - row_log_z, None if col_lse is None else col_lse - col_log_z)
        return loss
