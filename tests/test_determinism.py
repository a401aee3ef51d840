"""The cpu backend gives the same bits in every run and with any number of threads."""

from __future__ import annotations

from collections.abc import Callable

import contrastile as ct
import pytest
import torch
from contrastile.functional_prefixes import info_nce_over_prefixes
from support import BACKENDS_HERE, SQUARE_SHAPES, WIDE_SHAPES, Shape, small_workspace, towers
from torch import Tensor

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS_HERE, reason="the cpu backend is not available")

RUNS = 30
AWKWARD = [Shape(63, 63, 384), Shape(257, 257, 100), Shape(515, 515, 33)]


def symmetric(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return ct.info_nce(x, y, scale, backend="cpu")


def rows_only(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return ct.info_nce(x, y, scale, symmetric=False, backend="cpu")


def per_row(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return ct.info_nce(x, y, scale, reduction="none", backend="cpu").sum()


def gamma(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    weights = torch.linspace(-12, -2, len(x))
    return ct.gamma_contrastive(x, y, scale, weights, weights.flip(0), backend="cpu").loss


def self_similarity(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return ct.nt_xent(torch.cat([x, y]), scale, backend="cpu")


def prefixes(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    dims = sorted({(x.shape[1] + 3) // 4, (x.shape[1] + 1) // 2, x.shape[1]})
    return info_nce_over_prefixes(x, y, scale, dims=dims, weights=[1.0, 0.5, 2.0][: len(dims)], normalize=True)


LOSSES = [symmetric, rows_only, per_row, gamma, self_similarity, prefixes]


def bits(loss: Callable[..., Tensor], shape: Shape, dtype: torch.dtype, threads: int) -> bytes:
    x, y = (t.requires_grad_() for t in towers(shape, dtype))
    scale = torch.tensor(20.0, requires_grad=True)
    torch.set_num_threads(threads)
    value = loss(x, y, scale)
    value.backward()
    return b"".join(
        t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in (value[None], x.grad, y.grad)
    ) + (scale.grad[None].view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_thirty_runs_are_equal_bit_for_bit(shape, loss):
    with small_workspace(256 * 2**10):
        assert len({bits(loss, shape, torch.float32, threads=3) for _ in range(RUNS)}) == 1


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [*SQUARE_SHAPES, Shape(515, 515, 33)], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(shape, dtype, loss):
    assert len({bits(loss, shape, dtype, threads) for threads in (1, 2, 3, 8)}) == 1


@pytest.mark.parametrize("loss", LOSSES)
def test_threads_do_not_change_a_bit_where_logits_are_formed_in_several_strips(loss):
    """Scratch is set aside for four threads; beyond them the strips of a full workspace become lower."""
    with small_workspace(8 * 2**20):
        assert len({bits(loss, Shape(1500, 1500, 33), torch.float32, threads) for threads in (1, 2, 3, 4)}) == 1


@pytest.mark.parametrize("shape", WIDE_SHAPES, ids=str)
def test_wide_problems_do_not_change_a_bit_with_threads_in_a_small_workspace(shape):
    with small_workspace():
        assert len({bits(rows_only, shape, torch.float32, threads) for threads in (1, 2, 3, 8)}) == 1
