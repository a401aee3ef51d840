"""One tile of a kernel, as far as its bound needs it."""

from __future__ import annotations

from dataclasses import dataclass

from contrastile.kernels.plans import TilePlan


@dataclass(frozen=True)
class Walk:
    """A program of the fused kernel: it owns a block of one side and walks the other."""

    steps: int  # tiles of a program
    owns_candidates: bool
    both: bool  # gradients; of the owned side alone otherwise


@dataclass(frozen=True)
class Tile:
    """A configuration as far as the bound needs it."""

    target: str
    plan: TilePlan
    depth: int
    dtype: str
    precision: str
    element_bytes: int
    tile_cols: int  # of a window: how often a group's rows are used once read
    walk: Walk | None = None  # of the fused kernel

    @property
    def products(self) -> int:
        """Of rows x columns x features."""
        return 1 if self.walk is None else 3 if self.walk.both else 2

    @property
    def flop(self) -> int:
        return self.products * 2 * self.plan.block_rows * self.plan.block_cols * self.depth

    @property
    def padded_flop(self) -> int:
        """As the kernel computes it: the last features come as a whole block."""
        padded = -(-self.depth // self.plan.block_depth) * self.plan.block_depth
        return self.flop // self.depth * padded

    @property
    def embeddings(self) -> float:
        """Rows of X and Y that a tile reads."""
        rows, cols = self.plan.block_rows, self.plan.block_cols
        if self.walk is None:
            return rows + cols
        walked, owned = (rows, cols) if self.walk.owns_candidates else (cols, rows)
        return walked + owned / self.walk.steps
