"""pair_stats and pair_grad of every backend against C built densely in float64 from the definitions in pairs.py.

The bar is twice the error of the same dense construction in the dtype that sums are accumulated in.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from contrastile.distributed.member import Member
from contrastile.distributed.plans import GatherPlan, RingPlan
from contrastile.distributed.sweeps import GroupSweeps
from contrastile.pairs import GivenWeights, GradNeeds, PairProblem, SoftmaxWeights
from dense_sweeps import (
    BOTH,
    CAPPED,
    DIRECTIONS,
    EXPONENTIAL,
    PROBLEMS,
    SIGMOID,
    Dense,
    assert_sweep,
    given_weights,
    grad_results,
    lonely_rows,
    regime,
    stats_results,
    two_towers,
)
from support import BACKENDS_HERE, Shape, assert_at_most, ids, permutation, small_workspace, sweeps_of
from torch import Tensor, distributed

ALL_NEEDS = GradNeeds(dx=True, dy=True, moment=True, stats=True)

NARROW = ["plain", "groups-and-self", "ceilings", "self-triangular", "tall-no-positives", "deep"]
CASES = [(name, torch.float32) for name in PROBLEMS]
CASES += [(name, dtype) for name in NARROW for dtype in (torch.float64, torch.float16, torch.bfloat16)]
CASE_IDS = [f"{name}-{str(dtype)[6:]}" for name, dtype in CASES]


@pytest.fixture(params=BACKENDS_HERE)
def backend(request):
    return sweeps_of(request.param)


@pytest.fixture(params=CASES, ids=CASE_IDS)
def problem(request) -> PairProblem:
    name, dtype = request.param
    return PROBLEMS[name](dtype)


# The sweeps


def test_stats_are_as_exact_as_dense(backend, problem):
    for columns in (False, True):
        ours = stats_results(backend.pair_stats(problem, columns=columns))
        assert_sweep(problem, ours, lambda dense, columns=columns: dense.stats(columns))


def test_logits_of_positives_are_as_exact_as_dense(backend, problem):
    if problem.positives is None:
        pytest.skip("has no positives")
    ours = {"positive_logit": backend.positive_logits(problem)}
    assert_sweep(problem, ours, lambda dense: {"positive_logit": dense.stats(False)["positive_logit"]})


def test_sums_of_rows_without_negatives_are_zero(backend):
    problem = lonely_rows(torch.float32)
    stats = backend.pair_stats(problem, columns=True)
    assert (stats.row_max[:10] == -math.inf).all()
    assert (stats.row_sum[:10] == 0).all()
    assert stats.row_max[10:].isfinite().all()
    grads = backend.pair_grad(problem, SoftmaxWeights(columns=False), ALL_NEEDS)
    assert (grads.dx[:10] == 0).all()
    assert (grads.row_moment[:10] == 0).all()
    alone = PROBLEMS["one-by-one"](torch.float32)
    grads = backend.pair_grad(alone, SoftmaxWeights(columns=True), ALL_NEEDS)
    assert (grads.dx == 0).all()
    assert (grads.dy == 0).all()


@pytest.mark.parametrize("function", [EXPONENTIAL, CAPPED], ids=["exp", "cap"])
def test_given_weights_are_as_exact_as_dense(backend, problem, function):
    for direction in [BOTH] if problem.self_similarity else DIRECTIONS:
        weights = given_weights(problem, **direction, function=function)
        grads = backend.pair_grad(problem, weights, ALL_NEEDS)
        ours = grad_results(grads, problem.self_similarity)
        assert_sweep(problem, ours, lambda dense, weights=weights: dense.given(weights))
        columns = direction["columns"]
        assert_sweep(problem, stats_results(grads.stats), lambda dense, columns=columns: dense.stats(columns))


def test_softmax_weights_are_as_exact_as_dense(backend, problem):
    if problem.positives is None:
        pytest.skip("a softmax loss has positives")
    bijective = problem.rows == problem.cols == len(problem.positives.unique())
    for columns in (False, True) if bijective and not problem.self_similarity else (False,):
        grads = backend.pair_grad(problem, SoftmaxWeights(columns=columns), ALL_NEEDS)
        ours = grad_results(grads, problem.self_similarity)
        assert_sweep(problem, ours, lambda dense, columns=columns: dense.softmax(columns))
        assert_sweep(problem, stats_results(grads.stats), lambda dense, columns=columns: dense.stats(columns))


@pytest.mark.parametrize("name", ["plain", "groups-and-self", "self-triangular"])
@pytest.mark.parametrize("weighting", ["given", "softmax"])
def test_only_what_is_needed_is_given_and_its_value_does_not_depend_on_the_rest(backend, name, weighting):
    problem = PROBLEMS[name](torch.float32)
    weights = SoftmaxWeights(columns=False)
    if weighting == "given":
        weights = given_weights(problem, rows=True, columns=problem.self_similarity, function=CAPPED)
    every = backend.pair_grad(problem, weights, ALL_NEEDS)
    for bits in range(16):
        needs = GradNeeds(dx=bool(bits & 1), dy=bool(bits & 2), moment=bool(bits & 4), stats=bool(bits & 8))
        grads = backend.pair_grad(problem, weights, needs)
        asked = {"dx": needs.dx, "dy": needs.dy and not problem.self_similarity, "row_moment": needs.moment}
        for field, wanted in asked.items():
            value, full = getattr(grads, field), getattr(every, field)
            assert (value is not None) == wanted, (field, needs)
            if wanted:
                torch.testing.assert_close(value, full, rtol=1e-5, atol=1e-5 * full.abs().max().item())
        assert (grads.stats is not None) == (needs.stats or weighting == "softmax")
        assert (grads.row_mass is not None) == (weighting == "given")
        assert (grads.col_mass is not None) == (weighting == "given" and problem.self_similarity)


# Bounded workspace: several strips, and several column chunks in a strip


@pytest.mark.parametrize(
    "name", ["groups", "ceilings-and-groups", "self-triangular-700", "not-injective", "shard-last", "tall-no-positives"]
)
def test_a_small_workspace_changes_nothing_but_rounding(backend, name):
    problem = PROBLEMS[name](torch.float32)
    with small_workspace():
        assert_sweep(problem, stats_results(backend.pair_stats(problem, columns=True)), lambda d: d.stats(True))
        weights = given_weights(problem, **BOTH, function=CAPPED)
        ours = grad_results(backend.pair_grad(problem, weights, ALL_NEEDS), problem.self_similarity)
        assert_sweep(problem, ours, lambda dense: dense.given(weights))
        if problem.positives is not None:
            grads = backend.pair_grad(problem, SoftmaxWeights(columns=False), ALL_NEEDS)
            assert_sweep(problem, grad_results(grads, problem.self_similarity), lambda dense: dense.softmax(False))
            assert_sweep(problem, stats_results(grads.stats), lambda dense: dense.stats(False))


@pytest.mark.parametrize("shape", [Shape(300, 1025, 3), Shape(1030, 1030, 17)], ids=str)
def test_a_small_workspace_with_many_strips_and_column_chunks(backend, shape):
    columns = shape.rows == shape.cols
    masks = {"row_groups": ids(shape.rows, 50), "col_groups": ids(shape.cols, 50)}
    problem = two_towers(shape, torch.float32, positives=permutation(shape.cols)[: shape.rows], **masks)
    with small_workspace():
        grads = backend.pair_grad(problem, SoftmaxWeights(columns=columns), ALL_NEEDS)
    assert_sweep(problem, grad_results(grads, False), lambda dense: dense.softmax(columns))
    assert_sweep(problem, stats_results(grads.stats), lambda dense: dense.stats(columns))


# Ranks


@pytest.mark.parametrize("name", ["plain", "not-injective", "groups", "groups-and-self", "several-tiles", "deep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_are_exact_on_integers_where_ties_are_true_ties(backend, name, dtype):
    problem = PROBLEMS[name](dtype)
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-2, 3, problem.anchors.shape, generator=generator).to(dtype)
    y = x if problem.candidates is problem.anchors else torch.randint(
        -2, 3, problem.candidates.shape, generator=generator
    ).to(dtype)  # fmt: skip
    problem = dataclasses.replace(problem, anchors=x, candidates=y, scale=torch.full((problem.rows,), 2.0))
    dense = Dense(problem, x.double(), y.double(), problem.scale.double())
    positive = dense.s.gather(1, problem.positives[:, None])
    truth = (dense.negative & (dense.s > positive)).sum(1)
    assert torch.equal(backend.pair_stats(problem, ranks=True).row_rank, truth)
    assert torch.equal(backend.pair_stats(problem, columns=True, ranks=True).row_rank, truth)
    with small_workspace():
        assert torch.equal(backend.pair_stats(problem, ranks=True).row_rank, truth)


@pytest.mark.parametrize("where", ["anchors", "candidates"])
def test_nan_never_makes_a_positive_look_retrieved(backend, where):
    """A NaN counts as larger, and a row whose positive is NaN has rank M."""
    problem = PROBLEMS["groups"](torch.float32)
    getattr(problem, where)[17, 5] = math.nan
    dense = Dense(problem, problem.anchors.double(), problem.candidates.double(), problem.scale.double())
    positive = dense.s.gather(1, problem.positives[:, None])
    larger = (dense.negative & ~(dense.s <= positive)).sum(1)
    truth = torch.where(positive[:, 0].isnan(), problem.cols, larger)
    assert torch.equal(backend.pair_stats(problem, ranks=True).row_rank, truth)


# Regimes


REGIMES = ["tiny-scale", "huge-scale", "all-negative", "dominating", "duplicates", "unnormalised"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", REGIMES)
def test_regimes_are_as_exact_as_dense(backend, name, dtype):
    problem = regime(name, dtype)
    assert_sweep(problem, stats_results(backend.pair_stats(problem, columns=True)), lambda dense: dense.stats(True))
    grads = backend.pair_grad(problem, SoftmaxWeights(columns=False), ALL_NEEDS)
    assert_sweep(problem, grad_results(grads, False), lambda dense: dense.softmax(False))
    weights = given_weights(problem, **BOTH, function=CAPPED)
    ours = grad_results(backend.pair_grad(problem, weights, ALL_NEEDS), False)
    assert_sweep(problem, ours, lambda dense: dense.given(weights))


def test_cap_makes_overflow_impossible(backend):
    problem = regime("huge-scale", torch.float32)
    weights = given_weights(problem, **BOTH, function=CAPPED)
    weights = dataclasses.replace(weights, row_shift=weights.row_shift - 1e4, col_shift=weights.col_shift - 1e4)
    grads = backend.pair_grad(problem, weights, ALL_NEEDS)
    assert_sweep(problem, grad_results(grads, False), lambda dense: dense.given(weights))
    assert all(value.isfinite().all() for value in grad_results(grads, False).values())


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("highest", [93.0, 133.0])
def test_a_row_far_below_its_tile_keeps_its_softmax(backend, highest, dtype, columns):
    """Row and column 1 have logits of 0 alone, in a tile with one of 54 and with positives whose exp(-s) is nothing."""
    x, y = torch.eye(128), torch.eye(128)
    x[1, 1], x[2, 3] = 0.0, 54 / highest
    problem = PairProblem(x.to(dtype), y.to(dtype), torch.full((128,), highest), positives=torch.arange(128))
    grads = backend.pair_grad(problem, SoftmaxWeights(columns=columns), ALL_NEEDS)
    assert_sweep(problem, grad_results(grads, False), lambda dense: dense.softmax(columns))
    assert_sweep(problem, stats_results(grads.stats), lambda dense: dense.stats(columns))


@pytest.mark.parametrize("highest", [39.0, 79.0])
@pytest.mark.parametrize("direction", DIRECTIONS, ids=["rows", "columns", "both"])
def test_a_weight_near_overflow_stays_finite_beside_lower_shifts(backend, direction, highest):
    """exp(s - shift) is finite for the last row and column, exp(s - shift of their neighbours) is not."""
    x, y = torch.zeros(65, 1), torch.linspace(-1, 0.5, 70)[:, None]
    x[-1], y[-1] = 1.0, highest + 51
    row_shift, col_shift = torch.zeros(65), torch.zeros(70)
    row_shift[-1] = col_shift[-1] = highest
    rows, columns = direction["rows"], direction["columns"]
    weights = GivenWeights(
        row_shift=row_shift if rows else None,
        row_gain=torch.ones(65) if rows else None,
        col_shift=col_shift if columns else None,
        col_gain=torch.ones(70) if columns else None,
        positive_coeff=None,
        function=EXPONENTIAL,
    )
    problem = PairProblem(x, y, torch.ones(65))
    grads = backend.pair_grad(problem, weights, GradNeeds(dx=True, dy=True, moment=True, stats=False))
    ours = grad_results(grads, False)
    assert all(value.isfinite().all() for value in ours.values())
    assert_sweep(problem, ours, lambda dense: dense.given(weights))


def test_positive_coefficient_keeps_its_digits_when_the_model_is_confident(backend):
    """p - 1 from 1 - 1e-9 would be 0 in float32; minus the negative mass is exact."""
    x = torch.eye(8)
    problem = PairProblem(x, x.clone(), torch.full((8,), 22.0), positives=torch.arange(8))
    grads = backend.pair_grad(problem, SoftmaxWeights(columns=False), ALL_NEEDS)
    others = math.exp(-22.0) / (1 + 7 * math.exp(-22.0))
    truth = 22.0 * others * (1 - 8 * torch.eye(8, dtype=torch.float64))
    assert_at_most(grads.dx, truth, 4e-6 * truth.abs().max().item(), "dx")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", [CAPPED, SIGMOID], ids=["cap", "sigmoid"])
@pytest.mark.parametrize("depth", [16, 200])
def test_gains_of_zero_nan_and_infinity_reach_their_own_rows_alone(backend, depth, function, dtype):
    """One factor fits float16's coefficients into its range: it must come from gains that are finite and not 0."""
    problem = two_towers(Shape(40, 30, depth), dtype)
    for gain in (0.0, math.nan, math.inf):
        weights = given_weights(problem, rows=True, columns=False, function=function)
        weights.row_gain.mul_(0 if gain == 0 else 1)[7] = gain
        ours = grad_results(backend.pair_grad(problem, weights, GradNeeds(True, False, True, False)), False)
        if gain == 0:
            assert not ours["dx"].any()
            assert not ours["row_moment"].any()
            continue
        others = torch.arange(40) != 7
        assert not ours["dx"][7].isfinite().any()
        dense = Dense(problem, problem.anchors.double(), problem.candidates.double(), problem.scale.double())
        truth = dense.given(weights)["dx"][others]
        assert_at_most(ours["dx"][others], truth, 2e-2 * truth.abs().max().item(), "dx")


# Layouts and NaN. Features lie side by side in every problem that a backend is given; rows need not.


def layouts(x: Tensor) -> dict[str, Tensor]:
    rows, dim = x.shape
    wide = torch.full((rows, dim + 9), math.nan, dtype=x.dtype)
    wide[:, 4 : 4 + dim] = x
    every_third = torch.full((3 * rows, dim), math.nan, dtype=x.dtype)
    every_third[::3] = x
    return {
        "narrowed": wide[:, 4 : 4 + dim],
        "every-third-row": every_third[::3],
        "offset": torch.cat([torch.full((1,), math.nan, dtype=x.dtype), x.reshape(-1)])[1:].view(rows, dim),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["narrowed", "every-third-row", "offset"])
def test_layout_of_the_inputs_does_not_matter(backend, layout, dtype):
    problem = PROBLEMS["groups-and-self"](dtype)
    x, y = layouts(problem.anchors)[layout], layouts(problem.candidates)[layout]
    strided = dataclasses.replace(problem, anchors=x, candidates=y)
    assert_sweep(strided, stats_results(backend.pair_stats(strided, columns=True)), lambda dense: dense.stats(True))
    weights = given_weights(problem, **BOTH, function=CAPPED)
    for weighting, evaluate in (
        (weights, lambda dense: dense.given(weights)),
        (SoftmaxWeights(columns=False), lambda dense: dense.softmax(False)),
    ):
        grads = backend.pair_grad(strided, weighting, ALL_NEEDS)
        assert_sweep(strided, grad_results(grads, False), evaluate)


def between_others(vector: Tensor | None) -> Tensor | None:
    """A view of every second entry."""
    return None if vector is None else torch.stack([vector, vector.flip(0) + 1], 1).flatten()[::2]


VECTORS = ("scale", "positives", "row_groups", "col_groups", "row_ceiling")


@pytest.mark.parametrize("name", ["groups-and-self", "ceilings", "self-triangular"])
def test_layout_of_scales_ids_and_weights_does_not_matter(backend, name):
    problem = PROBLEMS[name](torch.float32)
    weights = given_weights(problem, **BOTH, function=CAPPED)
    strided = dataclasses.replace(problem, **{each: between_others(getattr(problem, each)) for each in VECTORS})
    fields = ("row_shift", "row_gain", "col_shift", "col_gain", "positive_coeff")
    views = dataclasses.replace(weights, **{each: between_others(getattr(weights, each)) for each in fields})
    expected = grad_results(backend.pair_grad(problem, weights, ALL_NEEDS), problem.self_similarity)
    found = grad_results(backend.pair_grad(strided, views, ALL_NEEDS), problem.self_similarity)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    one = dataclasses.replace(weights, positive_coeff=torch.full((problem.rows,), 0.5))
    expanded = dataclasses.replace(weights, positive_coeff=torch.tensor(0.5).expand(problem.rows))
    expected, found = (
        grad_results(backend.pair_grad(problem, each, ALL_NEEDS), problem.self_similarity) for each in (one, expanded)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", [GatherPlan, RingPlan])
@pytest.mark.parametrize("name", ["plain", "self-not-triangular"])
def test_layout_of_a_process_groups_blocks_does_not_matter(backend, name, plan):
    problem = PROBLEMS[name](torch.float32)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sweeps = GroupSweeps(plan(Member(distributed.group.WORLD), [problem.cols]), backend)
        for weights in (SoftmaxWeights(columns=True), given_weights(problem, **BOTH, function=CAPPED)):
            found = sweeps.pair_grad(problem, weights, ALL_NEEDS)
            expected = backend.pair_grad(problem, weights, ALL_NEEDS)
            for part in ("dx", "dy", "row_moment"):
                ours, truth = getattr(found, part), getattr(expected, part)
                torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item())
    finally:
        distributed.destroy_process_group()


def test_expanded_rows_are_read_as_equal_rows(backend):
    problem = PROBLEMS["plain"](torch.float32)
    problem = dataclasses.replace(problem, candidates=problem.candidates[:1].expand(65, -1))
    grads = backend.pair_grad(problem, SoftmaxWeights(columns=False), ALL_NEEDS)
    assert_sweep(problem, grad_results(grads, False), lambda dense: dense.softmax(False))


@pytest.mark.parametrize("where", ["anchors", "candidates"])
def test_nan_reaches_exactly_the_results_it_affects(backend, where):
    problem = PROBLEMS["plain"](torch.float32)
    getattr(problem, where)[17, 5] = math.nan
    dense = Dense(problem, problem.anchors.double(), problem.candidates.double(), problem.scale.double())
    stats = stats_results(backend.pair_stats(problem, columns=True))
    affected = dense.s.isnan() & dense.negative
    assert stats["row_lse"].isnan().equal(affected.any(1))
    assert stats["col_lse"].isnan().equal(affected.any(0))
    assert stats["positive_logit"].isnan().equal(torch.arange(65) == 17)
    for function in (EXPONENTIAL, CAPPED):
        weights = given_weights(PROBLEMS["plain"](torch.float32), rows=True, columns=False, function=function)
        ours = grad_results(backend.pair_grad(problem, weights, ALL_NEEDS), False)
        truth = dense.given(weights)
        for name in ("dx", "dy", "row_mass", "row_moment"):
            assert ours[name].isnan().equal(truth[name].isnan()), (name, function)
    ours = grad_results(backend.pair_grad(problem, SoftmaxWeights(columns=False), ALL_NEEDS), False)
    truth = dense.softmax(False)
    for name in ("dx", "dy", "row_moment"):
        assert ours[name].isnan().equal(truth[name].isnan()), name
