"""Pairwise problems of every kind, and what a sweep over them must return: the definitions of pairs.py, dense."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from contrastile.pairs import FinishedRows, GivenWeights, PairGrads, PairProblem, PairStats, WeightFunction
from support import (
    BACKENDS_HERE,
    Shape,
    accumulation,
    assert_at_most,
    error,
    ids,
    permutation,
    rounding_floor,
    towers,
    unit_rows,
)
from torch import Tensor

EXPONENTIAL, CAPPED, SIGMOID = WeightFunction

# The definitions, dense


class Dense:
    """Logits and kinds of pair of a problem, in the dtype given.

    stored: dtype that coefficients are rounded to before they are multiplied with embeddings.
    """

    def __init__(
        self, problem: PairProblem, x: Tensor, y: Tensor, scale: Tensor, stored: torch.dtype | None = None
    ) -> None:
        self.x, self.y, self.scale, self.stored = x, y, scale, stored
        self.s = scale[:, None] * (x @ y.T)
        rows, cols = self.s.shape
        self.positive = torch.zeros(rows, cols, dtype=torch.bool)
        if problem.positives is not None:
            self.positive[torch.arange(rows), problem.positives] = True
        masked = torch.zeros(rows, cols, dtype=torch.bool)
        if problem.row_groups is not None:
            masked |= problem.row_groups[:, None] == problem.col_groups
        if problem.self_offset is not None:
            masked |= torch.arange(rows)[:, None] + problem.self_offset == torch.arange(cols)
        if problem.row_ceiling is not None:
            masked |= self.s > problem.row_ceiling[:, None]
        self.negative = ~self.positive & ~masked
        self.positives = problem.positives
        self.self_similarity = problem.self_similarity

    def stats(self, columns: bool) -> dict[str, Tensor]:
        negatives = self.s.masked_fill(~self.negative, -math.inf)
        results = {"row_lse": negatives.logsumexp(1)}
        if columns:
            results |= {"col_lse": negatives.logsumexp(0)}
        if self.positives is not None:
            results["positive_logit"] = self.s.gather(1, self.positives[:, None])[:, 0]
        return results

    def given(self, weights: GivenWeights) -> dict[str, Tensor]:
        def typed(value: Tensor) -> Tensor:
            return value.to(self.s.dtype)

        def f(t: Tensor) -> Tensor:
            if weights.function is SIGMOID:
                return t.sigmoid()
            return t.exp().clamp(max=1) if weights.function is CAPPED else t.exp()

        def phi(t: Tensor) -> Tensor:
            if weights.function is SIGMOID:
                return -F.logsigmoid(-t)
            return torch.where(t > 0, 1 + t, t.clamp(max=0).exp()) if weights.function is CAPPED else t.exp()

        def mass(t: Tensor) -> Tensor:
            return torch.where(self.negative, phi(t), 0.0)

        c, results = torch.zeros_like(self.s), {}
        if weights.row_shift is not None:
            t = self.s - typed(weights.row_shift)[:, None]
            c = c + typed(weights.row_gain)[:, None] * f(t)
            results["row_mass"] = mass(t).sum(1)
            if weights.function is SIGMOID and not self.self_similarity:
                results["row_weight"] = torch.where(self.negative, f(t), 0.0).sum(1)
        if weights.col_shift is not None:
            t = self.s - typed(weights.col_shift)
            c = c + typed(weights.col_gain) * f(t)
            results["col_mass"] = mass(t).sum(0)
        c = torch.where(self.negative, c, 0.0)
        if self.positives is not None:
            c = torch.where(self.positive, typed(weights.positive_coeff)[:, None], c)
        return results | self.products(c)

    def softmax(self, columns: bool) -> dict[str, Tensor]:
        unmasked = self.s.masked_fill(~(self.negative | self.positive), -math.inf)

        def coefficients(dim: int) -> Tensor:
            p = torch.where(unmasked == -math.inf, 0.0, unmasked.softmax(dim))
            return torch.where(self.positive, -torch.where(self.positive, 0.0, p).sum(dim, keepdim=True), p)

        c = coefficients(1)
        return self.products(c + coefficients(0) if columns or self.self_similarity else c)

    def products(self, c: Tensor) -> dict[str, Tensor]:
        weighted = self.scale[:, None] * c
        if self.stored is not None:
            weighted = weighted.to(self.stored).to(c.dtype)
        dx, dy, moment = weighted @ self.y, weighted.T @ self.x, (weighted * (self.x @ self.y.T)).sum(1)
        if self.self_similarity:  # C is symmetric and holds each pair from both its ends
            return {"dx": dx, "moment_sum": moment.sum() / 2}
        return {"dx": dx, "dy": dy, "row_moment": moment}


def log_sum(maximum: Tensor, total: Tensor) -> Tensor:
    return torch.where(total == 0, -math.inf, maximum + total.log())


def stats_results(stats: PairStats) -> dict[str, Tensor]:
    results = {"row_lse": log_sum(stats.row_max, stats.row_sum)}
    if stats.col_max is not None:
        results |= {"col_lse": log_sum(stats.col_max, stats.col_sum)}
    if stats.positive_logit is not None:
        results["positive_logit"] = stats.positive_logit
    return results


def grad_results(grads: PairGrads, self_similarity: bool) -> dict[str, Tensor]:
    names = ("dx", "dy", "row_moment", "row_mass", "col_mass", "row_weight")
    results = {name: getattr(grads, name) for name in names if getattr(grads, name) is not None}
    if self_similarity and "row_moment" in results:
        results["moment_sum"] = results.pop("row_moment").sum()
    return results


def assert_sweep(problem: PairProblem, ours: dict[str, Tensor], evaluate: Callable[[Dense], dict[str, Tensor]]) -> None:
    """Every result within twice the dense error of the accumulation dtype.

    On a GPU a strip holds coefficients in the dtype of the embeddings, as a dense 16-bit computation would.
    """

    def dense(moved, stored: torch.dtype | None = None) -> dict[str, Tensor]:
        y = moved["x"] if problem.self_similarity else moved["y"]
        return evaluate(Dense(problem, moved["x"], y, moved["scale"], stored))

    inputs = {"x": problem.anchors, "y": problem.candidates, "scale": problem.scale}
    dtype = accumulation(problem.anchors.dtype)
    truth = dense({name: value.double() for name, value in inputs.items()})
    stored = problem.anchors.dtype if {"triton", "cuda"} & set(BACKENDS_HERE) else None
    plain = dense({name: value.to(dtype) for name, value in inputs.items()}, stored)
    floor = rounding_floor(dense, inputs, dtype, truth)
    assert set(ours) == set(truth)
    for name, value in ours.items():
        assert value.dtype == dtype, name
        assert_at_most(value, truth[name], 2 * error(plain[name], truth[name]) + floor[name], name)


def assert_finished(found: FinishedRows, x: Tensor, dx: Tensor, dy: Tensor, joined: bool) -> None:
    """Gradients in the dtype of x, and the moments of the part of dx that is the anchors'."""
    for ours, truth in zip(found[:2], [dx + dy, None] if joined else [dx, dy], strict=True):
        assert (ours is None) == (truth is None)
        if truth is not None:
            torch.testing.assert_close(ours, truth.float().to(x.dtype), rtol=torch.finfo(x.dtype).eps, atol=1e-6)
    torch.testing.assert_close(found.row_moment.double(), (dx * x.double()).sum(1), rtol=1e-5, atol=1e-5)


# Problems


def two_towers(shape: Shape, dtype: torch.dtype, scale: float = 20.0, **masks) -> PairProblem:
    rows, cols, dim = shape
    x, y = unit_rows(rows, dim, dtype, 1), unit_rows(cols, dim, dtype, 2)
    return PairProblem(x, y, torch.full((rows,), scale, dtype=accumulation(dtype)), **masks)


def per_row_scale(dtype: torch.dtype) -> PairProblem:
    problem = two_towers(Shape(65, 100, 48), dtype, positives=torch.arange(65))
    return dataclasses.replace(problem, scale=torch.linspace(0.01, 60, 65, dtype=accumulation(dtype)))


def one_tower(rows: int, dim: int, dtype: torch.dtype, self_similarity: bool) -> PairProblem:
    z = unit_rows(rows, dim, dtype, 1)
    scale = torch.full((rows,), 10.0, dtype=accumulation(dtype))
    partner = torch.arange(rows).roll(rows // 2)
    return PairProblem(z, z, scale, positives=partner, self_offset=0, self_similarity=self_similarity)


def shard(first: int, rows: int, dtype: torch.dtype) -> PairProblem:
    """Rows first .. first + rows of a self-similarity problem, against all."""
    z = unit_rows(130, 48, dtype, 1)
    scale = torch.full((rows,), 10.0, dtype=accumulation(dtype))
    own = torch.arange(first, first + rows)
    return PairProblem(z[own], z, scale, positives=(own + 65) % 130, self_offset=first)


def lonely_rows(dtype: torch.dtype) -> PairProblem:
    """Rows 0..9 share the group of every column; column 5 shares the group of every row."""
    row_groups, col_groups = torch.arange(65) + 100, torch.zeros(70, dtype=torch.int64)
    row_groups[:10] = 0
    return two_towers(Shape(65, 70, 8), dtype, positives=torch.arange(65), row_groups=row_groups, col_groups=col_groups)


def under_ceilings(problem: PairProblem) -> PairProblem:
    """A ceiling for each row in the widest gap between its larger logits, so that no rounding moves one across it."""
    logits = (problem.scale.double()[:, None] * (problem.anchors.double() @ problem.candidates.double().T)).sort(1)[0]
    upper = logits[:, problem.cols // 2 :]
    at = upper.diff(dim=1).argmax(1, keepdim=True)
    ceiling = (upper.gather(1, at) + upper.gather(1, at + 1))[:, 0] / 2
    return dataclasses.replace(problem, row_ceiling=ceiling.to(problem.scale.dtype))


PROBLEMS: dict[str, Callable[[torch.dtype], PairProblem]] = {
    "plain": lambda t: two_towers(Shape(65, 65, 48), t, positives=torch.arange(65)),
    "tall-no-positives": lambda t: two_towers(Shape(257, 63, 96), t),
    "permuted": lambda t: two_towers(Shape(100, 100, 1), t, positives=permutation(100)),
    "not-injective": lambda t: two_towers(Shape(257, 300, 3), t, positives=ids(257, 7)),
    "groups": lambda t: two_towers(
        Shape(100, 257, 100), t, positives=torch.arange(100), row_groups=ids(100, 9), col_groups=ids(257, 9)
    ),
    "groups-no-positives": lambda t: two_towers(Shape(65, 63, 3), t, row_groups=ids(65, 4), col_groups=ids(63, 4)),
    "groups-and-self": lambda t: two_towers(
        Shape(100, 130, 7), t, positives=permutation(100), row_groups=ids(100, 9), col_groups=ids(130, 9), self_offset=3
    ),
    "self-offset-negative": lambda t: two_towers(Shape(100, 65, 16), t, positives=ids(100, 65), self_offset=-40),
    "self-offset-on-positives": lambda t: two_towers(Shape(65, 65, 16), t, positives=torch.arange(65), self_offset=0),
    "self-offset-outside": lambda t: two_towers(Shape(65, 65, 16), t, self_offset=65),
    "self-not-triangular": lambda t: one_tower(66, 48, t, False),
    "self-triangular": lambda t: one_tower(66, 48, t, True),
    "self-triangular-258": lambda t: one_tower(258, 5, t, True),
    "self-triangular-700": lambda t: one_tower(700, 5, t, True),
    "ceilings": lambda t: under_ceilings(two_towers(Shape(100, 130, 16), t, positives=permutation(130)[:100])),
    "ceilings-and-groups": lambda t: under_ceilings(
        two_towers(Shape(300, 257, 7), t, row_groups=ids(300, 9), col_groups=ids(257, 9), self_offset=3)
    ),
    "several-tiles": lambda t: two_towers(
        Shape(700, 1100, 7), t, positives=ids(700, 1100), row_groups=ids(700, 99), col_groups=ids(1100, 99)
    ),
    "self-triangular-2": lambda t: one_tower(2, 384, t, True),
    "shard-first": lambda t: shard(0, 33, t),
    "shard-last": lambda t: shard(97, 33, t),
    "per-row-scale": per_row_scale,
    "lonely-rows": lonely_rows,
    "one-by-one": lambda t: two_towers(Shape(1, 1, 3), t, positives=torch.arange(1)),
    "one-row": lambda t: two_towers(Shape(1, 257, 520), t, positives=torch.tensor([256])),
    "one-column": lambda t: two_towers(Shape(130, 1, 48), t),
    "deep": lambda t: two_towers(Shape(63, 65, 520), t, positives=torch.arange(63)),
}


def given_weights(problem: PairProblem, *, rows: bool, columns: bool, function: WeightFunction) -> GivenWeights:
    """Shifts around the log-sum-exps, so that some logits are above them and others are not.

    For a self-similarity problem both directions must be asked for: they get the same weights, so that C is symmetric.
    """
    rows_count, cols_count, dtype = problem.rows, problem.cols, problem.scale.dtype
    logits = problem.scale[:, None] * (problem.anchors.to(dtype) @ problem.candidates.to(dtype).T)
    below = 1.0 if function is EXPONENTIAL else 8.0
    if problem.self_similarity:
        shift = logits.logsumexp(1) - torch.linspace(below, -2, rows_count, dtype=dtype)
        gain, coeff = torch.linspace(0.1, 2, rows_count, dtype=dtype), torch.linspace(-1, 0.5, rows_count, dtype=dtype)
        return GivenWeights(shift, gain, shift, gain, coeff + coeff[problem.positives], function)
    return GivenWeights(
        row_shift=logits.logsumexp(1) - torch.linspace(below, -2, rows_count, dtype=dtype) if rows else None,
        row_gain=torch.linspace(0.1, 2, rows_count, dtype=dtype) if rows else None,
        col_shift=logits.logsumexp(0) - torch.linspace(-2, below, cols_count, dtype=dtype) if columns else None,
        col_gain=torch.linspace(3, 0.2, cols_count, dtype=dtype) if columns else None,
        positive_coeff=None if problem.positives is None else torch.linspace(-1, 0.5, rows_count, dtype=dtype),
        function=function,
    )


BOTH = {"rows": True, "columns": True}
DIRECTIONS = [{"rows": True, "columns": False}, {"rows": False, "columns": True}, BOTH]


def regime(name: str, dtype: torch.dtype) -> PairProblem:
    rows, cols, dim = 65, 130, 20
    x, y = towers(Shape(rows, cols, dim), torch.float64)
    scale = {"tiny-scale": 0.01, "huge-scale": 1000.0}.get(name, 20.0)
    if name == "all-negative":  # every logit is about -256
        direction = unit_rows(1, dim, torch.float64)
        x, y, scale = direction + 1e-3 * x, -direction + 1e-3 * y, 256.0
    if name == "dominating":
        y[70] = 30 * x[3]
    if name == "duplicates":
        y[10:90] = y[5]
        x[1:40] = x[0]
    if name == "unnormalised":
        x, y = 10 * x, 7 * y
    return PairProblem(
        x.to(dtype), y.to(dtype), torch.full((rows,), scale, dtype=accumulation(dtype)), positives=torch.arange(rows)
    )
