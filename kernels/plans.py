"""How a sweep is cut into windows and tiles, by target and shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isqrt
from typing import TypeVar

from contrastile.kernels.arguments import Window


@dataclass(frozen=True)
class TilePlan:
    """Constants of a tile kernel's launch."""

    block_rows: int
    block_cols: int
    block_depth: int  # features read at a time
    group_rows: int  # tile rows that are walked together
    num_warps: int
    num_stages: int
    descriptors: bool  # tensor descriptors (TMA) instead of pointers
    parts: int = 1  # of a tile's columns, taken one after another once multiplied
    row_lanes: int = 1  # neighbouring rows of accumulators that lie in as many lanes (tiles.over_rows)

    def tiles(self, window: Window) -> tuple[int, int]:
        return -(-window.rows // self.block_rows), -(-window.cols // self.block_cols)


@dataclass(frozen=True)
class WindowPlan:
    """Windows of at most `rows` x `cols` pairs; for one triangle both are equal."""

    rows: int
    cols: int

    def windows(self, rows: int, cols: int, triangle: bool) -> Iterator[Window]:
        """All windows of a problem; of one triangle those on and above the diagonal, whole."""
        for first_row in range(0, rows, self.rows):
            for first_col in range(first_row if triangle else 0, cols, self.cols):
                yield Window(first_row, first_col, min(self.rows, rows - first_row), min(self.cols, cols - first_col))


WINDOWS_PER_TRIANGLE_SIDE = 8  # diagonal windows are computed whole: one part in so many of the work is done twice


def window_plan(
    rows: int, cols: int, most_pairs: int, multiple: int, triangle: bool, smallest_side: int = 1
) -> WindowPlan:
    """Nearly square windows, sides a multiple of the tiles'. At equal size, square ones cost the gradient products the
    least traffic beside the strip itself. A triangle is cut for the sake of its diagonal, but not below smallest_side,
    where the windows' launches would cost more than the work they spare.
    """
    side = max(multiple, isqrt(most_pairs) // multiple * multiple)
    if triangle:
        share = max(smallest_side, -(-rows // (WINDOWS_PER_TRIANGLE_SIDE * multiple)) * multiple)
        return WindowPlan(min(side, share), min(side, share))
    if rows <= side:
        return WindowPlan(rows, max(side, most_pairs // rows // multiple * multiple))
    if cols <= side:
        return WindowPlan(max(side, most_pairs // cols // multiple * multiple), cols)
    return WindowPlan(side, side)


SMALLEST_DEPTH = 16  # of a matrix instruction's operands


def tile_plan(sweep: str, target: str, bits: int, depth: int, descriptors: bool, crowded: bool) -> TilePlan:
    """Tiles of a sweep ("statistics" or "gradient") for a target ("interpreter", "sm_90", "gfx942", ...) and the bits
    of an input element. `crowded`: whether ranks, sums on the way or groups take registers too.
    """
    forms = [f"{sweep} crowded"] * crowded + [sweep, "tiles"]
    if not descriptors:  # pointers to load from take registers too
        forms.insert(0, f"{sweep} pointers")
    plan = _first(_TILES, forms, target, bits)
    assert plan is not None
    block_depth = max(SMALLEST_DEPTH, min(plan.block_depth, 1 << (depth - 1).bit_length()))
    return replace(plan, block_depth=block_depth, descriptors=descriptors and plan.descriptors)


MOST_FUSED_FEATURES = 128  # beyond these, on sm_80 beyond 64, a strip is estimated to serve better (docs/kernels.md)


def gradient_plan(
    target: str, bits: int, depth: int, descriptors: bool, crowded: bool, capped: bool = False
) -> TilePlan | None:
    """Tiles of the fused gradient kernel, all features at once; None where a strip serves better. `crowded`: whether
    sums on the way or groups take registers too; `capped`: whether the cap does as well, with both gradients.
    """
    if not descriptors and target != "interpreter":
        return None  # such rows are read by the element, and here again for every block of the other side
    block_depth = max(SMALLEST_DEPTH, 1 << (depth - 1).bit_length())
    plans = _first(_FUSED, ["fused capped"] * capped + ["fused crowded"] * crowded + ["fused"], target, bits) or ()
    plan = next((plan for plan in plans if block_depth <= plan.block_depth), None)
    return None if plan is None else replace(plan, block_depth=block_depth)


Found = TypeVar("Found")


def _first(table: dict[tuple[str, str, int], Found], forms: list[str], target: str, bits: int) -> Found | None:
    """By the first form that has a row for the target, or else for its family."""
    keys = ((form, place, bits) for form in forms for place in (target, _family(target)))
    return next((table[key] for key in keys if key in table), None)


def _family(target: str) -> str:
    if target.startswith("gfx") or target == "interpreter":
        return target[:3]
    return "sm_90+" if int(target[3:]) in (90, 100, 103) else "sm_80+"


SMALLEST_SIDE, LARGEST_SIDE = 32, 256  # of a tile


def neighbours(plan: TilePlan) -> list[TilePlan]:
    """Plans that differ in one number, by a factor of two, or by one stage."""
    found = [
        replace(plan, **{name: size})
        for name in ("block_rows", "block_cols")
        for size in (getattr(plan, name) // 2, getattr(plan, name) * 2)
        if SMALLEST_SIDE <= size <= LARGEST_SIDE
    ]
    found += [replace(plan, num_warps=n) for n in (plan.num_warps // 2, plan.num_warps * 2) if n in (4, 8)]
    return found + [replace(plan, num_stages=n) for n in (plan.num_stages - 1, plan.num_stages + 1) if n >= 1]


# Rows x columns x features of a tile, group, warps, stages, descriptors. A sweep has rows of its own where its bound is
# better by them (docs/kernels.md), or where registers would spill in those for all tiles: so do they in some where
# columns are summed by lanes.
_TILES = {
    ("tiles", "int", 16): TilePlan(64, 128, 64, 2, 4, 1, False, parts=2, row_lanes=32),
    ("tiles", "int", 32): TilePlan(128, 64, 64, 2, 4, 1, False, row_lanes=8),
    ("tiles", "sm_80", 16): TilePlan(128, 128, 32, 8, 8, 3, False),
    ("tiles", "sm_80+", 16): TilePlan(128, 64, 32, 8, 4, 3, False),
    ("gradient", "sm_86", 16): TilePlan(128, 128, 32, 8, 8, 3, False),
    ("gradient", "sm_120", 16): TilePlan(128, 64, 32, 8, 8, 3, False),
    ("tiles", "sm_80+", 32): TilePlan(64, 64, 32, 8, 4, 3, False),
    ("statistics", "sm_80", 32): TilePlan(64, 64, 32, 8, 4, 4, False),
    ("gradient crowded", "sm_80", 32): TilePlan(64, 64, 16, 8, 4, 3, False),
    ("gradient", "sm_120", 32): TilePlan(32, 128, 32, 8, 4, 3, False),
    ("gradient crowded", "sm_120", 32): TilePlan(64, 64, 16, 8, 4, 3, False),
    ("statistics pointers", "sm_80+", 16): TilePlan(128, 64, 32, 8, 8, 3, False),
    ("gradient crowded", "sm_80+", 16): TilePlan(128, 64, 64, 8, 8, 3, False, row_lanes=8),
    ("gradient pointers", "sm_80+", 16): TilePlan(128, 64, 64, 8, 8, 3, False),
    ("tiles", "sm_90+", 16): TilePlan(128, 128, 64, 8, 8, 3, True),
    ("tiles", "sm_90+", 32): TilePlan(64, 64, 32, 8, 4, 3, False),
    ("statistics", "sm_90", 16): TilePlan(128, 128, 64, 8, 4, 3, True),
    ("statistics crowded", "sm_90", 16): TilePlan(128, 128, 64, 8, 8, 3, True),
    ("statistics pointers", "sm_90+", 16): TilePlan(128, 128, 64, 8, 8, 3, False),
    ("gradient", "sm_90", 16): TilePlan(64, 128, 64, 8, 4, 4, True),
    ("statistics", "sm_100", 16): TilePlan(128, 256, 64, 8, 8, 3, True, parts=2, row_lanes=32),
    ("gradient", "sm_100", 16): TilePlan(128, 256, 64, 8, 8, 3, True, parts=4, row_lanes=32),
    ("gradient crowded", "sm_90", 16): TilePlan(128, 64, 64, 8, 8, 4, True, row_lanes=8),
    ("gradient crowded", "sm_90+", 16): TilePlan(128, 64, 64, 8, 8, 4, True),
    ("gradient pointers", "sm_90", 16): TilePlan(64, 64, 64, 8, 4, 3, False),
    ("gradient pointers", "sm_90+", 16): TilePlan(128, 64, 64, 8, 8, 3, False),
    ("gradient crowded", "sm_100", 32): TilePlan(128, 64, 32, 8, 8, 3, False),
    ("tiles", "gfx", 16): TilePlan(128, 128, 64, 8, 8, 2, False),
    ("tiles", "gfx", 32): TilePlan(64, 64, 32, 8, 4, 2, False),
}

# The same for the fused kernel, by most features. It has no groups: each program walks a whole line of tiles. In
# float32 without TF32 a product runs on the general units, where the vendor's are better: the strip.
_FUSED: dict[tuple[str, str, int], tuple[TilePlan, ...]] = {
    ("fused", "int", 16): (TilePlan(64, 128, MOST_FUSED_FEATURES, 1, 4, 1, False),),
    ("fused", "int", 32): (TilePlan(128, 64, MOST_FUSED_FEATURES, 1, 4, 1, False),),
    ("fused", "sm_80", 16): (TilePlan(64, 32, 64, 1, 4, 3, False),),
    ("fused", "sm_80+", 16): (
        TilePlan(64, 32, 64, 1, 4, 3, False),
        TilePlan(64, 64, 128, 1, 8, 3, False),
    ),
    ("fused", "sm_120", 16): (
        TilePlan(32, 32, 16, 1, 4, 3, False),
        TilePlan(64, 32, 128, 1, 4, 3, False),
    ),
    ("fused", "sm_90", 16): (
        TilePlan(64, 64, 64, 1, 4, 3, True),
        TilePlan(64, 32, 128, 1, 4, 3, True),
    ),
    ("fused", "sm_90+", 16): (
        TilePlan(64, 64, 64, 1, 4, 2, True),
        TilePlan(64, 64, 128, 1, 8, 2, True),
    ),
    ("fused", "gfx", 16): (TilePlan(128, 64, 128, 1, 4, 1, False),),
    # With masses and the statistics of both sides beside a tile, or with groups: what does not spill then.
    ("fused crowded", "sm_80", 16): (TilePlan(64, 32, 64, 1, 4, 3, False),),
    ("fused crowded", "sm_80+", 16): (
        TilePlan(64, 32, 64, 1, 4, 3, False),
        TilePlan(64, 32, 128, 1, 8, 3, False, row_lanes=8),
    ),
    ("fused crowded", "sm_120", 16): (
        TilePlan(64, 32, 64, 1, 4, 3, False),
        TilePlan(32, 64, 128, 1, 8, 3, False),
    ),
    ("fused capped", "sm_120", 16): (
        TilePlan(64, 32, 32, 1, 4, 3, False),
        TilePlan(32, 32, 64, 1, 4, 3, False),
        TilePlan(32, 64, 128, 1, 8, 3, False),
    ),
    ("fused crowded", "sm_90", 16): (TilePlan(64, 32, 128, 1, 4, 3, True, row_lanes=8),),
    ("fused crowded", "sm_90+", 16): (),
    ("fused crowded", "gfx", 16): (
        TilePlan(128, 64, 64, 1, 4, 1, False),
        TilePlan(64, 64, 128, 1, 4, 1, False),
    ),
}
