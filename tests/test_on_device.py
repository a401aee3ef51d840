"""The package on a GPU: exact, repeatable, capturable, within its memory, and without a wait for the device.

On a machine with a CUDA or ROCm device these run there, as `make gpu-check` has them, once by each backend that can
(float64 by eager, which is chosen automatically). With TRITON_INTERPRET=1 they run on CPU tensors, a dry run, without
the tests that need streams, graphs or the allocator of a device. Inputs come from the CPU and results go back there:
truth and bars are those of the other tests.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import contrastile as ct
import dense_sweeps
import pytest
import support
import torch
from contrastile import backends, reference, structure
from contrastile.pairs import GradNeeds, PairProblem, SoftmaxWeights
from dense_sweeps import BOTH, CAPPED, PROBLEMS, Dense, given_weights, grad_results, stats_results
from support import (
    DTYPES,
    INTERPRETING,
    Shape,
    accumulation,
    assert_as_exact_as_dense,
    assert_at_most,
    dense_torch_info_nce,
    dense_torch_nt_xent,
    error,
    largest,
    placed,
    scalar,
    takes_float64,
    towers,
)
from test_memory import PROMISE_MIB

# The sweeps: tests of every backend, here with the fixture `backend` of this file.
from test_pair_sweeps import (  # noqa: F401
    CASE_IDS,
    CASES,
    test_a_small_workspace_changes_nothing_but_rounding,
    test_a_small_workspace_with_many_strips_and_column_chunks,
    test_cap_makes_overflow_impossible,
    test_expanded_rows_are_read_as_equal_rows,
    test_given_weights_are_as_exact_as_dense,
    test_layout_of_the_inputs_does_not_matter,
    test_logits_of_positives_are_as_exact_as_dense,
    test_nan_never_makes_a_positive_look_retrieved,
    test_nan_reaches_exactly_the_results_it_affects,
    test_only_what_is_needed_is_given_and_its_value_does_not_depend_on_the_rest,
    test_positive_coefficient_keeps_its_digits_when_the_model_is_confident,
    test_ranks_are_exact_on_integers_where_ties_are_true_ties,
    test_regimes_are_as_exact_as_dense,
    test_softmax_weights_are_as_exact_as_dense,
    test_stats_are_as_exact_as_dense,
    test_sums_of_rows_without_negatives_are_zero,
)
from torch import Tensor

DEVICE = "cpu" if INTERPRETING else "cuda"
BACKENDS = ["triton"] if INTERPRETING else ["triton", "cuda"]
RUNS = 3 if INTERPRETING else 30

if not (INTERPRETING or torch.cuda.is_available()):
    pytest.skip("no CUDA or ROCm device; gpu_check.py --dry-run interprets", allow_module_level=True)
needs_a_device = pytest.mark.skipif(INTERPRETING, reason="the interpreter has no streams, graphs or allocator")


def on_a_device(value: object) -> Any:
    reason = "takes the interpreter too long, or fails by its bfloat16, which loses a NaN and makes a number of a zero"
    return pytest.param(value, marks=pytest.mark.skipif(INTERPRETING, reason=reason))


@pytest.fixture(params=BACKENDS, autouse=True)
def device_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What calls that name no backend are served by, and the bars are those of."""
    name = request.param
    missing = backends.available()[name]
    if missing is not None:
        pytest.skip(missing)
    for module in (support, dense_sweeps):
        monkeypatch.setattr(module, "BACKENDS_HERE", [name])
    monkeypatch.setattr(support, "SUMS_ON_MATRIX_UNITS", not INTERPRETING)
    if takes_float64(request.node.callspec.params.values()) and not INTERPRETING:
        if name != BACKENDS[0]:
            pytest.skip("takes no float64")
        yield "eager"
    else:
        with ct.use_backend(name):
            yield name


class OnDevice:
    """The backend that the device's tensors are given to, for problems and results on the CPU."""

    def _run(self, operation: str, problem: PairProblem, *arguments: Any, **options: Any) -> Any:
        chosen = backends.get(backends.resolve(None, DEVICE, problem.anchors.dtype))
        return placed(getattr(chosen, operation)(*placed((problem, *arguments), DEVICE), **options), "cpu")

    pair_stats = partialmethod(_run, "pair_stats")
    pair_grad = partialmethod(_run, "pair_grad")
    positive_logits = partialmethod(_run, "positive_logits")


@pytest.fixture(params=[DEVICE])
def backend() -> OnDevice:
    return OnDevice()


@pytest.fixture(params=CASES, ids=CASE_IDS)
def problem(request: pytest.FixtureRequest) -> PairProblem:
    name, dtype = request.param
    return PROBLEMS[name](dtype)


def gamma(of: Any, x: Tensor, y: Tensor, scale: Tensor, **options: Any) -> Tensor:
    log_weights = torch.linspace(-12, -2, len(x), dtype=scale.dtype, device=x.device)
    return of.gamma_contrastive(x, y, scale, log_weights, log_weights.flip(0), **options).loss


LOSSES: dict[str, Callable[..., Tensor]] = {
    "symmetric": lambda of, x, y, scale, **options: of.info_nce(x, y, scale, **options),
    "one_direction": lambda of, x, y, scale, **options: of.info_nce(x, y, scale, symmetric=False, **options),
    "nt_xent": lambda of, x, y, scale, **options: of.nt_xent(torch.cat([x, y]), scale, **options),
    "gamma": gamma,
}
each_loss = pytest.mark.parametrize("kind", LOSSES)
float32_and_bfloat16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
FUSED, STRIP = Shape(65, 65, 48), Shape(63, 63, 384)  # the two ways to gradients in 16 bits
each_form = pytest.mark.parametrize("shape", [FUSED, STRIP], ids=str)


def in_every_way_on_a_device(test: Callable[..., None]) -> Any:
    return needs_a_device(each_loss(each_form(float32_and_bfloat16(test))))


Leaves = tuple[Tensor, Tensor, Tensor]  # x, y, scale


def leaves(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Leaves:
    inputs = *towers(shape, dtype, seed=seed), scalar(20.0 + seed)
    x, y, scale = (t.to(DEVICE).requires_grad_() for t in inputs)
    return x, y, scale


def evaluate(kind: str, inputs: Leaves, backend: str | None = None) -> tuple[Tensor, ...]:
    """The loss and its gradients."""
    loss = LOSSES[kind](ct, *inputs, backend=backend)
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def assert_close(ours: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float | None = None) -> None:
    """By the largest entry. Without a tolerance: the same sums, of which atomic additions change the order."""
    for value, other in zip(ours, expected, strict=True):
        relative = 8 * torch.finfo(value.dtype).eps if tolerance is None else tolerance
        torch.testing.assert_close(value, other, rtol=0, atol=relative * other.abs().max().item())


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # of other sums, and of coefficients rounded to 16 bits


# Exactness


def dense_gamma(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits = scale.to(x.dtype) * (x @ y.T)
    log_weights = torch.linspace(-12, -2, len(x))
    rows, columns = logits + log_weights[:, None], logits + log_weights.flip(0)
    mass = sum(torch.where(t > 0, 1 + t, t.clamp(max=0).exp()) for t in (rows, columns)).mean() * len(x)
    return (mass - rows.diagonal().mean() - columns.diagonal().mean()) / 2 - 1


DENSE = {
    "symmetric": dense_torch_info_nce,
    "one_direction": partial(dense_torch_info_nce, symmetric=False),
    "nt_xent": lambda x, y, scale: dense_torch_nt_xent(torch.cat([x, y]), scale),
    "gamma": dense_gamma,
}


@needs_a_device
def test_automatic_choice_is_triton_and_eager_for_float64() -> None:
    chosen = [contextvars.Context().run(backends.resolve, None, DEVICE, dtype) for dtype in DTYPES]
    assert chosen == ["triton", "eager", "triton", "triton"]


@each_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [on_a_device(Shape(1, 1, 3)), FUSED, STRIP, on_a_device(Shape(1501, 1501, 512))], ids=str
)
def test_losses_are_as_exact_as_dense(kind: str, dtype: torch.dtype, shape: Shape) -> None:
    def ours(**inputs: Tensor) -> Tensor:
        return LOSSES[kind](ct, **{name: t.to(DEVICE) for name, t in inputs.items()}).cpu()

    x, y = towers(shape, dtype)
    inputs = {"x": x, "y": y, "scale": scalar(20.0, dtype)}
    truth = partial(LOSSES[kind], reference)
    assert_as_exact_as_dense(ours, DENSE[kind], truth, inputs, dense_dtype=accumulation(dtype))


def cut_to_tf32(values: Tensor) -> Tensor:
    """What a matrix unit reads of float32 operands: 10 bits of 23, the others cut off."""
    return (values.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def _tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.usefixtures("_tf32")
@pytest.mark.parametrize("name", ["plain", "groups", "self-triangular", "deep", "self-not-triangular"])
def test_float32_in_tf32_is_as_exact_as_its_operands(backend: OnDevice, name: str) -> None:
    """Within twice the error of float64 on operands and coefficients of 10 bits. Without TF32: the tests above."""
    problem = PROBLEMS[name](torch.float32)
    weights = given_weights(problem, **BOTH, function=CAPPED)

    def gradients(weights: Any) -> dict[str, Tensor]:
        return grad_results(backend.pair_grad(problem, weights, GradNeeds(True, True, True)), problem.self_similarity)

    sweeps = [
        (stats_results(backend.pair_stats(problem, columns=True)), lambda dense: dense.stats(True)),
        (gradients(weights), lambda dense: dense.given(weights)),
        (gradients(SoftmaxWeights(columns=False)), lambda dense: dense.softmax(False)),
    ]
    x, y, scale = problem.anchors, problem.candidates, problem.scale.double()
    exact = Dense(problem, x.double(), y.double(), scale)
    plain = Dense(problem, cut_to_tf32(x).double(), cut_to_tf32(y).double(), scale, stored=torch.float16)
    for ours, of in sweeps:
        truth, bar = of(exact), of(plain)
        for result, value in ours.items():
            allowed = 2 * error(bar[result], truth[result]) + 1e-5 * largest(truth[result])
            assert_at_most(value, truth[result], allowed, result)


def test_expanded_rows_of_16_bits_are_read_as_equal_rows(backend: OnDevice) -> None:
    """Rows that are no bytes apart, where tensor descriptors would take others."""
    problem = PROBLEMS["plain"](torch.bfloat16)
    problem = dataclasses.replace(problem, candidates=problem.candidates[:1].expand(65, -1))
    stats = stats_results(backend.pair_stats(problem, columns=True))
    dense_sweeps.assert_sweep(problem, stats, lambda dense: dense.stats(True))


@each_loss
@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, on_a_device(torch.bfloat16)], ids=str)
def test_nan_in_gives_nan_out(kind: str, shape: Shape, dtype: torch.dtype) -> None:
    x, y, scale = leaves(shape, dtype)
    with torch.no_grad():
        x[17, 1] = torch.nan
    loss, dx, dy, dscale = evaluate(kind, (x, y, scale))
    assert loss.isnan()
    assert dscale.isnan()
    assert dx[17].isnan().all()
    assert dy[17].isnan().all()
    rows = LOSSES[kind](ct, x, y, scale, reduction="none")
    assert rows[17].isnan()


STRUCTURE: dict[str, Callable[..., Tensor]] = {
    "bridge": lambda v, t, v_aug, t_aug: structure.brownian_bridge(v_aug, v, t, time=0.3) + 0 * t_aug.sum(),
    "separation": lambda v, t, v_aug, t_aug: structure.feature_separation(v, t, v_aug, t_aug, t_aug, v_aug, scale=10.0),
    "geometry": lambda v, t, v_aug, t_aug: structure.geometric_consistency(v, t, v_aug, t_aug),
    "four-way": lambda v, t, v_aug, t_aug: structure.four_way_contrastive(v, t, v_aug, t_aug, 10.0),
}


@pytest.mark.parametrize("kind", STRUCTURE)
@float32_and_bfloat16
def test_structure_is_what_float64_on_a_processor_gives(kind: str, dtype: torch.dtype) -> None:
    rows = [t for seed in (0, 2) for t in towers(Shape(130, 130, 96), dtype, seed=seed)]

    def gradients(rows: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.requires_grad_() for t in rows]
        loss = STRUCTURE[kind](*leaves)
        return loss.detach().double().cpu(), *(g.double().cpu() for g in torch.autograd.grad(loss, leaves))

    ours = gradients([t.to(DEVICE) for t in rows])
    with ct.use_backend("eager"):
        assert_close(ours, gradients([t.double() for t in rows]), TOLERANCE[dtype])


# Determinism


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@each_loss
@pytest.mark.parametrize("shape", [Shape(130, 130, 33), STRIP, on_a_device(Shape(2001, 2001, 96))], ids=str)
@float32_and_bfloat16
def test_thirty_runs_are_equal_bit_for_bit(kind: str, shape: Shape, dtype: torch.dtype) -> None:
    inputs = leaves(shape, dtype)
    first = evaluate(kind, inputs)
    for _ in range(RUNS - 1):
        assert all(map(torch.equal, evaluate(kind, inputs), first))


# Compiled, captured, and on other streams


@each_loss
@float32_and_bfloat16
def test_compiled_equals_eager(kind: str, dtype: torch.dtype) -> None:
    """In CUDA graphs on a device: the first call warms up, the second records, further ones replay."""
    from torch._dynamo.utils import counters

    counters.clear()
    torch.compiler.reset()
    how: dict[str, Any] = {"backend": "aot_eager"} if INTERPRETING else {"mode": "reduce-overhead"}

    @torch.compile(fullgraph=True, **how)
    def step(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return LOSSES[kind](ct, x, y, scale)

    for seed in range(2 if INTERPRETING else 4):
        inputs = leaves(FUSED, dtype, seed)
        torch.compiler.cudagraph_mark_step_begin()
        loss = step(*inputs)
        ours = [t.clone() for t in (loss.detach(), *torch.autograd.grad(loss, inputs))]
        assert_close(ours, evaluate(kind, inputs))
    assert counters["inductor"]["cudagraph_skips"] == 0


@in_every_way_on_a_device
def test_a_replayed_graph_gives_what_calls_give(kind: str, shape: Shape, dtype: torch.dtype) -> None:
    inputs = leaves(shape, dtype)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # compiles, and makes what the vendor's library keeps
            evaluate(kind, inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(kind, inputs)
    for seed in (1, 2, 3):
        fresh = leaves(shape, dtype, seed)
        with torch.no_grad():
            for held, value in zip(inputs, fresh, strict=True):
                held.copy_(value)
        graph.replay()
        assert_close(captured, evaluate(kind, fresh))


@in_every_way_on_a_device
def test_work_goes_to_the_current_stream(kind: str, shape: Shape, dtype: torch.dtype) -> None:
    """The inputs come late, and are NaN until then: work on another stream would not see them."""
    inputs = leaves(shape, dtype)
    expected = evaluate(kind, inputs)
    x, y, scale = (torch.full_like(t, torch.nan).requires_grad_() for t in inputs)
    torch.cuda.synchronize()
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        torch.cuda._sleep(100_000_000)  # cycles
        with torch.no_grad():
            for held, value in zip((x, y, scale), inputs, strict=True):
                held.copy_(value)
        found = evaluate(kind, (x, y, scale))
    aside.synchronize()
    assert_close(found, expected)


@pytest.fixture
def forbid_waiting() -> Iterator[Callable[[], None]]:
    yield partial(torch.cuda.set_sync_debug_mode, "error")
    torch.cuda.set_sync_debug_mode("default")


@in_every_way_on_a_device
def test_nothing_waits_for_the_device(kind: str, shape: Shape, dtype: torch.dtype, forbid_waiting) -> None:
    inputs = leaves(shape, dtype)
    evaluate(kind, inputs)  # compiles, which may wait
    forbid_waiting()
    loss, *_ = evaluate(kind, inputs)
    with pytest.raises(RuntimeError, match="synchroniz"):
        loss.item()


@needs_a_device
@pytest.mark.parametrize("mode", ["mixed", "lagged"])
def test_training_with_the_gamma_loss_waits_for_nothing(mode: str, forbid_waiting) -> None:
    loss = ct.GammaContrastiveLoss(1000, mode=mode, shape=2.0, learnable_scale=True).to(DEVICE)
    x, y, _ = leaves(FUSED, torch.float32)
    index = torch.arange(len(x), device=DEVICE)
    loss(x, y, index).backward()
    forbid_waiting()
    loss(x, y, index).backward()


@needs_a_device
@each_form
@float32_and_bfloat16
def test_tuned_plans_change_nothing_but_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device_backend: str, shape: Shape, dtype: torch.dtype
) -> None:
    if device_backend != "triton":
        pytest.skip("has no plans to tune")
    from contrastile.backends import triton_tuning

    inputs = leaves(shape, dtype)
    expected = evaluate("symmetric", inputs)
    monkeypatch.setenv("CONTRASTILE_AUTOTUNE", "1")
    monkeypatch.setenv("CONTRASTILE_CACHE_DIR", str(tmp_path))
    triton_tuning._known_plans.cache_clear()
    for _ in range(2):  # measures, and then knows
        assert_close(evaluate("symmetric", inputs), expected, TOLERANCE[dtype])
    triton_tuning._known_plans.cache_clear()
    assert list(tmp_path.glob("plans-*.json"))


# Memory


@needs_a_device
@each_loss
@float32_and_bfloat16
def test_extra_memory_at_16384_rows_is_as_promised_and_results_are_those_of_eager(kind: str, dtype) -> None:
    inputs = leaves(Shape(16384, 16384, 64), dtype)
    evaluate(kind, inputs)  # compiles, and makes what the vendor's library keeps
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = evaluate(kind, inputs)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in ours)
    assert_close(ours, evaluate(kind, inputs, backend="eager"), TOLERANCE[dtype])
    assert extra <= PROMISE_MIB * 2**20, f"{extra / 2**20:.1f} MiB beyond inputs, loss and gradients"
