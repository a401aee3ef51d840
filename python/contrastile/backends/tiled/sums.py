"""Running sums of a sweep over windows: row and column sums of exponentials, and masses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from contrastile.backends.tiled.launches import Sweep
from contrastile.kernels.arguments import Sums, Window
from contrastile.kernels.plans import TilePlan
from contrastile.pairs import GivenWeights, PairProblem, PairStats

NO_SUMS = Sums(None, None, None)


@dataclass
class Totals:
    """Running sums by row and by column. Of one triangle, a window's columns count as rows."""

    problem: PairProblem
    columns: bool  # wanted by column too
    rows: Sums  # of tensors (N,)
    cols: Sums  # of tensors (M,)

    @classmethod
    def none(cls, problem: PairProblem) -> Totals:
        return cls(problem, False, NO_SUMS, NO_SUMS)

    @classmethod
    def of_statistics(cls, problem: PairProblem, columns: bool) -> Totals:
        by_column = columns and not problem.self_similarity
        return cls(
            problem,
            columns,
            _new_sums(problem.scale, problem.rows, True, False),
            _new_sums(problem.scale, problem.cols, by_column, False),
        )

    @classmethod
    def of_gradients(cls, problem: PairProblem, weights: GivenWeights, stats: bool, row_weight: bool) -> Totals:
        """Masses of the directions that there are, and with `stats` their sums."""
        by_row, columns = weights.row_shift is not None, weights.col_shift is not None
        by_column = columns and not problem.self_similarity
        return cls(
            problem,
            columns,
            _new_sums(problem.scale, problem.rows, stats, by_row, row_weight),
            _new_sums(problem.scale, problem.cols, stats and by_column, by_column),
        )

    @property
    def wanted(self) -> bool:
        return any(t is not None for t in (*self.rows, *self.cols))

    @property
    def col_mass(self) -> Tensor | None:
        mass: Tensor | None = self.rows.mass if self.problem.self_similarity else self.cols.mass
        return mass

    def partials(self, window: Window, plan: TilePlan) -> tuple[Sums, Sums]:
        """Room for the sums of a window's tiles, or of their parts."""
        tile_rows, tile_cols = plan.tiles(window)
        return (
            _partial_sums(self.rows, tile_cols * plan.parts, window.rows),
            _partial_sums(self._totals_of_columns(window), tile_rows, window.cols),
        )

    def merge(self, sweep: Sweep, window: Window, partials: tuple[Sums, Sums]) -> None:
        """Adds what a window's tiles left in `partials`."""
        parts = (
            _part(self.rows, window.first_row, window.rows),
            _part(self._totals_of_columns(window), window.first_col, window.cols),
        )
        for tiles, totals in zip(partials, parts, strict=True):
            if any(lines is not None for lines in tiles):
                sweep.merge(tiles, totals)

    def stats(self, positive_logit: Tensor | None, row_rank: Tensor | None = None) -> PairStats:
        cols = self.rows if self.problem.self_similarity and self.columns else self.cols
        return PairStats(self.rows.max, self.rows.sum, cols.max, cols.sum, positive_logit, row_rank)

    def _totals_of_columns(self, window: Window) -> Sums:
        if not self.problem.self_similarity:
            return self.cols
        return NO_SUMS if window.first_row == window.first_col else self.rows


def _new_sums(like: Tensor, length: int, sums: bool, mass: bool, weight: bool = False) -> Sums:
    return Sums(
        max=like.new_full((length,), -torch.inf) if sums else None,
        sum=like.new_zeros(length) if sums else None,
        mass=like.new_zeros(length) if mass else None,
        weight=like.new_zeros(length) if weight else None,
    )


def _partial_sums(totals: Sums, tiles: int, length: int) -> Sums:
    return Sums(*(None if total is None else total.new_empty(tiles, length) for total in totals))


def _part(totals: Sums, first: int, count: int) -> Sums:
    return Sums(*(None if total is None else total[first : first + count] for total in totals))
