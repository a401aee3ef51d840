"""Launches: which share a compiled kernel (never two that Triton would compile apart), and how many there are."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from contrastile.backends import triton_launches, triton_start
from contrastile.backends.triton_launches import launch_options
from contrastile.backends.triton_start import blocks_of, form, start
from contrastile.bench.static.compile import make_backend
from contrastile.kernels.arguments import Gradients, Pairs, Strip, Sums, Weights, Window
from contrastile.kernels.coefficients import coefficients_kernel
from contrastile.kernels.plans import tile_plan, window_plan
from contrastile.pairs import PairProblem, WeightFunction
from support import INTERPRETING
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

EXPONENTIAL = WeightFunction.EXPONENTIAL
PLAN = tile_plan("gradient", "sm_90", 16, 512, True, False)
CONSTANTS = {
    "FUNCTION": EXPONENTIAL.value,
    "DEPTH": 512,
    "BLOCK_ROWS": PLAN.block_rows,
    "BLOCK_COLS": PLAN.block_cols,
    "BLOCK_DEPTH": PLAN.block_depth,
    "PARTS": 1,
    "ROW_LANES": 1,
    "GROUP_ROWS": 8,
    "PRECISION": "ieee",
    "EMULATE_BF16": False,
}
DEVICE = SimpleNamespace(type="cuda", index=0)


def launch(**changes: Any) -> tuple[Any, ...]:
    """Arguments of a launch: what is usual, but for the changes."""
    floats, rows = torch.ones(4096), changes.get("rows", 4096)
    embeddings = changes.get("embeddings", torch.ones(64, 512, dtype=torch.bfloat16))
    shift = changes.get("shift", floats)
    plan = tile_plan("gradient", "sm_90", 16, 512, changes.get("descriptors", True), False)
    pairs = Pairs(
        anchors=embeddings,
        candidates=embeddings,
        anchor_stride=512,
        candidate_stride=512,
        scale=floats,
        positives=changes.get("positives", torch.zeros(4096, dtype=torch.int64)),
        row_groups=None,
        col_groups=None,
        row_ceiling=changes.get("row_ceiling"),
        self_offset=changes.get("self_offset"),
        rows=rows,
        cols=4096,
    )
    window = Window(changes.get("first_row", 0), 0, min(rows, 4096), 4096)
    sums = Sums(None, None, None)
    weights = Weights(shift, floats, floats, floats, floats)
    return (pairs, *blocks_of(embeddings, embeddings, plan), window, weights, Strip(embeddings, 4096, None), sums, sums)


LAUNCHES = [
    {},
    {"first_row": 128},
    {"first_row": 1},
    {"first_row": 130},
    {"rows": 4095},
    {"rows": 2**31},
    {"rows": 2**31 + 1},
    {"rows": 1},
    {"self_offset": 0},
    {"self_offset": 1},
    {"self_offset": -17},
    {"positives": None},
    {"shift": None},
    {"shift": torch.ones(8)[1:]},
    {"shift": torch.ones(8)[4:]},
    {"shift": torch.ones(8, dtype=torch.float64)},
    {"descriptors": False},
    {"embeddings": torch.ones(64, 512, dtype=torch.float16)},
]


@pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
def test_launches_of_one_form_are_one_to_triton() -> None:
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(coefficients_kernel.signature, coefficients_kernel.params, backend)

    def tritons_own(arguments: tuple[Any, ...]) -> str:
        return str(binder(*arguments, **CONSTANTS, **launch_options(4, 3))[1])

    found = [(form(arguments), tritons_own(arguments)) for arguments in (launch(**changes) for changes in LAUNCHES)]
    shared = [a for (form_a, a), (form_b, b) in itertools.combinations(found, 2) if form_a == form_b and a == b]
    assert len(shared) >= 3  # an offset that is a multiple of 16, or an aligned slice, is nothing new
    for (form_a, a), (form_b, b) in itertools.combinations(found, 2):
        assert form_a != form_b or a == b


@pytest.mark.skipif(INTERPRETING, reason="the interpreter takes descriptors wherever they are")
def test_descriptors_are_arguments_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a tuple they compile, and up to Triton 3.6 no launch takes them."""
    launched = []
    monkeypatch.setattr(triton_launches, "start", lambda kernel, programs, arguments, *_: launched.append(arguments))
    monkeypatch.setattr(triton_launches, "_target", lambda device: "sm_90")
    rows = torch.ones(64, 512, dtype=torch.bfloat16)
    problem = PairProblem(rows, rows, torch.ones(64))
    sweep = triton_launches.TritonSweep(problem, PLAN)
    window, sums, weights = Window(0, 0, 64, 64), Sums(None, None, None), Weights(*[torch.ones(64)] * 5)
    sweep.statistics(window, sums, sums, None, None)
    sweep.coefficients(window, weights, Strip(rows, 64, None), sums, sums, EXPONENTIAL)
    sweep.gradient(window, weights, Gradients(rows, rows, None), sums, sums, EXPONENTIAL)
    assert len(launched) == 3
    for arguments in launched:
        assert sum(isinstance(value, TensorDescriptor) for value in arguments) == 2
        assert not any(
            isinstance(part, TensorDescriptor) for value in arguments if isinstance(value, tuple) for part in value
        )


class Kernel:
    """Keeps what it was started with; what it gives back, as a compiled kernel, likewise."""

    arg_names = ("first", "second", "BLOCK", "CAP")

    def __init__(self) -> None:
        self.bound: list[Any] = []
        self.started: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> Any:
            self.bound.append((grid, arguments, constants))
            return Compiled(self.started)

        return run


class Compiled:
    def __init__(self, started: list[Any]) -> None:
        self.started = started

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.started.append((grid, arguments))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(triton_start, "_compiled", {})
    monkeypatch.setattr(torch.version, "hip", None)
    return Kernel()


def test_second_launch_of_a_form_goes_to_the_compiled_kernel_with_its_constants_in_order(kernel: Kernel) -> None:
    for first in (16, 32, 33):
        start(kernel, first, (first, None), {"CAP": True, "BLOCK": 64}, {"num_warps": 4}, DEVICE)
    assert [(grid, arguments) for grid, arguments, _ in kernel.bound] == [
        ((16, 1, 1), (16, None)),
        ((33, 1, 1), (33, None)),
    ]
    assert kernel.bound[0][2] == {"CAP": True, "BLOCK": 64, "num_warps": 4}
    assert kernel.started == [((32, 1, 1), (32, None, 64, True))]


@pytest.mark.parametrize(
    ("constants", "options", "device"),
    [
        ({"CAP": False, "BLOCK": 64}, {"num_warps": 4}, DEVICE),
        ({"CAP": True, "BLOCK": 32}, {"num_warps": 4}, DEVICE),
        ({"CAP": True, "BLOCK": 64}, {"num_warps": 8}, DEVICE),
        ({"CAP": True, "BLOCK": 64}, {"num_warps": 4}, SimpleNamespace(type="cuda", index=1)),
    ],
    ids=["constant", "number", "option", "device"],
)
def test_other_constants_options_and_devices_are_other_kernels(kernel, constants, options, device) -> None:
    start(kernel, 1, (16, None), {"CAP": True, "BLOCK": 64}, {"num_warps": 4}, DEVICE)
    start(kernel, 1, (16, None), constants, options, device)
    assert len(kernel.bound) == 2
    assert not kernel.started


def test_where_triton_looks_at_the_sizes_of_tensors_it_is_asked_every_time(kernel, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for _ in range(2):
        start(kernel, 1, (16, None), {"CAP": True, "BLOCK": 64}, {"num_warps": 4}, DEVICE)
    assert len(kernel.bound) == 2


def test_other_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="kernels take tensors, numbers and tuples of them, got str"):
        form((1, "2"))


@pytest.mark.parametrize(
    ("rows", "smallest_side", "count"),
    [(4096, 4096, 1), (4097, 4096, 3), (16384, 4096, 10), (65536, 4096, 36), (4096, 0, 36)],
)
def test_a_triangle_is_not_cut_below_what_is_worth_a_launch(rows: int, smallest_side: int, count: int) -> None:
    windows = list(window_plan(rows, rows, 2**26, 128, True, smallest_side).windows(rows, rows, True))
    assert len(windows) == count
    assert sum(w.rows * w.cols * (1 if w.first_row == w.first_col else 2) for w in windows) == rows**2
