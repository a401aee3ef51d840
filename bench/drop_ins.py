"""What the classes that take a library's loss' place cost beyond the function that they call, forward + backward.

    python -m contrastile.bench.drop_ins [--rows 4096] [--dim 512] [--rounds 301] [--threads 1]

A class runs the operations that its function runs, on tensors of the same shapes (tests/test_bench_drop_ins.py), so
that what it takes beside them does not grow with N. It is timed where it is not lost in the noise of a long product, at
FEW rows: the median over rounds of what the class takes more, each round timing both, the first of them by turns. Given
with it is the function's time at N, and what share of it the difference is. What a library's loss does besides, as
normalising rows, is in the function's time as well. A library that is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import contrastile as ct
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALE, BIAS = 20.0, -10.0
FEW = 8
LONG_ROUNDS = 5  # at N, of the function alone


class Pair(NamedTuple):
    """Losses of two embeddings, (N, D) each."""

    drop_in: Callable[[Tensor, Tensor], Tensor]
    function: Callable[[Tensor, Tensor], Tensor]


def pairs_of() -> dict[str, Pair]:
    """By the class's name."""
    clip, siglip, nt_xent = ct.ClipLoss(), ct.SigLipLoss(), ct.NTXentLoss(temperature=1 / SCALE)
    found = {
        "ClipLoss": Pair(lambda x, y: clip(x, y, SCALE), lambda x, y: ct.info_nce(x, y, SCALE)),
        "SigLipLoss": Pair(lambda x, y: siglip(x, y, SCALE, BIAS), lambda x, y: ct.siglip(x, y, SCALE, BIAS)),
        "NTXentLoss": Pair(lambda x, y: nt_xent(x, y), lambda x, y: ct.nt_xent(torch.cat([_unit(x), _unit(y)]), SCALE)),
    }
    if importlib.util.find_spec("sentence_transformers"):
        from contrastile.integrations.sentence_transformers import MultipleNegativesRankingLoss

        ranking = MultipleNegativesRankingLoss(nn.Sequential(nn.Identity()), scale=SCALE)
        found["MultipleNegativesRankingLoss"] = Pair(
            lambda x, y: ranking.compute_loss_from_embeddings([x, y], None),
            lambda x, y: ct.info_nce(_unit(x), _unit(y), SCALE, symmetric=False),
        )
    return found


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1)


def seconds(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Of one forward and backward."""
    start = time.perf_counter()
    torch.autograd.grad(loss(x, y), (x, y))
    return time.perf_counter() - start


def seconds_beyond(pair: Pair, dim: int, rounds: int) -> float:
    """What the class takes more than the function at FEW rows; the first round warms up."""
    x, y = (_unit(torch.randn(FEW, dim)).requires_grad_() for _ in range(2))
    found = []
    for turn in range(rounds + 1):
        taken = {loss: seconds(loss, x, y) for loss in (pair if turn % 2 else pair[::-1])}
        found.append(taken[pair.drop_in] - taken[pair.function])
    return statistics.median(found[1:])


def seconds_at(loss: Callable[[Tensor, Tensor], Tensor], rows: int, dim: int) -> float:
    x, y = (_unit(torch.randn(rows, dim)).requires_grad_() for _ in range(2))
    return statistics.median([seconds(loss, x, y) for _ in range(LONG_ROUNDS + 1)][1:])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m contrastile.bench.drop_ins", description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=301)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"float32, N = {options.rows}, D = {options.dim}")
    for name, pair in pairs_of().items():
        beyond = seconds_beyond(pair, options.dim, options.rounds)
        whole = seconds_at(pair.function, options.rows, options.dim)
        share = f"{100 * beyond / whole:.3f} %"
        print(f"{name:<30}{1e6 * beyond:>8.1f} us beyond {1e3 * whole:>9.2f} ms: {share}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
