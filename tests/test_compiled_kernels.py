"""Triton kernels as they compile for every target: within the chip, without spills, by the instructions wanted.

A covering subset; `make kernels-full` compiles every configuration that the launcher can pick.
"""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton")

import torch
from contrastile.__main__ import main
from contrastile.backends import triton_launches
from contrastile.backends.triton_launches import TritonSweep, launch_options
from contrastile.bench.static import checks
from contrastile.bench.static.bounds import Traits
from contrastile.bench.static.launches import bound, compiled, traits
from contrastile.bench.static.matrix import (
    AROUND,
    DEPTHS,
    FUSED,
    FUSED_DEPTHS,
    ONE_DIRECTION,
    SWEEPS,
    TARGETS,
    Configuration,
    all_configurations,
    covering_configurations,
)
from contrastile.kernels.plans import MOST_FUSED_FEATURES, TilePlan, gradient_plan, tile_plan
from contrastile.pairs import PairProblem
from support import INTERPRETING

needs_compiler = pytest.mark.skipif(INTERPRETING, reason="kernels are interpreted in this process, not compiled")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("configuration", list(covering_configurations()), ids=str)
def test_kernel_compiles_within_the_chip_by_the_instructions_wanted(configuration):
    assert checks.faults_of(configuration) == []


def test_the_matrix_has_every_target_sweep_depth_and_dtype():
    configurations = list(all_configurations())
    assert len(configurations) == len(set(configurations))
    combinations = {(c.target, c.sweep, c.depth, c.dtype, c.precision) for c in configurations if c.aligned}
    for target in TARGETS:
        for sweep in SWEEPS:
            for depth in DEPTHS:
                for dtype, precision in (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")):
                    assert (target, sweep, depth, dtype, precision) in combinations


@pytest.mark.parametrize("target", TARGETS)
def test_the_matrix_has_every_kernel_that_the_launcher_starts(target):
    configurations = list(all_configurations((target,)))
    kernels = {"statistics", "gradient", "fused", "positives", "merge", "rows", "bridge", "dots", "softmax"}
    assert {c.kernel for c in configurations} == kernels
    sweeps = {(c.sweep, c.dtype) for c in configurations}
    assert {(sweep, "bf16") for sweep in AROUND} <= sweeps
    assert {(sweep, "fp32") for sweep in ONE_DIRECTION} <= sweeps
    fused = {(c.sweep, c.dtype, c.depth) for c in configurations if c.kernel == "fused"}
    for depth in FUSED_DEPTHS if target != "sm_80" else FUSED_DEPTHS[:1]:
        for dtype in ("bf16", "fp16"):
            assert {(form, dtype, depth) for form in FUSED} <= fused
    assert not any(dtype == "fp32" for _, dtype, _ in fused)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["gradient capped", "gradient groups", "gradient ceilings", "statistics ranks"])
def test_the_matrix_has_every_kind_of_launch_with_descriptors_and_pointers(target, kind):
    found = {(c.dtype, c.precision, c.aligned) for c in all_configurations((target,)) if c.sweep == kind}
    assert found >= {("bf16", "ieee", True), ("bf16", "ieee", False), ("fp32", "tf32", True), ("fp32", "ieee", True)}


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("target", [*TARGETS, "interpreter"])
@pytest.mark.parametrize("bits", [16, 32])
def test_every_launch_has_a_plan_and_takes_pointers_where_descriptors_do_not_fit(sweep, target, bits):
    for depth in (1, 24, 512):
        for crowded in (False, True):
            assert tile_plan(sweep, target, bits, depth, True, crowded).block_depth >= 16
            assert not tile_plan(sweep, target, bits, depth, False, crowded).descriptors


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("depth", [1, 24, 64, 65, MOST_FUSED_FEATURES])
@pytest.mark.parametrize("crowded", [False, True])
def test_a_fused_plan_reads_all_features_at_once(target, depth, crowded):
    plan = gradient_plan(target, 16, depth, True, crowded)
    if (target == "sm_100" and crowded) or (target == "sm_80" and depth > 64):
        assert plan is None  # no tile holds all sums without spilling, or a strip serves better
    else:
        assert plan is not None
        assert depth <= plan.block_depth < 2 * max(depth, 16)
    assert gradient_plan(target, 16, depth, False, crowded) is None  # rows that start anywhere: the strip
    assert gradient_plan(target, 16, MOST_FUSED_FEATURES + 1, True, crowded) is None
    assert gradient_plan(target, 32, depth, True, crowded) is None


def test_every_launch_asks_for_the_fusion_of_multiplications_and_additions(monkeypatch):
    monkeypatch.setattr(triton_launches, "_target", lambda device: "sm_90")
    given = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **options: given.update(options)

    problem = PairProblem(torch.ones(3, 8), torch.ones(5, 8), torch.ones(3))
    TritonSweep(problem, TilePlan(64, 32, 16, 1, 4, 2, False))._launch(Kernel(), 1)
    assert launch_options(4, 2).items() <= given.items()
    assert given["enable_fp_fusion"] is True


@needs_compiler
def test_every_kind_of_fault_is_found():
    configuration = next(iter(covering_configurations()))
    kernel, seen, found = compiled(configuration), traits(configuration), bound(configuration)
    assert checks.faults_of(configuration) == []
    poor = dataclasses.replace(kernel, spilled=8, registers=256, shared=200 * 1024, tensor_memory=4)
    over = checks._over_limits(configuration, poor, dataclasses.replace(seen, blocks=0))
    assert [fault.split()[0] for fault in over] == ["spills", "256", "204800", "4", "not"]
    slow = dataclasses.replace(seen, kind="fma", vector=4, asynchronous="")
    assert checks._wrong_products(configuration, slow) == ["products by fma, expected mma.sync"]
    assert checks._slow_loads(configuration, slow) == [
        "loads of 4 bytes, expected 16",
        "no cp.async into shared memory",
    ]
    assert checks._few_exponentials(0, 16384) == ["0 exponentials of the special unit, expected 16384"]
    late = dataclasses.replace(found, stages=1)
    assert checks._late_loads(configuration, late) == ["1 stages of loads, expected 2"]


def test_no_loads_are_missed_where_there_is_nothing_to_load_ahead():
    unaligned = Configuration("sm_90", "statistics", "bf16", 512, aligned=False)
    assert checks._slow_loads(unaligned, Traits("wgmma", 2, "", 16384, 1)) == []
    merge = Configuration("sm_90", "merge", "bf16", 512)  # 256 entries for 4 warps
    assert checks._slow_loads(merge, Traits("fma", 8, "", 512, 8)) == []
    assert checks._slow_loads(merge, Traits("fma", 4, "", 512, 8)) == ["loads of 4 bytes, expected 8"]


@needs_compiler
def test_doctor_prints_bounds_of_kernels(capsys, monkeypatch):
    from contrastile.bench.static import report

    monkeypatch.setattr(report, "covering_configurations", lambda: iter([next(iter(covering_configurations()))]))
    assert main(["doctor", "--kernels"]) == 0
    printed = capsys.readouterr().out
    assert "peak_share" in printed
    assert "mma.sync" in printed
    assert "a bound, no prediction" in printed
