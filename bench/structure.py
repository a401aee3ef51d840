"""Seconds of the latent modality structures beside plain PyTorch, forward + backward.

    python -m contrastile.bench.structure [--threads 2] [--repeats 5] [--dense-rows 8192]

The dense form of geometric consistency stores several N x N matrices; it is measured at --dense-rows, and for a larger
batch its time is scaled by N^2, which is marked.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import contrastile as ct
import torch
import torch.nn.functional as F
from contrastile.backends.rows import DotProducts
from contrastile.structure.row_pass import row_pass, unit_gain
from torch import Tensor

Loss = Callable[..., Tensor]


def dense_consistency(v: Tensor, t: Tensor) -> Tensor:
    """As CyCLIP computes its two terms."""
    across, image, text = v @ t.T, v @ v.T, t @ t.T
    return ((across - across.T).square().sum() + (image - text).square().sum()) / len(v)


def dense_bridge(v_aug: Tensor, v: Tensor, t: Tensor) -> Tensor:
    mean = F.normalize(0.25 * v + 0.75 * t, dim=1)
    return (v_aug - mean).square().sum(1).mean()


def dense_orthogonality(v: Tensor, v_ind: Tensor, t: Tensor, t_ind: Tensor) -> Tensor:
    return ((v * v_ind).sum(1).square() + (t * t_ind).sum(1).square()).mean()


def orthogonality(*inputs: Tensor) -> Tensor:
    return row_pass(DotProducts(difference=False), inputs, unit_gain(inputs[0], 1 / len(inputs[0])), "sum", None)


def leaves(count: int, rows: int, depth: int) -> list[Tensor]:
    return [F.normalize(torch.randn(rows, depth), dim=1).requires_grad_() for _ in range(count)]


def seconds(loss: Loss, count: int, rows: int, depth: int, repeats: int) -> float:
    """Median of forward + backward, after one run that is not counted."""
    inputs = leaves(count, rows, depth)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.autograd.grad(loss(*inputs), inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m contrastile.bench.structure", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dense-rows", type=int, default=8192, help="largest N of the dense consistency")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    depth, repeats = options.dim, options.repeats

    print(f"float32, D = {depth}, {options.threads} threads, medians of {repeats} (dense: at most 3), s")
    print(f"{'loss':<24}{'N':>8}{'ours':>10}{'PyTorch':>10}{'ratio':>8}")
    dense_seconds: dict[int, float] = {}
    for rows in (2048, 8192, 16384):
        measured = min(rows, options.dense_rows)
        if measured not in dense_seconds:
            dense_seconds[measured] = seconds(dense_consistency, 2, measured, depth, min(repeats, 3))
        dense = dense_seconds[measured] * (rows / measured) ** 2
        ours = seconds(ct.geometric_consistency, 2, rows, depth, repeats)
        mark = "" if measured == rows else f"  dense: N = {measured}, scaled by N^2"
        print(_line("geometric consistency", rows, ours, dense) + mark, flush=True)
    print(f"{'geometric consistency':<24}{131072:>8}{seconds(ct.geometric_consistency, 2, 131072, depth, 1):>10.4f}")
    rows_losses: list[tuple[str, int, Loss, Loss]] = [
        ("bridge", 3, ct.brownian_bridge, dense_bridge),
        ("orthogonality", 4, orthogonality, dense_orthogonality),
    ]
    for name, count, ours_of, dense_of in rows_losses:
        ours, dense = (seconds(loss, count, 65536, depth, repeats) for loss in (ours_of, dense_of))
        print(_line(name, 65536, ours, dense), flush=True)
    return 0


def _line(name: str, rows: int, ours: float, dense: float) -> str:
    return f"{name:<24}{rows:>8}{ours:>10.4f}{dense:>10.3f}{dense / ours:>8.1f}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
