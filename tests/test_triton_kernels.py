"""Every Triton kernel in Triton's interpreter, over every mask, dtype and odd size, between guards of NaN.

Only with TRITON_INTERPRET=1; tests/test_triton_interpreter.py starts such a run. The interpreter reads and writes past
the end of a tensor without a word, so everything that a kernel is given lies between guards here: NaN around numbers,
valid ids and columns around ids and columns. Memory that is to be overwritten holds NaN beforehand.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from contrastile.pairs import GivenWeights, GradNeeds, PairProblem, SoftmaxWeights
from dense_sweeps import (
    BOTH,
    CAPPED,
    DIRECTIONS,
    EXPONENTIAL,
    PROBLEMS,
    Dense,
    assert_sweep,
    given_weights,
    grad_results,
    regime,
    stats_results,
    two_towers,
)
from support import BACKENDS_HERE, INTERPRETING, Shape, ids, permutation, small_workspace
from torch import Tensor
from torch.overrides import TorchFunctionMode

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="test_triton_interpreter.py runs these")
if "triton" in BACKENDS_HERE:
    from contrastile.backends import triton
    from contrastile.backends.tiled import gradients as tiled_gradients
    from contrastile.backends.tiled import sweeps as tiled_sweeps

ALL_NEEDS = GradNeeds(dx=True, dy=True, moment=True, stats=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FEWER_DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16]
PAD = 2048  # entries; a multiple of 16 bytes, and more than a tile reaches past the end of a row
SHAPES = [
    Shape(1, 1, 3),
    Shape(2, 63, 520),
    Shape(63, 2, 1),
    Shape(65, 65, 48),
    Shape(100, 257, 96),
    Shape(257, 100, 100),
    Shape(63, 65, 384),
    Shape(65, 257, 3),
    Shape(257, 1, 48),
    Shape(257, 257, 1),
    Shape(100, 100, 256),
]


def no_mask(shape: Shape) -> dict:
    return {}


def diagonal(shape: Shape) -> dict:
    return {"positives": torch.arange(shape.rows) % shape.cols}


def permuted(shape: Shape) -> dict:
    positives = permutation(shape.cols)[: shape.rows] if shape.rows <= shape.cols else ids(shape.rows, shape.cols)
    return {"positives": positives}


def groups(shape: Shape) -> dict:
    return permuted(shape) | {"row_groups": ids(shape.rows, 9), "col_groups": ids(shape.cols, 9)}


def own(shape: Shape) -> dict:
    return permuted(shape) | {"self_offset": -2}


def every_mask(shape: Shape) -> dict:
    return groups(shape) | {"self_offset": min(3, shape.cols - 1)}


MASKS = [no_mask, diagonal, permuted, groups, own, every_mask]


def cover(half: int) -> list:
    """Every mask with every other shape, in turn of the dtypes; all other combinations are slow."""
    cases = []
    for (i, shape), (j, mask), (k, dtype) in itertools.product(*map(enumerate, (SHAPES, MASKS, DTYPES))):
        marks = () if (i + j) % 2 == half and (i + j // 2) % 3 == k else pytest.mark.slow
        cases.append(pytest.param(shape, mask, dtype, marks=marks, id=f"{shape}-{mask.__name__}-{str(dtype)[6:]}"))
    return cases


# Guards


def guard_of(dtype: torch.dtype) -> float | int:
    return math.nan if dtype.is_floating_point else 7 if dtype == torch.int64 else 0


def between_guards(values: Tensor, guard: float | None = None) -> Tensor:
    guard = guard_of(values.dtype) if guard is None else guard
    storage = torch.full((values.numel() + 2 * PAD,), guard, dtype=values.dtype)
    inner = storage[PAD : PAD + values.numel()].view(values.shape)
    return inner.copy_(values)


def rows_between_guards(rows: Tensor) -> Tensor:
    """Guards beside every row as well."""
    wide = torch.full((len(rows), rows.shape[1] + 24), math.nan, dtype=rows.dtype)
    wide[:, 8 : 8 + rows.shape[1]] = rows
    return between_guards(wide)[:, 8 : 8 + rows.shape[1]]


def guarded(values):
    """A problem or weights whose tensors all lie between guards."""
    found = {}
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if isinstance(value, Tensor):
            found[field.name] = rows_between_guards(value) if value.dim() == 2 else between_guards(value)
    return dataclasses.replace(values, **found)


class Guards(TorchFunctionMode):
    """Within, new tensors lie between guards, empty ones hold NaN; `check` finds what was written outside of them.

    What is to be added to lies between negative zeros: even a zero that is added past the end changes those.
    """

    EMPTY = (torch.empty, torch.empty_like, Tensor.new_empty)
    ADDED_TO = (torch.zeros_like, Tensor.new_zeros)
    NEW = (*EMPTY, *ADDED_TO, Tensor.new_full)

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[Tensor] = []
        self.guards: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in self.NEW or not result.numel():
            return result
        is_added_to = function in self.ADDED_TO and result.dtype.is_floating_point
        inner = between_guards(result, guard=-0.0 if is_added_to else None)
        if function in self.EMPTY:
            inner.fill_(guard_of(inner.dtype))
        self.storages.append(inner._base)
        self.guards.append(self._outside(inner._base))
        return inner

    def check(self) -> None:
        for storage, guards in zip(self.storages, self.guards, strict=True):
            assert torch.equal(self._outside(storage), guards)

    @staticmethod
    def _outside(storage: Tensor) -> Tensor:
        """Bytes: of numbers, NaN is not equal to itself and both zeros are."""
        return torch.cat([storage[:PAD], storage[-PAD:]]).view(torch.uint8)


def run_guarded(sweep: Callable, *arguments, **options):
    guards = Guards()
    with guards:
        result = sweep(*map(guarded_if_dataclass, arguments), **options)
    guards.check()
    assert guards.storages
    return result


def guarded_if_dataclass(value):
    return guarded(value) if isinstance(value, PairProblem | GivenWeights) else value


# The sweeps

FORMS = ["fused", "fused-deterministic", "strip"]


@pytest.fixture
def use_form(monkeypatch):
    """use_form(name): one of the three ways to gradients, where the features allow it."""

    def choose(form: str) -> None:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: form == "fused-deterministic")
        if form == "strip":
            monkeypatch.setattr(triton.TritonKernels, "fused_plan", lambda kernels, problem, sums, capped: None)

    return choose


def assert_gradients(problem: PairProblem, weights, workspace: int = 2**26) -> None:
    with small_workspace(workspace):
        grads = run_guarded(triton.pair_grad, problem, weights, ALL_NEEDS)
    ours = grad_results(grads, problem.self_similarity)
    if isinstance(weights, SoftmaxWeights):
        assert_sweep(problem, ours, lambda dense: dense.softmax(weights.columns))
        columns = weights.columns
    else:
        assert_sweep(problem, ours, lambda dense: dense.given(weights))
        columns = weights.col_shift is not None
    assert_sweep(problem, stats_results(grads.stats), lambda dense: dense.stats(columns))


@pytest.mark.parametrize(("shape", "mask", "dtype"), cover(half=0))
def test_statistics_are_exact_and_touch_nothing_else(shape, mask, dtype):
    problem = two_towers(shape, dtype, **mask(shape))
    stats = run_guarded(triton.pair_stats, problem, columns=True, ranks=problem.positives is not None)
    assert_sweep(problem, stats_results(stats), lambda dense: dense.stats(True))
    if problem.positives is not None:
        dense = Dense(problem, *(t.double() for t in (problem.anchors, problem.candidates, problem.scale)))
        above = dense.s - dense.s.gather(1, problem.positives[:, None])
        least, most = ((dense.negative & (above > margin)).sum(1) for margin in (1e-4, -1e-4))
        assert ((least <= stats.row_rank) & (stats.row_rank <= most)).all()


@pytest.mark.parametrize(("shape", "mask", "dtype"), cover(half=1))
def test_gradients_are_exact_and_touch_nothing_else(shape, mask, dtype, use_form):
    """Forms, directions and the cap in turn; the slow cases take them in another order."""
    problem = two_towers(shape, dtype, **mask(shape))
    turn = sum(shape) + MASKS.index(mask) + 2 * DTYPES.index(dtype)  # every form for every shape and dtype
    use_form(FORMS[turn % 3])
    for function in (CAPPED, EXPONENTIAL):
        assert_gradients(
            problem, given_weights(problem, **DIRECTIONS[(turn // 3 + (function is CAPPED)) % 3], function=function)
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FEWER_DTYPES, ids=str)
def test_every_form_takes_every_direction_and_all_masks(form, dtype, use_form):
    problem = two_towers(Shape(100, 257, 40), dtype, **every_mask(Shape(100, 257, 40)))
    use_form(form)
    for direction in DIRECTIONS:
        assert_gradients(problem, given_weights(problem, **direction, function=CAPPED))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FEWER_DTYPES, ids=str)
@pytest.mark.parametrize(("dx", "dy"), [(True, False), (False, True), (False, False)], ids=["dx", "dy", "sums"])
def test_a_side_that_is_not_asked_for_changes_nothing(form, dtype, dx, dy, use_form):
    problem = two_towers(Shape(65, 130, 33), dtype, **every_mask(Shape(65, 130, 33)))
    weights = given_weights(problem, **BOTH, function=CAPPED)
    use_form(form)
    every = grad_results(triton.pair_grad(problem, weights, ALL_NEEDS), False)
    tolerance = 2 * max(
        torch.finfo(dtype).eps, 5e-6
    )  # coefficients on the edge of two 16-bit numbers may round to either
    for name, value in grad_results(run_guarded(triton.pair_grad, problem, weights, GradNeeds(dx, dy)), False).items():
        allowed = tolerance * every[name].abs().max().item()
        torch.testing.assert_close(value, every[name], rtol=tolerance, atol=allowed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "symmetric"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_gradients_are_exact(form, columns, dtype, use_form):
    problem = two_towers(Shape(100, 100, 33), dtype, **groups(Shape(100, 100, 33)))
    use_form(form)
    assert_gradients(problem, SoftmaxWeights(columns))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [pytest.param("several-tiles", marks=pytest.mark.slow), "self-triangular-258"])
def test_windows_of_a_small_workspace_are_put_in_their_places(name, dtype):
    problem = PROBLEMS[name](dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled_sweeps, "MOST_PAIRS", 1)
        patch.setattr(tiled_gradients, "MOST_PAIRS", 1)
        stats = run_guarded(triton.pair_stats, problem, columns=True)
        assert_sweep(problem, stats_results(stats), lambda dense: dense.stats(True))
        assert_gradients(problem, given_weights(problem, **BOTH, function=CAPPED))
        patch.setattr(triton.TritonKernels, "fused_plan", lambda kernels, problem, sums, capped: None)
        assert_gradients(problem, given_weights(problem, **BOTH, function=CAPPED), workspace=2**15)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_several_windows_are_put_in_their_places(form, use_form, monkeypatch):
    """Windows as small as they can be: four, of 128 columns or rows at most."""
    shape = Shape(150, 200, 16)
    problem = two_towers(shape, torch.float16, **every_mask(shape))
    monkeypatch.setattr(tiled_gradients, "MOST_PAIRS", 1)
    use_form(form)
    assert_gradients(problem, given_weights(problem, **BOTH, function=CAPPED))


# One direction in one sweep


@pytest.fixture
def one_direction(monkeypatch, use_form):
    """Strips of whole rows, however few rows they have; counts their sweeps."""
    use_form("strip")
    monkeypatch.setattr(tiled_gradients, "FEWEST_WHOLE_ROWS", 1)
    sweep, calls = tiled_sweeps.one_direction_sweep, []
    monkeypatch.setattr(tiled_sweeps, "one_direction_sweep", lambda *arguments: calls.append(1) or sweep(*arguments))
    return calls


@pytest.mark.parametrize("mask", [permuted, groups, every_mask])
@pytest.mark.parametrize("small", [False, True], ids=["one-strip", "several-strips"])
def test_one_direction_in_one_sweep_is_exact(mask, small, one_direction):
    shape = Shape(257, 100, 33) if mask is permuted else Shape(257, 63, 48)
    workspace = 2 * 4 * shape.cols * 130 if small else 2**26  # 128 rows fit into the strip, or all
    problem = two_towers(shape, torch.float32, **mask(shape))
    assert_gradients(problem, SoftmaxWeights(columns=False), workspace)
    assert one_direction == [1]


@pytest.mark.parametrize("name", ["all-negative", "dominating", "duplicates", "huge-scale", "unnormalised"])
def test_one_direction_repairs_shifts_that_were_guessed_badly(name, one_direction):
    assert_gradients(regime(name, torch.float32), SoftmaxWeights(columns=False))
    assert one_direction == [1]


def test_one_direction_with_many_features_needs_no_prompting(monkeypatch):
    monkeypatch.setattr(tiled_sweeps, "pair_stats", None)
    assert_gradients(PROBLEMS["deep"](torch.float32), SoftmaxWeights(columns=False))


def test_a_guess_that_overflows_is_repaired(one_direction):
    """The positive's logit lies 200 below the row's largest: exp(200) is infinite in float32."""
    problem = two_towers(Shape(65, 65, 48), torch.float32, positives=torch.arange(65))
    x = problem.anchors
    y = x.roll(1, 0).clone()
    problem = dataclasses.replace(problem, candidates=y, scale=torch.full((65,), 200.0))
    assert_gradients(problem, SoftmaxWeights(columns=False))


# Determinism, and a product in a single step


@pytest.mark.parametrize("depth", [16, 33, 64])
def test_a_product_of_a_single_step_over_the_features_is_right(depth):
    """Reported of Triton: an accumulator of a loop that runs once was wrong. BLOCK_DEPTH is at least D here."""
    problem = two_towers(Shape(65, 130, depth), torch.float32, positives=torch.arange(65))
    stats = run_guarded(triton.pair_stats, problem, columns=True)
    assert_sweep(problem, stats_results(stats), lambda dense: dense.stats(True))


def test_the_deterministic_form_adds_nothing_atomically(monkeypatch, use_form):
    from contrastile.kernels import gradient

    def refuse(*arguments, **options):
        raise AssertionError("an atomic addition")

    problem = two_towers(Shape(65, 65, 8), torch.float32, positives=torch.arange(65))
    weights = given_weights(problem, **BOTH, function=CAPPED)
    monkeypatch.setattr(gradient.tl, "atomic_add", refuse)
    with pytest.raises(Exception, match="an atomic addition"):
        triton.pair_grad(problem, weights, ALL_NEEDS)
    use_form("fused-deterministic")
    assert_gradients(problem, weights)
