"""Measured plans: what is measured, when, and what is remembered. Times are made up: there is no device here."""

from __future__ import annotations

import json

import pytest
import torch
from contrastile.pairs import PairProblem
from dense_sweeps import assert_sweep, stats_results, two_towers
from support import INTERPRETING, Shape

pytest.importorskip("triton")

from contrastile.backends import triton_tuning
from contrastile.backends.triton_tuning import tuned
from contrastile.kernels.plans import TilePlan, neighbours, tile_plan
from triton.runtime.errors import OutOfResources

TABLE = tile_plan("statistics", "sm_90", 16, 512, True, crowded=False)
BEST = neighbours(TABLE)[2]


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """Plans in the order in which they were measured; BEST is the fastest."""
    measured: list[TilePlan] = []

    def seconds(run, plan):
        measured.append(plan)
        return 1.0 if plan == BEST else 2.0

    monkeypatch.setattr(triton_tuning, "_seconds", seconds)
    monkeypatch.setenv("CONTRASTILE_AUTOTUNE", "1")
    monkeypatch.setenv("CONTRASTILE_CACHE_DIR", str(tmp_path))
    triton_tuning._known_plans.cache_clear()
    yield measured
    triton_tuning._known_plans.cache_clear()


def problem(rows: int = 1000, cols: int = 1000, dtype: torch.dtype = torch.bfloat16) -> PairProblem:
    x, y = torch.empty(rows, 512, dtype=dtype), torch.empty(cols, 512, dtype=dtype)
    return PairProblem(x, y, torch.ones(rows))


def choose(of: PairProblem, sweep: str = "statistics") -> TilePlan:
    return tuned(sweep, of, TABLE, run=lambda plan: None)


def test_nothing_is_measured_unasked(clock, tmp_path, monkeypatch):
    for value in ("0", ""):
        monkeypatch.setenv("CONTRASTILE_AUTOTUNE", value)
        assert choose(problem()) == TABLE
    monkeypatch.delenv("CONTRASTILE_AUTOTUNE")
    assert choose(problem()) == TABLE
    assert not clock
    assert not list(tmp_path.iterdir())


def test_the_fastest_plan_serves_all_sizes_of_its_bucket(clock):
    assert choose(problem(1000, 1000)) == BEST
    assert clock == [TABLE, *neighbours(TABLE)]
    for rows, cols in ((1024, 1024), (513, 900), (777, 1000)):
        assert choose(problem(rows, cols)) == BEST
    assert len(clock) == 1 + len(neighbours(TABLE))


@pytest.mark.parametrize(
    ("other", "sweep"),
    [(problem(1025), "statistics"), (problem(cols=512), "statistics"), (problem(), "gradient")],
    ids=["rows", "columns", "sweep"],
)
def test_another_bucket_is_measured_by_itself(clock, other, sweep):
    choose(problem())
    clock.clear()
    choose(other, sweep)
    assert clock


def test_dtypes_and_precisions_are_told_apart():
    choose(problem())
    matmul, keys = torch.backends.cuda.matmul, set()
    before = matmul.allow_tf32
    try:
        for dtype, matmul.allow_tf32 in ((torch.bfloat16, True), (torch.float32, True), (torch.float32, False)):
            keys.add(triton_tuning._key("statistics", problem(dtype=dtype), TABLE))
    finally:
        matmul.allow_tf32 = before
    assert len(keys) == 3


def test_a_later_process_reads_what_was_measured(clock):
    choose(problem())
    triton_tuning._known_plans.cache_clear()
    clock.clear()
    assert choose(problem()) == BEST
    assert not clock


def test_two_processes_do_not_overwrite_each_other(clock, tmp_path):
    choose(problem())
    (file,) = tmp_path.iterdir()
    elsewhere = {"of another process": json.loads(file.read_text()).popitem()[1]}
    file.write_text(json.dumps(elsewhere))
    choose(problem(), "gradient")
    assert set(json.loads(file.read_text())) == {
        "of another process",
        "statistics bfloat16 D=512 N<=1024 M<=1024 descriptors",
        "gradient bfloat16 D=512 N<=1024 M<=1024 descriptors",
    }


@pytest.mark.parametrize("content", ["{", "[]", '{"key": {"block_rows": 1}}'])
def test_a_broken_file_is_told_of_and_measured_anew(clock, tmp_path, content):
    choose(problem())
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    triton_tuning._known_plans.cache_clear()
    clock.clear()
    with pytest.warns(UserWarning, match="will be measured anew"):
        assert choose(problem()) == BEST
    assert clock
    assert json.loads(file.read_text())


def test_a_place_that_cannot_be_written_is_told_of(clock, monkeypatch):
    def refuse(*paths):
        raise OSError("read-only")

    monkeypatch.setattr(triton_tuning.os, "replace", refuse)
    with pytest.warns(UserWarning, match="are not kept in .*read-only"):
        assert choose(problem()) == BEST


def test_nothing_is_measured_while_a_graph_is_captured(clock, monkeypatch):
    monkeypatch.setattr(triton_tuning, "_is_capturing", lambda device: True)
    assert choose(problem()) == TABLE
    assert not clock


def test_plans_without_room_are_passed_over():
    def run(plan):
        raise OutOfResources(2, 1, "shared memory")

    assert triton_tuning._seconds(run, TABLE) == float("inf")
    with pytest.raises(ZeroDivisionError):  # any other error is no matter of the plan
        triton_tuning._seconds(lambda plan: 1 // 0, TABLE)


def test_neighbours_differ_in_one_number():
    found = neighbours(TABLE)
    assert len(set(found)) == len(found)
    for plan in found:
        differing = [a for a, b in zip(vars(plan).items(), vars(TABLE).items(), strict=True) if a != b]
        assert len(differing) == 1


@pytest.mark.skipif(not INTERPRETING, reason="test_triton_interpreter.py runs this")
def test_sweeps_run_by_the_plan_that_was_measured(tmp_path, monkeypatch):
    from contrastile.backends import triton

    plans = []

    def seconds(run, plan):
        found = run(plan)
        plans.append(plan)
        assert_sweep(small, stats_results(found), lambda dense: dense.stats(True))
        return -plan.block_rows  # the highest tiles win

    small = two_towers(Shape(65, 100, 48), torch.float32)
    monkeypatch.setattr(triton_tuning, "_seconds", seconds)
    monkeypatch.setenv("CONTRASTILE_AUTOTUNE", "1")
    monkeypatch.setenv("CONTRASTILE_CACHE_DIR", str(tmp_path))
    triton_tuning._known_plans.cache_clear()
    try:
        ours = stats_results(triton.pair_stats(small, columns=True))
    finally:
        triton_tuning._known_plans.cache_clear()
    assert len(plans) > 4
    assert_sweep(small, ours, lambda dense: dense.stats(True))
