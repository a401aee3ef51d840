"""A log-normaliser that is a function of the embedding: few numbers, whatever the number of samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from contrastile.normalizer import Float32State, PairBatch

WINDOW = 8
SHARPNESS = 10.0
# Rounding of float32 may change a log-normaliser by some parts in 2^24. Negatives that add less to it are not seen.
ROUNDING = 16 * 2.0**-24


class PrototypeLogNormalizer(Float32State):
    """log Z from prototypes: directions among the embeddings that remember what the samples near them met.

        log Z_i = log( exp(s_ii) + negatives * sum_k a_ik N_k ),      a_ik = softmax_k( sharpness <x_i / |x_i|, p_k> )

    For streams without an index, and for more samples than a memory may have entries: no sweep beyond the loss's own,
    and (D + 2) numbers a prototype and side. A row's positive is in its batch and thus known; remembered is N_k, the
    mean of exp(s_ij) over negatives j, of the rows whose nearest prototype is k. Mean and prototype move alike, by a
    running mean over their first `window` rows, then by a moving average over about as many. The first rows that
    training sees are where the prototypes start. Rows whose negatives are lost in the rounding of log Z are left out,
    and so are rows that are not finite, which are counted.

    Use mode="lagged": an average over other rows bounds no weight by itself, the cap does. N_k is kept as its logarithm
    over the scale, as `LogNormalizerMemory` keeps log Z, so that the temperature may move. Running means of assigned
    points: MacQueen, "Some methods for classification and analysis of multivariate observations", 1967; as a source of
    the normaliser derived here. An index tells the loss which rows are one sample; none is needed.

    Buffers, sides first, float32 whatever dtype the module is cast to or loads:
        prototypes (2, K, D), of rows and of columns, or (1, K, D): unit vectors.
        level (2, K): log N_k / scale; -inf before the first row.
        rows (2, K): rows that the averages are over, `window` at most.
        placed () int64: prototypes that have a place. rejected () int64: rows that were not finite.

    Args:
        prototypes: their number K of each side; 1 keeps one average for all samples.
        dim: width D of the embeddings.
        window: rows that an average is over, at least 1; times `prototypes`, it should be the rows of a few batches.
        sharpness: how fast the share of a prototype falls with the cosine to it, at least 0.
        columns: keep prototypes of columns too, as a symmetric loss needs.

    Raises:
        ValueError: an argument is out of its range.
    """

    needs_index = False
    by_sample = False

    prototypes: Tensor
    level: Tensor
    rows: Tensor
    placed: Tensor
    rejected: Tensor

    def __init__(
        self,
        prototypes: int,
        dim: int,
        *,
        window: float = WINDOW,
        sharpness: float = SHARPNESS,
        columns: bool = True,
    ) -> None:
        super().__init__()
        if prototypes < 1 or dim < 1:
            raise ValueError(f"prototypes is {prototypes} and dim {dim}: expected at least 1 each")
        if not 1 <= window < float("inf"):
            raise ValueError(f"window is {window}: expected a finite number of at least 1")
        if not 0 <= sharpness < float("inf"):
            raise ValueError(f"sharpness is {sharpness}: expected a finite number of at least 0")
        self.window = window
        self.sharpness = sharpness
        sides = 2 if columns else 1
        self.register_buffer("prototypes", torch.zeros(sides, prototypes, dim, dtype=torch.float32))
        self.register_buffer("level", torch.full((sides, prototypes), -torch.inf, dtype=torch.float32))
        self.register_buffer("rows", torch.zeros(sides, prototypes, dtype=torch.float32))
        self.register_buffer("placed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("rejected", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def estimate(self, index: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor | None]:
        """Of embeddings as near to the prototypes as the batch's: see `contrastile.normalizer.Normalizer`.

        Raises:
            ValueError: the embeddings are not of the prototypes' width, or the loss's directions not those kept.
        """
        self._check(batch)
        directions = self._directions(batch)
        scores = self.sharpness * directions @ self.prototypes.mT
        scores = scores.masked_fill((self.level == -torch.inf)[:, None], -torch.inf)
        log_n = (self.level * batch.fixed_scale).to(self.level.dtype)[:, None]
        negatives = (scores + log_n).logsumexp(2) - scores.logsumexp(2) + batch.log_negatives
        known = (self.level > -torch.inf).any(1, keepdim=True)
        log_z = torch.where(known, torch.logaddexp(self._positives(batch), negatives), -torch.inf)
        return log_z[0], log_z[1] if len(log_z) == 2 else None

    @torch.no_grad()
    def update(self, index: Tensor, row_lse: Tensor, col_lse: Tensor | None, batch: PairBatch) -> None:
        """Takes in a batch: see `contrastile.normalizer.Normalizer`.

        Raises:
            ValueError: as `estimate` does, or col_lse does not go with them.
        """
        self._check(batch)
        if (col_lse is None) == batch.symmetric:
            raise ValueError(f"col_lse is {'missing' if col_lse is None else 'given'}, but symmetric {batch.symmetric}")
        found = (row_lse[None] if col_lse is None else torch.stack([row_lse, col_lse])).to(self.level.dtype)
        directions, positives = self._directions(batch), self._positives(batch)
        finite = (found.isfinite() & directions.isfinite().all(2) & positives.isfinite()).all(0)
        self.rejected.add_((~finite).sum())
        directions = directions.where(finite[:, None], 0)
        self._place(directions, finite)

        gap = positives - found
        seen = finite & (gap < -ROUNDING * found.abs().clamp(min=1))
        log_n = found + torch.log(-torch.expm1(gap.where(seen, -1))) - batch.log_negatives
        log_n = log_n.where(seen, -torch.inf)
        nearest = (directions @ self.prototypes.mT).argmax(2)
        every = torch.arange(self.level.shape[1], device=nearest.device)
        assigned = ((nearest[..., None] == every) & seen[..., None]).to(self.level.dtype)  # (sides, B, K)
        new = assigned.sum(1)
        visited = new > 0
        rows = self.rows + new
        share = new / rows.clamp(min=1, max=self.window).maximum(new)  # of the batch in the average
        mean = (log_n[..., None] + assigned.log()).logsumexp(1) - new.log()
        old = (self.level * batch.fixed_scale).to(self.level.dtype)
        level = torch.logaddexp(old + torch.log1p(-share), mean + share.log()) / batch.fixed_scale
        moved = torch.lerp(self.prototypes, assigned.mT @ directions / new.clamp(min=1)[..., None], share[..., None])
        self.level.copy_(torch.where(visited, level, self.level))
        self.prototypes.copy_(F.normalize(moved, dim=2).where(visited[..., None], self.prototypes))
        self.rows.copy_(rows.clamp(max=self.window))

    def stats(self) -> dict[str, Tensor]:
        """seen: share of the prototypes that a row was near to; rejected: rows that were not finite. All ()."""
        return {"seen": (self.level > -torch.inf).float().mean(), "rejected": self.rejected.clone()}

    def extra_repr(self) -> str:
        sides, prototypes, dim = self.prototypes.shape
        return f"{prototypes}, {dim}, window={self.window}, sharpness={self.sharpness}, columns={sides == 2}"

    def _place(self, directions: Tensor, finite: Tensor) -> None:
        """Gives prototypes without a place those of the batch's rows in turn."""
        prototypes = self.level.shape[1]
        # Finite rows first, in their order: sorting by value would need their number on the host.
        order = (~finite).to(torch.int8).sort(stable=True)[1]
        turn = torch.arange(prototypes, device=directions.device) - self.placed
        takes = (turn >= 0) & (turn < finite.sum())
        rows = directions[:, order[turn.clamp(0, len(order) - 1)]]
        self.prototypes.copy_(torch.where(takes[:, None], rows, self.prototypes))
        self.placed.copy_((self.placed + finite.sum()).clamp(max=prototypes))

    def _directions(self, batch: PairBatch) -> Tensor:
        """Unit rows of the sides kept, (sides, B, D)."""
        sides = torch.stack([batch.x, batch.y][: len(self.level)])
        return F.normalize(sides.to(self.level.dtype), dim=2)

    def _positives(self, batch: PairBatch) -> Tensor:
        """s_ii, (B,)."""
        products = (batch.x.to(self.level.dtype) * batch.y.to(self.level.dtype)).sum(1)
        return (products * batch.fixed_scale).to(self.level.dtype)

    def _check(self, batch: PairBatch) -> None:
        sides, _, dim = self.prototypes.shape
        if batch.x.shape[1] != dim:
            raise ValueError(f"x is {tuple(batch.x.shape)}, the prototypes have width {dim}: expected (B, {dim})")
        if batch.symmetric != (sides == 2):
            raise ValueError(f"symmetric is {batch.symmetric}, but columns={sides == 2}: expected the same of both")
