"""Faults found in other implementations of these losses, each as a regression test that carries the fault's name."""

from __future__ import annotations

import math

import contrastile as ct
import pytest
import torch
import torch.nn.functional as F
from contrastile import reference
from support import (
    BACKENDS_HERE,
    Shape,
    assert_as_exact_as_dense,
    assert_at_most,
    dense_torch_info_nce,
    gradients_of,
    scalar,
    towers,
    unit_rows,
)
from test_memory import CASES, PROMISE_MIB, extra_mib
from test_memory import pytestmark as needs_proc
from torch import Tensor

each_backend = pytest.mark.parametrize("backend", BACKENDS_HERE)


def between_nan(rows: Tensor) -> Tensor:
    """The same values with NaN before, behind and beside them: whoever reads out of bounds brings NaN home."""
    count, dim = rows.shape
    guarded = torch.full((count + 128, dim + 32), math.nan, dtype=rows.dtype)
    guarded[64 : 64 + count, 16 : 16 + dim] = rows
    return guarded[64 : 64 + count, 16 : 16 + dim]


def check(backend: str, shape: Shape, scale: float = 20.0, dtype: torch.dtype = torch.float32) -> None:
    x, y = towers(shape, dtype)
    assert_as_exact_as_dense(
        lambda x, y, scale: ct.info_nce(between_nan(x), between_nan(y), scale, backend=backend),
        dense_torch_info_nce,
        reference.info_nce,
        {"x": x, "y": y, "scale": scalar(scale, dtype)},
        dense_dtype=torch.float32,
    )


# Inf-CL


@each_backend
@pytest.mark.parametrize("rows", [1, 31, 65, 127, 130])
def test_row_count_not_multiple_of_tile_leaves_no_garbage_in_dY(backend, rows):
    check(backend, Shape(rows, rows, 64))


@each_backend
def test_padded_columns_do_not_enter_the_maximum_of_logits_of_minus_256(backend):
    """-256 + log(100) = -251.4, where padding counted as logits of 0 gives minus infinity."""
    direction = unit_rows(1, 64)
    x, y = direction.expand(100, -1).clone(), -direction.expand(100, -1).clone()
    row_lse, col_lse = ct.log_normalizers(x, y, 256.0, backend=backend)
    for lse in (row_lse, col_lse):
        assert_at_most(lse, torch.full((100,), math.log(100) - 256, dtype=torch.float64), 1e-4, "lse")
    assert_at_most(ct.info_nce(x, y, 256.0, backend=backend), torch.tensor(math.log(100)), 1e-4, "loss")


@each_backend
@pytest.mark.parametrize("dim", [384, 96])
def test_feature_dimension_that_is_no_power_of_two_neither_raises_nor_gives_nan(backend, dim):
    check(backend, Shape(128, 128, dim))
    check(backend, Shape(128, 128, dim), dtype=torch.bfloat16)


@each_backend
def test_log_of_sum_of_exponentials_without_a_maximum_does_not_overflow_at_scale_100(backend):
    check(backend, Shape(128, 128, 64), scale=100.0)
    x = unit_rows(128, 64)
    row_lse, _ = ct.log_normalizers(x, x, 100.0, backend=backend)
    truth, _ = reference.log_normalizers(x.double(), x.double(), 100.0)
    assert_at_most(row_lse, truth, 1e-4, "row_lse")  # logits reach 100, and exp overflows above 88.7


# memeff


@each_backend
def test_temperature_is_learnable(backend):
    x, y = towers(Shape(65, 65, 48), agreement=0.45)
    log_scale = torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.SGD([log_scale], lr=1.0)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(ct.info_nce(x, y, log_scale.exp(), backend=backend))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    assert log_scale.exp() > 3


@each_backend
@pytest.mark.parametrize("symmetric", [True, False])
def test_default_gradients_are_the_gradients_of_the_loss(backend, symmetric):
    x, y = towers(Shape(33, 33, 12), torch.float64)
    inputs = {"x": x, "y": y, "scale": scalar(20.0, torch.float64)}

    def loss(**inputs):
        return ct.info_nce(**inputs, symmetric=symmetric, backend=backend)

    gradients, step = gradients_of(loss, inputs), 1e-6
    for name, value in inputs.items():
        direction = torch.randn_like(value)
        ahead = loss(**inputs | {name: value + step * direction})
        behind = loss(**inputs | {name: value - step * direction})
        slope = (gradients["d" + name] * direction).sum()
        torch.testing.assert_close((ahead - behind) / (2 * step), slope, rtol=1e-6, atol=1e-8)


@each_backend
@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_shift_fixed_at_the_scale_does_not_underflow_when_the_best_cosine_is_low(backend, scale):
    """Every cosine is near -0.5: exp(s - scale) = exp(-150) is 0 in float32, and its logarithm minus infinity."""
    common = F.normalize(torch.eye(1, 48), dim=1)
    rest = [F.normalize(F.pad(unit_rows(65, 47, seed=seed), (1, 0)), dim=1) for seed in (1, 2)]
    x, y = (F.normalize(sign * common + 0.577 * r, dim=1) for sign, r in zip((1, -1), rest, strict=True))
    assert (x @ y.T).max() < -0.3
    assert_as_exact_as_dense(
        lambda x, y, scale: ct.info_nce(x, y, scale, backend=backend),
        dense_torch_info_nce,
        reference.info_nce,
        {"x": x, "y": y, "scale": scalar(scale)},
    )


@each_backend
@pytest.mark.parametrize("dim", [1, 3, 12, 48])
def test_few_features_need_not_be_a_power_of_two(backend, dim):
    check(backend, Shape(65, 65, dim))


# LibAUC


def alike(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Unit rows of cosines near 0.98: at scale 100, logits that are large, alike and far from a certain match."""
    direction = unit_rows(1, 48, torch.float64)
    x, y = (F.normalize(direction + 0.15 * unit_rows(65, 48, torch.float64, seed), dim=1) for seed in (1, 2))
    return {"x": x.to(dtype), "y": y.to(dtype), "scale": scalar(100.0, dtype)}


@each_backend
@pytest.mark.parametrize("cap", [True, False])
def test_unshifted_exponential_does_not_overflow_at_temperature_one_hundredth(backend, cap):
    inputs = alike()
    assert (100 * inputs["x"] @ inputs["y"].T).max() > 88.8  # exp of it is infinite in float32
    row_lse, _ = reference.log_normalizers(**inputs, positives=torch.arange(65))
    options = {"log_u": -row_lse, "cap": cap}
    assert_as_exact_as_dense(
        lambda **i: ct.gamma_contrastive(**i, **options, backend=backend).loss,
        lambda **i: reference.gamma_contrastive(**i, **options).loss,
        lambda **i: reference.gamma_contrastive(**i, **options).loss,
        inputs,
    )


# pytorch-metric-learning


@needs_proc
@each_backend
def test_nt_xent_of_2048_pairs_does_not_need_memory_cubic_in_the_batch(backend):
    assert extra_mib(CASES, backend, 4096)["nt_xent"] <= PROMISE_MIB


# ml-cross-entropy


@each_backend
def test_small_gradients_of_a_flat_softmax_are_not_filtered_away(backend):
    """At scale 0.01 every probability is about 1 / 1030: a filter that drops small ones drops all."""
    x, y = towers(Shape(1030, 1030, 16))
    inputs = {"x": x, "y": y, "scale": scalar(0.01)}
    truth = gradients_of(reference.info_nce, inputs, torch.float64)
    ours = gradients_of(lambda **i: ct.info_nce(**i, backend=backend), inputs)
    for name in ("dx", "dy"):
        assert_at_most(ours[name], truth[name], 1e-5 * truth[name].abs().max().item(), name)


# open_clip in half precision


@each_backend
@pytest.mark.parametrize("size", [1.0, 40.0])
def test_float16_features_do_not_round_or_overflow_their_logits(backend, size):
    """Half logits near 100 are 0.06 apart, and overflow at 65,504: rows of norm 40 at scale 100 reach 160,000."""
    inputs = alike(torch.float16)
    inputs |= {"x": size * inputs["x"], "y": size * inputs["y"]}
    truth = reference.info_nce(*(value.double() for value in inputs.values()))
    assert not (dense_torch_info_nce(**inputs) - truth).abs() < 1e-4
    ours = ct.info_nce(**inputs, backend=backend)
    assert ours.dtype == torch.float32
    assert_at_most(ours, truth, 1e-5 * max(1.0, truth.item()), "loss")
