"""Seconds of InfoNCE over prefixes of the features on the C++ backend: one sweep for all beside one for each.

    python -m contrastile.bench.prefixes [--rows 1024,4096,16384] [--dims 64,128,256,512] [--threads 2] [--repeats 5]

Forward + backward in float32, the longest prefix being all features. Both take turns, so that what else the machine
does meets both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import contrastile as ct
import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]

SCALE = 20.0


def one_for_each(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """info_nce, but not by its name, which is what one sweep is taken for."""
    return ct.info_nce(x, y, **options)


def seconds(rows: int, dims: list[int], repeats: int, **options: Any) -> tuple[float, float]:
    """Medians of one sweep and of one for each, after a run of both that is not counted."""
    x, y = (F.normalize(torch.randn(rows, max(dims)), dim=1).requires_grad_() for _ in range(2))
    losses: tuple[Loss, Loss] = (ct.info_nce, one_for_each)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for loss, taken in zip(losses, times, strict=True):
            start = time.perf_counter()
            torch.autograd.grad(ct.matryoshka(loss, x, y, dims=dims, scale=SCALE, backend="cpu", **options), [x, y])
            taken.append(time.perf_counter() - start)
    together, apart = (statistics.median(taken[1:]) for taken in times)
    return together, apart


def numbers_of(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m contrastile.bench.prefixes", description=__doc__)
    parser.add_argument("--rows", type=numbers_of, default=[1024, 4096, 16384])
    parser.add_argument("--dims", type=numbers_of, default=[64, 128, 256, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"float32, prefixes {options.dims}, {options.threads} threads, medians of {options.repeats}, s")
    print(f"{'N':>8}{'normalize':>12}{'symmetric':>12}{'one sweep':>12}{'one each':>12}{'ratio':>8}")
    for rows in options.rows:
        for normalize, symmetric in ((True, True), (True, False), (False, True), (False, False)):
            kind = {"normalize": normalize, "symmetric": symmetric}
            together, apart = seconds(rows, options.dims, options.repeats, **kind)
            line = f"{rows:>8}{normalize!s:>12}{symmetric!s:>12}{together:>12.4f}{apart:>12.4f}{apart / together:>8.2f}"
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
