"""What every compiled kernel must keep to: the chip's limits, its matrix unit, its fast exponential, its wide loads."""

from __future__ import annotations

from contrastile.bench.static.bounds import Bound
from contrastile.bench.static.compile import Compiled
from contrastile.bench.static.matrix import Configuration, bound, compiled
from contrastile.bench.static.rates import LIMITS

MATRIX_INSTRUCTION = {
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_90": "wgmma",
    "sm_100": "tcgen05",
    "sm_120": "mma.sync",
    "gfx942": "mfma",
}
WIDEST_LOAD = 16  # bytes a lane


def faults_of(configuration: Configuration) -> list[str]:
    """What is wrong with a kernel, in words; raises RuntimeError where it does not compile."""
    kernel, found = compiled(configuration), bound(configuration)
    return [*_over_limits(configuration, kernel, found), *_slow_instructions(configuration, found)]


def _over_limits(configuration: Configuration, kernel: Compiled, found: Bound) -> list[str]:
    limits = LIMITS[configuration.target]
    faults = []
    if kernel.spilled:
        faults.append(f"spills {kernel.spilled} bytes a thread")
    if kernel.registers > limits.registers_a_thread:
        faults.append(f"{kernel.registers} registers a thread, of {limits.registers_a_thread}")
    if kernel.shared > limits.shared_a_block:
        faults.append(f"{kernel.shared} bytes of shared memory, of {limits.shared_a_block}")
    if not found.blocks:
        faults.append("not one block fits on a multiprocessor")
    return faults


def _slow_instructions(configuration: Configuration, found: Bound) -> list[str]:
    plan, faults = configuration.plan, []
    # Exact float32 products have no matrix unit on NVIDIA.
    is_exact = configuration.dtype == "fp32" and configuration.precision == "ieee"
    nvidia = configuration.target.startswith("sm_")
    expected = "fma" if is_exact and nvidia else MATRIX_INSTRUCTION[configuration.target]
    if found.kind != expected:
        faults.append(f"products by {found.kind}, expected {expected}")
    pairs = plan.block_rows * plan.block_cols
    if found.work.exponentials < pairs:
        faults.append(f"{found.work.exponentials:g} exponentials of the special unit for {pairs} pairs")
    # Unaligned rows can be read by the element only.
    if configuration.aligned:
        if found.asynchronous != "TMA" and found.vector < WIDEST_LOAD:
            faults.append(f"loads of {found.vector} bytes, expected {WIDEST_LOAD}")
        if nvidia and found.asynchronous != ("TMA" if plan.descriptors else "cp.async"):
            faults.append(f"no {'TMA' if plan.descriptors else 'cp.async'} into shared memory")
    return faults
