"""The CUDA kernels on a processor, through the backend's own launches: the same sweeps as every backend's.

With the layer's checks on: a race in shared memory, a copy read before its wait, a bank conflict or a stray access to
shared memory fails a test, whatever the numbers are.
"""

from __future__ import annotations

import math
from functools import partial

import dense_sweeps
import pytest
import test_siglip as siglip
import torch
from contrastile.backends.cuda import CudaBackend
from contrastile.backends.cuda_launches import CudaKernels, CudaSweep
from contrastile.backends.tiled.gradients import NO_STRIP
from contrastile.backends.tiled.rows import RowSums
from contrastile.backends.tiled.sums import NO_SUMS
from contrastile.kernels.arguments import Gradients, Weights, Window
from contrastile.pairs import GivenWeights, GradNeeds, PairProblem, SoftmaxWeights
from cuda_host import build as host
from cuda_host import kernels
from dense_sweeps import (
    BOTH,
    CAPPED,
    DIRECTIONS,
    EXPONENTIAL,
    PROBLEMS,
    SIGMOID,
    assert_finished,
    assert_sweep,
    given_weights,
    grad_results,
    two_towers,
)
from support import Shape, small_workspace
from test_pair_sweeps import *  # noqa: F403
from test_pair_sweeps import ALL_NEEDS, NARROW

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(host.compiler() is None, reason="there is no C++ compiler"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Some problems in every dtype, the others in turn of them.
CASES = [
    (name, dtype)
    for turn, name in enumerate(PROBLEMS)
    for dtype in (DTYPES if host.FULL or name in NARROW else [DTYPES[turn % 3]])
]
TAKE_LONGEST = ("several-tiles", "1030x1030x17", "given-plain", "softmax-plain")  # and others show the same


@pytest.fixture(scope="module")
def native():
    return kernels.load(checks=True)


@pytest.fixture
def backend(native, monkeypatch, request):
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and torch.float64 in parameters.params.values():
        pytest.skip("takes no float64")
    if not host.FULL and any(name in request.node.name for name in TAKE_LONGEST):
        pytest.skip("make cuda-host-full runs this")
    monkeypatch.setattr(dense_sweeps, "BACKENDS_HERE", ["cuda"])
    kernels.configure(native)
    return CudaBackend(CudaKernels(native))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=CASES, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in CASES])
def problem(request) -> PairProblem:
    name, dtype = request.param
    return PROBLEMS[name](dtype)


# The sweep of the sigmoid loss

# With and without masks and positives, odd, triangular, by row scales; the largest take too long here.
SIGMOIDS = ["groups", "not-injective", "self-offset-negative", "self-triangular-258", "per-row-scale", "lonely-rows"]

test_sigmoids_in_a_small_workspace_change_nothing_but_rounding = (
    siglip.test_a_small_workspace_changes_nothing_but_rounding
)
test_sigmoids_of_large_logits_are_as_exact_as_dense = siglip.test_regimes_are_as_exact_as_dense
test_nan_reaches_exactly_the_sigmoids_it_affects = siglip.test_nan_reaches_exactly_the_results_it_affects


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in SIGMOIDS),
        *((name, dtype) for name in NARROW for dtype in (torch.float16, torch.bfloat16)),
    ],
    ids=str,
)
def test_sigmoid_weights_are_as_exact_as_dense(backend, name, dtype):
    siglip.test_sigmoid_weights_are_as_exact_as_dense(backend, name, dtype)


@pytest.mark.parametrize("name", ["groups-and-self", "tall-no-positives", "groups"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sigmoid_gradients_without_atomic_additions_are_as_exact_as_dense(backend, deterministic, dtype, name):
    problem = PROBLEMS[name](dtype)
    for direction in DIRECTIONS:
        weights = given_weights(problem, **direction, function=SIGMOID)
        needs = GradNeeds(dx=True, dy=True, moment=True, row_weight=direction["rows"])
        ours = grad_results(backend.pair_grad(problem, weights, needs), False)
        assert_sweep(problem, ours, lambda dense, weights=weights: dense.given(weights))


def test_sigmoid_and_softplus_keep_their_digits_however_small(backend):
    """Beside 4 units in the last place, what rounded log2(e) and t log2(e) cost an exponential: 0.61 |t| of them."""
    most = -math.log(torch.finfo(torch.float32).smallest_normal) - 1
    logits = torch.cat([torch.linspace(-most, most, 2001), torch.linspace(-3, 3, 2001), torch.tensor([-1e4, 1e4])])
    problem = PairProblem(logits[:, None], torch.ones(1, 1), torch.ones_like(logits))
    weights = GivenWeights(torch.zeros_like(logits), torch.ones_like(logits), None, None, None, SIGMOID)
    grads = backend.pair_grad(problem, weights, GradNeeds(dx=False, dy=False, row_weight=True))
    wide = logits.double()
    units = torch.finfo(torch.float32).eps * (4 + 0.625 * wide.abs())
    for name, ours, truth in (
        ("sigmoid", grads.row_weight, torch.sigmoid(wide)),
        ("softplus", grads.row_mass, torch.logaddexp(wide, torch.zeros_like(wide))),
    ):
        assert (ours.double() - truth).abs().le(units * truth).all(), name


# What a caller of the launches may get wrong


@pytest.mark.parametrize(
    ("window", "why"),
    [
        (Window(0, 0, 60, 256), r"of anchors \(300, 16\) and .* rows from 0 on, 60: expected a multiple of \d+"),
        (Window(0, 0, 128, 100), r"columns from 0 on, 100: expected a multiple of \d+, or an end with the problem"),
        (Window(256, 0, 45, 256), r"rows from 256 on, 45: expected one within the 300 that there are"),
        (Window(-128, 0, 128, 256), r"rows from -128 on, 128: expected one within the 300"),
    ],
)
@pytest.mark.parametrize("kernel", ["statistics", "coefficients", "gradient"])
def test_windows_off_the_tiles_or_the_problem_are_refused(backend, kernel, window, why):
    problem = two_towers(Shape(300, 300, 16), torch.bfloat16)
    weights, gradient = Weights(problem.scale, problem.scale, None, None, None), torch.zeros(300, 16)
    sweep = backend.kernels.sweep(problem, backend.kernels.strip_plan(problem, sums=False))
    arguments = {
        "statistics": (NO_SUMS, NO_SUMS, None, None),
        "coefficients": (weights, NO_STRIP, NO_SUMS, NO_SUMS, EXPONENTIAL),
        "gradient": (weights, Gradients(gradient, None, None), NO_SUMS, NO_SUMS, EXPONENTIAL),
    }
    with pytest.raises(ValueError, match=f"CUDA kernel {kernel} .*{why}"):
        getattr(sweep, kernel)(window, *arguments[kernel])


@pytest.mark.parametrize(
    ("depth", "dtype", "gradient", "why"),
    [
        (12, torch.bfloat16, True, "expected rows that start on 16 bytes and are multiples of that"),
        (16, torch.float32, True, "expected elements of 16 bits"),
        (136, torch.bfloat16, True, "expected at most 128 features"),
        (16, torch.bfloat16, False, "expected a gradient to add to"),
    ],
)
def test_what_the_fused_kernel_does_not_take_is_refused(backend, depth, dtype, gradient, why):
    problem = two_towers(Shape(65, 65, depth), dtype)
    sweep = backend.kernels.sweep(problem, backend.kernels.strip_plan(problem, sums=False))
    weights = Weights(problem.scale, problem.scale, None, None, None)
    into = Gradients(torch.zeros(65, depth) if gradient else None, None, None)
    with pytest.raises(ValueError, match=rf"CUDA kernel gradient of anchors \(65, {depth}\) .*: {why}"):
        sweep.gradient(Window(0, 0, 65, 65), weights, into, NO_SUMS, NO_SUMS, EXPONENTIAL)


def test_a_window_without_pairs_starts_nothing(backend):
    problem = two_towers(Shape(65, 65, 16), torch.bfloat16)
    sweep = backend.kernels.sweep(problem, backend.kernels.strip_plan(problem, sums=False))
    for window in (Window(0, 0, 0, 65), Window(0, 65, 65, 0)):
        sweep.statistics(window, NO_SUMS, NO_SUMS, None, None)


# What a processor can tell of kernels beside their results


@pytest.mark.parametrize("function", [CAPPED, SIGMOID], ids=["cap", "sigmoid"])
@pytest.mark.parametrize("name", ["plain", "groups-and-self", "deep"])
def test_schedules_change_no_bit(native, deterministic, name, function):
    """Blocks in any order, threads interleaved at random: without atomic additions every sum has one order."""
    problem = PROBLEMS[name](torch.bfloat16)
    backend = CudaBackend(CudaKernels(native))
    found = []
    for schedule in (
        {},
        {"blocks": "reversed"},
        *({"blocks": "random", "random_threads": True, "seed": s} for s in (1, 2)),
    ):
        kernels.configure(native, **schedule)
        grads = backend.pair_grad(problem, given_weights(problem, **BOTH, function=function), ALL_NEEDS)
        found.append([grads.dx, grads.dy, grads.row_moment, grads.row_mass, grads.stats.row_sum, grads.stats.col_sum])
    for others in found[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(others, found[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deep", [False, True], ids=["fused", "strip"])
def test_shared_memory_is_free_of_conflicts_and_of_what_nobody_wrote(native, dtype, deep):
    kernels.configure(native)
    problem = two_towers(Shape(130, 200, 192 if deep else 64), dtype, positives=torch.arange(130))
    backend = CudaBackend(CudaKernels(native))
    for run in (
        lambda: backend.pair_stats(problem, columns=True),
        *(
            partial(
                backend.pair_grad,
                problem,
                given_weights(problem, **BOTH, function=function),
                GradNeeds(dx=True, dy=True, row_weight=function is SIGMOID),
            )
            for function in (EXPONENTIAL, SIGMOID)
        ),
    ):
        native.reset_totals()
        run()
        assert native.totals() == {"bank_conflicts": 0, "copies_never_waited_for": 0, "unwritten_bytes_read": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
def test_rows_are_finished_with_all_factors(native, dtype, joined):
    kernels.configure(native)
    sums, other, x = (torch.randn(67, 40, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3))
    row_factors, factor, upstream = torch.linspace(0.1, 3, 67), torch.tensor([2.0**-20]), torch.tensor(2.0**19)
    x = x.to(dtype)
    rows = RowSums(CudaKernels(native), sums.clone(), other.clone(), True, True, False, factor, row_factors)
    found = rows.finish(x, upstream, dtype, joined=joined)
    assert_finished(found, x, row_factors[:, None] * sums.double() / 2, other.double() / 2, joined)


ROUNDED = 192 * 2  # bytes of a row of a 16-bit gradient


@pytest.mark.parametrize(
    ("dtype", "needs", "room"),
    [
        (torch.float32, GradNeeds(dx=True, dy=True), 2**16),
        (torch.bfloat16, GradNeeds(dx=True, dy=True), (700 + 500) * ROUNDED),
        (torch.bfloat16, GradNeeds(dx=True, dy=False), 700 * ROUNDED),
        (torch.bfloat16, GradNeeds(dx=False, dy=True), 500 * ROUNDED),
        (torch.bfloat16, GradNeeds(dx=False, dy=False, moment=True), 2**16),
    ],
    ids=["float32", "both", "dx", "dy", "moment"],
)
def test_a_strip_takes_half_of_the_workspace_or_the_room_of_gradients_that_come_later(
    native, monkeypatch, dtype, needs, room
):
    kernels.configure(native)
    sizes = []
    launch = CudaSweep.coefficients

    def coefficients(sweep, window, weights, strip, *others):
        sizes.append(strip.coefficients.untyped_storage().nbytes())
        launch(sweep, window, weights, strip, *others)

    monkeypatch.setattr(CudaSweep, "coefficients", coefficients)
    problem = two_towers(Shape(700, 500, 192), dtype, positives=torch.arange(700) % 500)
    with small_workspace(2**17):
        CudaBackend(CudaKernels(native)).pair_grad(problem, SoftmaxWeights(columns=False), needs)
    assert len(set(sizes)) == 1
    assert room / 4 < sizes[0] <= room
    assert len(sizes) >= 700 * 500 * dtype.itemsize / room


@pytest.mark.parametrize("form", ["ieee", "tf32x3", "tf32"])
def test_infinity_gives_nan_in_three_products_and_in_every_gradient(native, monkeypatch, form):
    """docs/numerics.md: its logits are infinite by one product, NaN by three; other rows' are as they were."""
    monkeypatch.setenv("CONTRASTILE_FLOAT32", form)
    kernels.configure(native)
    backend = CudaBackend(CudaKernels(native))
    problem = PROBLEMS["plain"](torch.float32)
    problem.candidates[:, 5] = -problem.candidates[:, 5].abs() - 0.1
    problem.anchors[:, 5] = 0
    problem.anchors[17, 5] = math.inf
    stats = backend.pair_stats(problem)
    others = torch.arange(65) != 17
    assert stats.positive_logit[others].isfinite().all()
    assert (stats.row_max + stats.row_sum.log())[others].isfinite().all()
    found = stats.positive_logit[17].item(), stats.row_sum[17].item()
    assert all(map(math.isnan, found)) if form == "tf32x3" else found == (-math.inf, 0)
    grads = backend.pair_grad(problem, SoftmaxWeights(columns=False), GradNeeds(dx=False, dy=True))
    assert grads.dy[:, 5].isnan().all()
