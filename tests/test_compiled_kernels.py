"""Triton kernels as they compile for every target: within the chip, without spills, by the instructions wanted.

A covering subset; `make kernels-full` compiles every configuration that the launcher can pick.
"""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton")

from contrastile.__main__ import main
from contrastile.bench.static import checks
from contrastile.bench.static.matrix import (
    DEPTHS,
    SWEEPS,
    TARGETS,
    all_configurations,
    bound,
    compiled,
    covering_configurations,
)
from support import INTERPRETING

needs_compiler = pytest.mark.skipif(INTERPRETING, reason="kernels are interpreted in this process, not compiled")

# Both terms, both masses and the statistics of both sides beside a tile of 64 x 128: more than 255 registers.
SPILLING = {"sm_90 gradient capped fp16 D=512"}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("configuration", list(covering_configurations()), ids=str)
def test_kernel_compiles_within_the_chip_by_the_instructions_wanted(configuration):
    faults = checks.faults_of(configuration)
    if faults and str(configuration) in SPILLING and all(fault.startswith("spills") for fault in faults):
        pytest.xfail(faults[0])
    assert faults == []


def test_the_matrix_has_every_target_sweep_depth_and_dtype():
    configurations = list(all_configurations())
    assert len(configurations) == len(set(configurations))
    combinations = {(c.target, c.sweep, c.depth, c.dtype, c.precision) for c in configurations if c.aligned}
    for target in TARGETS:
        for sweep in SWEEPS:
            for depth in DEPTHS:
                for dtype, precision in (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")):
                    assert (target, sweep, depth, dtype, precision) in combinations


@needs_compiler
def test_every_kind_of_fault_is_found():
    configuration = next(iter(covering_configurations()))
    kernel, found = compiled(configuration), bound(configuration)
    poor = dataclasses.replace(kernel, spilled=8, registers=256, shared=200 * 1024)
    over = checks._over_limits(configuration, poor, dataclasses.replace(found, blocks=0))
    assert [fault.split()[0] for fault in over] == ["spills", "256", "204800", "not"]
    slow = dataclasses.replace(
        found, kind="fma", vector=4, asynchronous="", work=dataclasses.replace(found.work, exponentials=0)
    )
    found_slow = checks._slow_instructions(configuration, slow)
    assert [fault.split(",")[0] for fault in found_slow] == [
        "products by fma",
        "0 exponentials of the special unit for 16384 pairs",
        "loads of 4 bytes",
        "no cp.async into shared memory",
    ]


@needs_compiler
def test_doctor_prints_bounds_of_kernels(capsys, monkeypatch):
    from contrastile.bench.static import report

    monkeypatch.setattr(report, "covering_configurations", lambda: iter([next(iter(covering_configurations()))]))
    assert main(["doctor", "--kernels"]) == 0
    printed = capsys.readouterr().out
    assert "peak_share" in printed
    assert "mma.sync" in printed
    assert "a bound, no prediction" in printed
