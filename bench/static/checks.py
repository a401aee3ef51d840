"""What every compiled kernel must keep to: the chip's limits, its matrix unit, its fast exponential, its wide loads,
and loads that are under way while it multiplies.
"""

from __future__ import annotations

from contrastile.backends.triton_launches import MERGE_BLOCK, ROW_OPTIONS, SOFTMAX_BLOCK
from contrastile.bench.static.bounds import Bound, Traits
from contrastile.bench.static.compile import Compiled
from contrastile.bench.static.launches import bound, compiled, traits
from contrastile.bench.static.matrix import WITHOUT_PRODUCTS, Configuration
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
FEWEST_STAGES = 2  # of embeddings: one that is multiplied, one on its way


def faults_of(configuration: Configuration) -> list[str]:
    """What is wrong with a kernel, in words; raises RuntimeError where it does not compile."""
    kernel, seen = compiled(configuration), traits(configuration)
    faults = [*_over_limits(configuration, kernel, seen), *_slow_loads(configuration, seen)]
    if configuration.kernel in WITHOUT_PRODUCTS:
        return [*faults, *_few_exponentials(seen.exponentials, _exponentials_of_merge(configuration))]
    faults += _wrong_products(configuration, seen)
    if configuration.is_bounded:
        found, plan = bound(configuration), configuration.plan
        faults += _few_exponentials(found.work.exponentials, plan.block_rows * plan.block_cols)
        faults += _late_loads(configuration, found)
    return faults


def _over_limits(configuration: Configuration, kernel: Compiled, seen: Traits) -> list[str]:
    limits = LIMITS[configuration.target]
    faults = []
    if kernel.spilled:
        faults.append(f"spills {kernel.spilled} bytes a thread")
    if kernel.registers > limits.registers_a_thread:
        faults.append(f"{kernel.registers} registers a thread, of {limits.registers_a_thread}")
    if kernel.shared > limits.shared_a_block:
        faults.append(f"{kernel.shared} bytes of shared memory, of {limits.shared_a_block}")
    if kernel.tensor_memory > limits.tensor_memory:
        faults.append(f"{kernel.tensor_memory} columns of tensor memory, of {limits.tensor_memory}")
    if not seen.blocks:
        faults.append("not one block fits on a multiprocessor")
    return faults


def _wrong_products(configuration: Configuration, seen: Traits) -> list[str]:
    # Exact float32 products have no matrix unit on NVIDIA.
    is_exact = configuration.dtype == "fp32" and configuration.precision == "ieee"
    expected = "fma" if is_exact and _is_nvidia(configuration) else MATRIX_INSTRUCTION[configuration.target]
    return [] if seen.kind == expected else [f"products by {seen.kind}, expected {expected}"]


def _few_exponentials(found: float, expected: int) -> list[str]:
    return [] if found >= expected else [f"{found:g} exponentials of the special unit, expected {expected}"]


def _exponentials_of_merge(configuration: Configuration) -> int:
    """Of the two sums that it joins, for every entry of a block."""
    return 2 * MERGE_BLOCK if configuration.kernel == "merge" else 0


def _slow_loads(configuration: Configuration, seen: Traits) -> list[str]:
    if not configuration.aligned:  # such rows can be read by the element only
        return []
    faults = []
    expected = _widest_load(configuration)
    if seen.asynchronous != "TMA" and seen.vector < expected:
        faults.append(f"loads of {seen.vector} bytes, expected {expected}")
    wanted = _asynchronous_copies(configuration)
    if wanted and seen.asynchronous != wanted:
        faults.append(f"no {wanted} into shared memory")
    return faults


def _widest_load(configuration: Configuration) -> int:
    """Bytes a lane; of a vector a program may have no more entries than it has threads."""
    if configuration.kernel == "merge":
        warps, entries = configuration.plan.num_warps, MERGE_BLOCK
    elif configuration.kernel == "softmax":
        warps, entries = int(ROW_OPTIONS["num_warps"]), SOFTMAX_BLOCK
    else:
        return WIDEST_LOAD
    lanes = warps * (32 if _is_nvidia(configuration) else 64)
    return min(WIDEST_LOAD, 4 * max(1, entries // lanes))


def _asynchronous_copies(configuration: Configuration) -> str:
    """By what NVIDIA's kernels load embeddings; empty where nothing is loaded ahead."""
    plan = configuration.plan
    if not _is_nvidia(configuration) or configuration.kernel in WITHOUT_PRODUCTS:
        return ""
    if plan.descriptors and configuration.kernel != "positives":
        return "TMA"
    return "cp.async" if plan.num_stages > 1 else ""


def _late_loads(configuration: Configuration, found: Bound) -> list[str]:
    """Stages of loads that a kernel lacks, where its plan asks for some and there is more than one step."""
    if configuration.plan.num_stages < FEWEST_STAGES or not configuration.aligned:
        return []
    if not found.stages or found.stages >= FEWEST_STAGES:
        return []
    return [f"{found.stages} stages of loads, expected {FEWEST_STAGES}"]


def _is_nvidia(configuration: Configuration) -> bool:
    return configuration.target.startswith("sm_")
