"""csrc/cuda over random problems on a processor, by cuda_host/sweep_driver.cpp: odd sizes, every element type and form
of float32 products, masks, windows, strides, NaN. Three builds of it:

plain       what runs fastest
sanitized   AddressSanitizer and UndefinedBehaviorSanitizer; every buffer ends at a red zone
checked     the layer's check that barriers order all that threads share, and its count of bank conflicts

`make cuda-host-full` takes all of them, more cases and every schedule.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from cuda_host import build as host

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(host.compiler() is None, reason="there is no C++ compiler"),
]

KERNELS = host.ROOT / "csrc" / "cuda"
BUILDS = {
    "plain": {},
    "sanitized": {"sanitizer": host.SANITIZERS},
    "checked": {"checks": True},
}
# Memory that a kernel's frame left behind is looked for in few cases: keeping it takes six times as long.
OPTIONS = {"ASAN_OPTIONS": "detect_stack_use_after_return=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
SCHEDULES = ("natural", "reversed", "random")

if host.FULL:
    RUNS = [(build, schedule, 400) for build in BUILDS for schedule in SCHEDULES]
else:
    RUNS = [
        ("sanitized", "natural", 40),
        ("sanitized", "random", 15),
        ("checked", "natural", 40),
        ("checked", "random", 25),
    ]

# What orders accesses of different threads, as file:line.
ORDERS = [
    f"{path.name}:{number}"
    for path in sorted(KERNELS.iterdir())
    if path.name != "device.h"
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(r"device::(\w+_barrier\w*\(|wait_)", line)
]


@pytest.fixture(scope="module")
def driver():
    """driver(build) -> path of the program; built once."""

    def built(name: str) -> Path:
        options = BUILDS[name]
        if "sanitizer" in options:
            try:
                host.sanitizer_environment()
            except RuntimeError as missing:
                pytest.skip(str(missing))
        sources = [host.HERE / "sweep_driver.cpp", *sorted(KERNELS.glob("*.cu"))]
        return host.build(sources, program=True, **options)

    return built


def run(program: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, arguments)],
        env={**os.environ, **OPTIONS, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=7200 if host.FULL else 1200,
    )


def assert_clean(done: subprocess.CompletedProcess[str], cases: int) -> None:
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout == f"{cases} cases, 0 failures, 0 unwritten bytes read, 0 bank conflicts\n"


@pytest.mark.parametrize(("build", "schedule", "cases"), RUNS)
def test_kernels_are_right_and_clean(driver, build, schedule, cases):
    assert_clean(run(driver(build), cases, 1000 * SCHEDULES.index(schedule), schedule), cases)


def test_no_thread_uses_a_frame_that_is_gone(driver):
    cases = 40 if host.FULL else 3
    assert_clean(run(driver("sanitized"), cases, ASAN_OPTIONS="detect_stack_use_after_return=1"), cases)


@pytest.mark.parametrize("schedule", SCHEDULES if host.FULL else ["natural"])
@pytest.mark.parametrize("place", ORDERS)
def test_every_barrier_and_wait_is_needed_and_missed(driver, place, schedule):
    """Left out, it is a race that the checked build reports; the plain build may well get the numbers right."""
    done = run(driver("checked"), 12, 0, schedule, place)
    failures = [line for line in done.stdout.splitlines() if line.startswith("seed")]
    assert failures, f"{place} orders nothing"
    assert all("race: " in line for line in failures), done.stdout[-4000:]


def test_barriers_were_found():
    assert {"exchange.h", "product.h", "gradient.cu", "coefficients.cu"} <= {place.split(":")[0] for place in ORDERS}
