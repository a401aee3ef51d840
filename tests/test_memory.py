"""Peak memory of a forward and backward, beyond inputs, outputs and gradients, in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from support import BACKENDS_HERE

PROMISE_MIB = 96  # the workspace of 64 MiB, and room for vectors of N and for what an allocator rounds up
CASES = (
    "dense",
    "info_nce",
    "info_nce_bfloat16",
    "info_nce_none",
    "one_direction",
    "gamma",
    "nt_xent",
    "log_normalizers",
    "prefixes",
)


def _why_not_measurable() -> str | None:
    if not sys.platform.startswith("linux"):
        return "peak memory is read from /proc, which only Linux has"
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return "/proc/self/clear_refs is not writable, so the high-water mark cannot be reset"
    return None


pytestmark = pytest.mark.skipif(_why_not_measurable() is not None, reason=_why_not_measurable() or "")


@cache
def extra_mib(cases: tuple[str, ...], backend: str, rows: int, dim: int = 64, threads: int = 2) -> dict[str, float]:
    task = {"cases": cases, "backend": backend, "rows": rows, "dim": dim, "threads": threads}
    child = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "memory_child.py"), json.dumps(task)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def assert_promise_is_kept(found: dict[str, float]) -> None:
    too_much = {case: mib for case, mib in found.items() if mib > PROMISE_MIB and case != "dense"}
    assert not too_much, f"MiB beyond inputs and gradients, promised at most {PROMISE_MIB}: {too_much} of {found}"


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_extra_memory_at_4096_rows(backend):
    found = extra_mib(CASES, backend, 4096)
    assert found["dense"] >= 2 * 4096 * 4096 * 4 / 2**20, f"the measurement misses what a dense loss stores: {found}"
    assert_promise_is_kept(found)


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.slow if name == "eager" else ()) for name in BACKENDS_HERE]
)
def test_extra_memory_at_16384_rows_where_logits_would_take_a_gibibyte(backend):
    assert_promise_is_kept(extra_mib(("info_nce", "gamma"), backend, 16384))


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in BACKENDS_HERE, reason="the cpu backend is not available")
@pytest.mark.parametrize("threads", [1, 8])
def test_extra_memory_of_cpu_does_not_grow_with_the_thread_count(threads):
    found = extra_mib(("info_nce", "one_direction", "gamma", "nt_xent", "prefixes"), "cpu", 4096, threads=threads)
    two_threads = extra_mib(CASES, "cpu", 4096)
    del found["kept"]
    for case, mib in found.items():
        assert mib <= min(PROMISE_MIB, two_threads[case] + 8), f"{case}: {mib} MiB, {two_threads[case]} at 2 threads"


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in BACKENDS_HERE, reason="the cpu backend is not available; eager takes too long here")
def test_extra_memory_at_65536_rows():
    assert_promise_is_kept(extra_mib(("info_nce", "gamma", "nt_xent"), "cpu", 65536))


@pytest.mark.skipif("cpu" not in BACKENDS_HERE, reason="the cpu backend is not available")
def test_the_workspace_kept_between_sweeps_is_one_and_setting_it_gives_it_back():
    kept = extra_mib(("info_nce", "gamma"), "cpu", 16384)["kept"]
    assert 16 <= kept <= 64 + 2, f"{kept} MiB were given back"
