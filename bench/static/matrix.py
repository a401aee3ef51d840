"""Which kernels, shapes and targets are examined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isqrt

import torch
from contrastile.backends.tiled.gradients import MOST_PAIRS
from contrastile.kernels.plans import MOST_FUSED_FEATURES, TilePlan, gradient_plan, tile_plan

TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
DEPTHS = (64, 128, 256, 384, 512, 768, 1024, 1536)
FUSED_DEPTHS = tuple(depth for depth in DEPTHS if depth <= MOST_FUSED_FEATURES)
ODD_FUSED_DEPTHS = (16, 32, 96)  # the smallest blocks of features, and one that is not full
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISIONS = ("tf32", "ieee")  # of float32 products; 16-bit ones have but one
ROWS = 32768  # of X and of Y
WINDOW = 4096  # rows and columns of a window: a 32 MiB strip of 16-bit coefficients
FUSED_WINDOW = isqrt(MOST_PAIRS)
# Of the statistics sweep: both directions with positives, or of rows alone, with ranks, with groups of pairs that are
# no negatives or ceilings that mask larger logits, within one set of embeddings.
STATISTICS = (
    "statistics",
    "statistics rows",
    "statistics ranks",
    "statistics groups",
    "statistics ceilings",
    "statistics self",
)
# Of the gradient sweep: both terms (InfoNCE), or that of rows alone, both capped with all sums (gamma), groups,
# ceilings, self, the sums alone, and sigmoids of rows with the sums of masses and weights (SigLIP).
GRADIENTS = (
    "gradient",
    "gradient rows",
    "gradient capped",
    "gradient groups",
    "gradient ceilings",
    "gradient self",
    "gradient sums",
    "gradient sigmoid",
)
# Of its sweep in one direction, float32: with guessed shifts, and again for the rows whose guess was too far off.
ONE_DIRECTION = ("gradient guessed", "gradient repair")
# Of the fused sweep: both gradients, one of them by atomic addition, or one a launch; each with the same terms, and
# without a cap there may be masses alone.
FUSED = ("fused", "fused anchors", "fused candidates")
FUSED_TERMS = ("rows", "capped", "masses", "groups", "ceilings", "sigmoid")
MASKING_TERMS = ("groups", "ceilings")
# That sums come with; the launch of "repair" takes the plan of the one before it.
TERMS_WITH_SUMS = ("capped", "masses", "sums", "guessed", "repair", "sigmoid")
# What comes before and after the sweeps; the tiles of the two sweeps differ. The last pass over the rows of dX with its
# moment and all factors, of dY, of the moment alone, and of both roles of one set of embeddings.
ROW_PASSES = ("rows", "rows plain", "rows moment", "rows joined")
# Losses of rows that no pair leaves: the bridge's distance, and dot products or their difference.
ROW_LOSSES = ("bridge", "dots", "dots difference")
# Weights from statistics: of both directions, of rows alone, within one set of embeddings.
SOFTMAX = ("softmax", "softmax rows", "softmax self")
AROUND = ("positives statistics", "positives gradient", "merge", "merge capped", *ROW_PASSES, *ROW_LOSSES, *SOFTMAX)
WITHOUT_PRODUCTS = ("merge", "rows", "bridge", "dots", "softmax")  # kernels
SWEEPS = ("statistics", "gradient")  # of every depth and dtype
BOUNDED = ("statistics", "gradient", "fused")  # kernels with a bound


@dataclass(frozen=True)
class Configuration:
    """One launch of a kernel."""

    target: str
    sweep: str  # of STATISTICS, GRADIENTS, ONE_DIRECTION, FUSED (and one of FUSED_TERMS), or AROUND
    dtype: str  # of DTYPES
    depth: int
    precision: str = "ieee"  # of float32 products
    aligned: bool = True  # whether tensor descriptors fit the embeddings
    tried: TilePlan | None = None  # in place of the launcher's plan

    def __str__(self) -> str:
        precision = f" {self.precision}" if self.dtype == "fp32" else ""
        return (
            f"{self.target} {self.sweep} {self.dtype}{precision} D={self.depth}{'' if self.aligned else ' unaligned'}"
        )

    @property
    def kernel(self) -> str:
        return self.sweep.split()[0]

    @property
    def terms(self) -> str:
        """What is special about the launch; empty where nothing is."""
        return " ".join(word for word in self.sweep.split()[1:] if word not in ("anchors", "candidates"))

    @property
    def is_bounded(self) -> bool:
        return self.kernel in BOUNDED

    @property
    def plan(self) -> TilePlan:
        found = self.plan_if_any
        assert found is not None
        return found

    @property
    def plan_if_any(self) -> TilePlan | None:
        """None: the launcher does not start this."""
        if self.tried is not None:
            return self.tried
        described = self.target, DTYPES[self.dtype].itemsize * 8, self.depth, self.aligned
        if self.kernel == "fused":
            crowded = self.terms in (*TERMS_WITH_SUMS, *MASKING_TERMS)
            return gradient_plan(*described, crowded, capped=self.terms == "capped" and has_both_gradients(self))
        if self.sweep in (*STATISTICS, "positives statistics", "merge"):
            return tile_plan("statistics", *described, crowded=self.terms == "ranks")
        crowded = self.terms in TERMS_WITH_SUMS or self.sweep in AROUND
        return tile_plan("gradient", *described, crowded=crowded)


def bounded_configurations(targets: tuple[str, ...] = TARGETS) -> Iterator[Configuration]:
    """Those of the table of bounds: all sweeps of InfoNCE on aligned embeddings, bf16 at every depth."""
    for target in targets:
        for sweep in SWEEPS:
            for depth in DEPTHS:
                yield Configuration(target, sweep, "bf16", depth)
            for precision in PRECISIONS:
                yield Configuration(target, sweep, "fp32", 512, precision)
        yield from _launched(Configuration(target, sweep, "bf16", depth) for sweep in FUSED for depth in FUSED_DEPTHS)


def covering_configurations() -> Iterator[Configuration]:
    """A subset with every target, sweep and dtype, and both an unrolled main loop and a loop."""
    for target in TARGETS:
        yield Configuration(target, "statistics", "bf16", 512)
        yield Configuration(target, "gradient", "bf16", 1024)
        yield from _launched(Configuration(target, "fused", "bf16", depth) for depth in FUSED_DEPTHS)
    for target in ("sm_80", "sm_90", "gfx942"):
        yield Configuration(target, "statistics", "fp32", 512, "tf32")
        yield Configuration(target, "gradient repair", "fp32", 512, "tf32")
        yield from _launched([Configuration(target, "fused candidates capped", "fp16", 128)])
        for sweep in AROUND:
            yield Configuration(target, sweep, "bf16", 512)
    # What takes the most registers: all sums, ranks, groups, pointers.
    for target in ("sm_80", "sm_86", "sm_90"):
        yield Configuration(target, "gradient capped", "fp16", 512)
    yield Configuration("sm_80", "statistics rows", "fp32", 512, "tf32")
    yield Configuration("sm_80", "gradient guessed", "fp32", 512, "ieee")
    yield Configuration("sm_86", "gradient groups", "bf16", 512)
    yield Configuration("sm_86", "fused ceilings", "bf16", 128)
    yield Configuration("sm_90", "gradient ceilings", "bf16", 512)
    yield Configuration("sm_90", "statistics ranks", "bf16", 512)
    yield Configuration("sm_90", "statistics groups", "bf16", 512, aligned=False)
    yield Configuration("sm_90", "gradient capped", "bf16", 512, aligned=False)
    yield Configuration("sm_100", "gradient", "bf16", 64)
    yield Configuration("sm_100", "gradient capped", "fp32", 512, "tf32")
    yield Configuration("sm_100", "gradient capped", "bf16", 512, aligned=False)
    yield Configuration("sm_120", "statistics", "bf16", 512, aligned=False)
    yield Configuration("sm_120", "statistics ranks", "fp32", 256, "ieee")
    yield Configuration("sm_120", "fused capped", "bf16", 64)
    yield Configuration("sm_90", "gradient sigmoid", "bf16", 512)
    yield Configuration("sm_100", "gradient sigmoid", "bf16", 512)
    yield Configuration("sm_80", "fused sigmoid", "bf16", 64)
    yield Configuration("gfx942", "fused sigmoid", "bf16", 64)


def all_configurations(targets: tuple[str, ...] = TARGETS) -> Iterator[Configuration]:
    """Whatever the launcher can pick: every dtype and depth, every kind of sweep, embeddings without alignment."""
    for target in targets:
        for sweep in SWEEPS:
            for depth in DEPTHS:
                for dtype in DTYPES:
                    for precision in PRECISIONS if dtype == "fp32" else PRECISIONS[-1:]:
                        yield Configuration(target, sweep, dtype, depth, precision)
                yield Configuration(target, sweep, "bf16", depth, aligned=False)
        for sweep in (*STATISTICS, *GRADIENTS):
            if sweep not in SWEEPS:
                yield Configuration(target, sweep, "bf16", 512)
                yield Configuration(target, sweep, "bf16", 512, aligned=False)
                for precision in PRECISIONS:
                    yield Configuration(target, sweep, "fp32", 512, precision)
        for sweep in ONE_DIRECTION:
            for precision in PRECISIONS:
                yield Configuration(target, sweep, "fp32", 512, precision)
        yield from _launched(_fused_configurations(target))
        for sweep in AROUND:
            yield Configuration(target, sweep, "bf16", 512)
            yield Configuration(target, sweep, "fp32", 512, "tf32")


def _fused_configurations(target: str) -> Iterator[Configuration]:
    for form in FUSED:
        for depth in (*FUSED_DEPTHS, *ODD_FUSED_DEPTHS):
            for dtype in DTYPES:
                yield Configuration(target, form, dtype, depth)
                yield Configuration(target, f"{form} capped", dtype, depth)
        for terms in FUSED_TERMS:
            for depth in FUSED_DEPTHS:
                yield Configuration(target, f"{form} {terms}", "bf16", depth)


def _launched(configurations: Iterable[Configuration]) -> Iterator[Configuration]:
    """Without those that the launcher leaves to another sweep; each once."""
    return (c for c in dict.fromkeys(configurations) if c.plan_if_any is not None)


def has_both_gradients(configuration: Configuration) -> bool:
    return not {"anchors", "candidates"} & set(configuration.sweep.split())
