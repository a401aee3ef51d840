"""Launches of the Triton kernels over a problem, window by window."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from contrastile.kernels.merge import merge_kernel
from contrastile.kernels.plans import TilePlan, gradient_plan, tile_plan, window_plan
from contrastile.kernels.positives import positives_kernel
from contrastile.kernels.tiles import Pairs, Sums, Window
from contrastile.pairs import PairProblem

MERGE_BLOCK = 256


@cache
def interpreting() -> bool:
    """Read once, as Triton itself reads it when the kernels are defined."""
    return bool(triton.knobs.runtime.interpret)


class Sweep:
    """A problem made ready for launches: its plan, and what all of its kernels take."""

    def __init__(self, problem: PairProblem, plan: TilePlan) -> None:
        self.problem = problem
        self.depth = problem.anchors.shape[1]
        self.plan = plan
        self.pointers = Pairs(
            anchors=problem.anchors,
            candidates=problem.candidates,
            anchor_stride=problem.anchors.stride(0),
            candidate_stride=problem.candidates.stride(0),
            scale=problem.scale,
            positives=problem.positives,
            row_groups=problem.row_groups,
            col_groups=problem.col_groups,
            self_offset=problem.self_offset,
            rows=problem.rows,
            cols=problem.cols,
        )
        self.pairs = self.pointers
        if self.plan.descriptors:
            self.pairs = self.pointers._replace(
                anchors=TensorDescriptor.from_tensor(problem.anchors, [self.plan.block_rows, self.plan.block_depth]),
                candidates=TensorDescriptor.from_tensor(
                    problem.candidates, [self.plan.block_cols, self.plan.block_depth]
                ),
            )

    def windows(self, most_pairs: int) -> Iterator[Window]:
        problem = self.problem
        plan = window_plan(problem.rows, problem.cols, most_pairs, self.multiple, problem.self_similarity)
        return plan.windows(problem.rows, problem.cols, problem.self_similarity)

    @property
    def multiple(self) -> int:
        """Of which the sides of a window are multiples, unless they end with the problem."""
        return max(self.plan.block_rows, self.plan.block_cols)

    def launch_tiles(self, kernel: Any, window: Window, *arguments: Any, **constants: Any) -> None:
        """One program a tile."""
        tile_rows, tile_cols = self.plan.tiles(window)
        constants |= {"GROUP_ROWS": self.plan.group_rows, "PARTS": self.plan.parts}
        self.launch(kernel, tile_rows * tile_cols, self.pairs, window, *arguments, **constants)

    def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        """A kernel of tiles."""
        constants |= {"DESCRIPTORS": self.plan.descriptors, **self._tile_constants()}
        self._start(kernel, programs, *arguments, **constants)

    def merge(self, totals: tuple[Sums, Sums], partials: tuple[Sums, Sums]) -> None:
        for total, partial in zip(totals, partials, strict=True):
            lines = next((lines for lines in partial if lines is not None), None)
            if lines is not None:
                tiles, length = lines.shape
                programs = triton.cdiv(length, MERGE_BLOCK)
                self._start(merge_kernel, programs, partial, total, tiles, length, BLOCK=MERGE_BLOCK)

    def positives(self) -> Tensor | None:
        """Logits of the positives, as the tiles compute them."""
        if self.problem.positives is None:
            return None
        found = torch.empty_like(self.problem.scale)
        programs = triton.cdiv(self.problem.rows, min(self.plan.block_rows, self.plan.block_cols))
        self._start(positives_kernel, programs, self.pointers, found, **self._tile_constants())
        return found

    def _tile_constants(self) -> dict[str, Any]:
        return {
            "DEPTH": self.depth,
            "BLOCK_ROWS": self.plan.block_rows,
            "BLOCK_COLS": self.plan.block_cols,
            "BLOCK_DEPTH": self.plan.block_depth,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            "EMULATE_BF16": interpreting() and self.problem.anchors.dtype == torch.bfloat16,
        }

    def _start(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        options = launch_options(self.plan.num_warps, self.plan.num_stages)
        with on_device(self.problem.anchors.device):
            kernel[(programs,)](*arguments, **constants, **options)


def launch_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """What every launch tells the compiler. Fusion of multiplications with additions is what the kernels' bounds and
    errors were found with; what Triton does unasked depends on its version.
    """
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def statistics_plan(problem: PairProblem, ranks: bool) -> TilePlan:
    return tile_plan("statistics", *_described(problem), crowded=ranks)


def strip_plan(problem: PairProblem, sums: bool) -> TilePlan:
    """Plan of the kernel that fills a strip with coefficients, with or without sums on the way."""
    return tile_plan("gradient", *_described(problem), crowded=sums or problem.row_groups is not None)


def fused_plan(problem: PairProblem, sums: bool) -> TilePlan | None:
    """Plan of the fused gradient kernel, with or without sums on the way; None where a strip serves better."""
    if problem.self_similarity:
        return None
    return gradient_plan(*_described(problem), crowded=sums or problem.row_groups is not None)


def _described(problem: PairProblem) -> tuple[str, int, int, bool]:
    """What a plan depends on: target, bits of an element, features, whether tensor descriptors can be used."""
    x, y = problem.anchors, problem.candidates
    return _target(x.device), x.element_size() * 8, x.shape[1], _fits_descriptors(x, y)


def _fits_descriptors(*embeddings: Tensor) -> bool:
    """Tensor descriptors need rows that start on 16 bytes."""
    return all(
        t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 and t.shape[1] * t.element_size() >= 16
        for t in embeddings
    )


@cache
def _target(device: torch.device) -> str:
    if interpreting():
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
