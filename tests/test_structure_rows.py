"""The pass over rows by every backend, between guards, and at most one read and one write of each row.

Triton's interpreter runs the same file, started by test_structure_interpreter below.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contrastile.backends import rows
from contrastile.backends.rows import BridgeDistance, DotProducts
from support import BACKENDS_HERE, DTYPES, INTERPRETING, accumulation, assert_at_most, rounding_of
from test_triton_kernels import Guards, between_guards, rows_between_guards

HERE = [dtype for dtype in DTYPES if not INTERPRETING or dtype != torch.float64]
SHAPES = [(1, 1), (2, 3), (67, 5), (65, 96), (130, 257), (5, 1100)]
KINDS = ["bridge", "squares", "difference"]


def truth(kind, inputs, gain):
    """Values and gradients in float64, by autograd over the definition."""
    leaves = [part.detach().double().requires_grad_() for part in inputs]
    if isinstance(kind, BridgeDistance):
        aug, v, t = leaves
        time = kind.time.double()[:, None]
        mean = time * v + (1 - time) * t
        values = (aug - mean / mean.norm(dim=1, keepdim=True)).square().sum(1)
    else:
        first, second = ((leaves[i] * leaves[i + 1]).sum(1) for i in (0, 2))
        values = (first - second) ** 2 if kind.difference else first**2 + second**2
    return values.detach(), torch.autograd.grad((gain.double() * values).sum(), leaves)


def problem(name, shape, dtype):
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    kind = DotProducts(name == "difference")
    if name == "bridge":
        kind = BridgeDistance(between_guards(torch.linspace(0.1, 0.9, shape[0], dtype=accumulation(dtype))))
    count = 3 if name == "bridge" else 4
    inputs = tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count))
    gain = torch.linspace(0.5, 3, shape[0], dtype=accumulation(dtype))
    return kind, tuple(map(rows_between_guards, inputs)), between_guards(gain)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("dtype", HERE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_are_exact_and_stay_between_their_guards(backend, name, shape, dtype):
    kind, inputs, gain = problem(name, shape, dtype)
    guards = Guards()
    with guards:
        values, gradients = rows.run(backend, kind, inputs, gain, (True,) * len(inputs))
    guards.check()
    exact_values, exact = truth(kind, inputs, gain)
    eps = torch.finfo(accumulation(dtype)).eps
    # A distance or product of unit size is rounded about once a feature; the mean of a short row may nearly cancel.
    room = 8 * eps * shape[1]
    assert_at_most(values, exact_values, room * (1 + exact_values.abs().max().item()), "values")
    for i, (gradient, expected) in enumerate(zip(gradients, exact, strict=True)):
        assert gradient.dtype == dtype
        largest = 1 + expected.abs().max().item()
        assert_at_most(gradient, expected, room * largest**2 + rounding_of(dtype, expected), f"gradient {i}")


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("name", KINDS)
def test_only_wanted_gradients_are_formed_and_they_do_not_depend_on_the_others(backend, name):
    kind, inputs, gain = problem(name, (19, 33), torch.float32)
    values, every = rows.run(backend, kind, inputs, gain, (True,) * len(inputs))
    for wanted in range(len(inputs)):
        wants = tuple(i == wanted for i in range(len(inputs)))
        found, gradients = rows.run(backend, kind, inputs, gain, wants)
        assert [g is not None for g in gradients] == list(wants)
        torch.testing.assert_close(found, values)
        torch.testing.assert_close(gradients[wanted], every[wanted])


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_a_mean_of_zero_has_no_direction_and_no_gradient(backend):
    aug, v = torch.randn(2, 3, 8)
    values, gradients = rows.run(
        backend, BridgeDistance(torch.full((3,), 0.5)), (aug, v, -v), torch.ones(3), (True,) * 3
    )
    torch.testing.assert_close(values, aug.square().sum(1))
    torch.testing.assert_close(gradients[0], 2 * aug)
    assert gradients[1].count_nonzero() == gradients[2].count_nonzero() == 0


@pytest.mark.skipif("triton" not in BACKENDS_HERE, reason="a GPU flushes subnormal numbers, a processor does not")
def test_a_mean_whose_square_is_subnormal_counts_as_zero():
    aug, v = torch.randn(3, 8), torch.full((3, 8), 1e-20)
    values, gradients = rows.run(
        "triton", BridgeDistance(torch.full((3,), 0.5)), (aug, v, v), torch.ones(3), (True,) * 3
    )
    torch.testing.assert_close(values, aug.square().sum(1))
    assert gradients[1].count_nonzero() == gradients[2].count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("name", KINDS)
def test_nan_stays_in_its_row(backend, name):
    kind, inputs, gain = problem(name, (9, 20), torch.float32)
    inputs[1][4, 3] = float("nan")
    values, gradients = rows.run(backend, kind, inputs, gain, (True,) * len(inputs))
    assert values.isnan().nonzero().flatten().tolist() == [4]
    for gradient in gradients:
        assert set(gradient.isnan().any(1).nonzero().flatten().tolist()) <= {4}


@pytest.mark.skipif("cpu" not in BACKENDS_HERE, reason="the cpu backend is not available")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrowing_in_cpp_rounds_as_pytorch_does(dtype):
    """Subnormals, ties, the largest numbers and those beyond."""
    tiny = torch.finfo(dtype).smallest_normal
    wide = torch.cat(
        [torch.linspace(-4 * tiny, 4 * tiny, 4001), torch.randn(4000) * 1000, torch.linspace(6e4, 7e4, 99)]
    )
    wide = torch.cat([wide, torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519.996, 65520, 3.4e38])])
    ones = torch.ones(len(wide), 1, dtype=dtype)
    _, gradients = rows.run("cpu", DotProducts(False), (ones, ones, ones, ones), wide / 2, (True, False, False, False))
    torch.testing.assert_close(gradients[0][:, 0], wide.to(dtype), rtol=0, atol=0)


@pytest.mark.skipif("cpu" not in BACKENDS_HERE, reason="the cpu backend is not available")
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.slow
def test_every_instruction_set(isa):
    check = "exact or nan_stays or narrowing or only_wanted"
    arguments = ["-q", "-p", "no:cacheprovider", __file__, "-k", f"({check}) and not every and not eager"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"CONTRASTILE_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="this run is such a child already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_passes_in_tritons_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
