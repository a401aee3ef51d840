"""csrc/cpu under AddressSanitizer + UndefinedBehaviorSanitizer and ThreadSanitizer, through csrc/tests/sweep_driver."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
OPTIONS = {
    # New memory is filled with 0xff, a NaN, so that a value read before it was written shows in the results.
    "ASAN_OPTIONS": "max_malloc_fill_size=1000000000:malloc_fill_byte=255:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
WIDEST = "avx512"  # of what the processor has; csrc/cpu/dispatch.cpp goes down from here


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(sanitizer) -> path of the driver; built once."""
    cmake = pytest.importorskip("cmake", reason="cmake is not installed")
    pytest.importorskip("ninja", reason="ninja is not installed")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    cmake_program = Path(cmake.CMAKE_BIN_DIR, "cmake")
    folder = tmp_path_factory.mktemp("sanitizers")
    drivers: dict[str, Path] = {}

    def build_once(sanitizer: str) -> Path:
        if sanitizer not in drivers:
            skip_without_runtime(sanitizer, folder)
            target = folder / sanitizer
            configure = [cmake_program, "-S", ROOT, "-B", target, "-G", "Ninja", f"-DCONTRASTILE_SANITIZE={sanitizer}"]
            for command in (configure, [cmake_program, "--build", target]):
                run(command, timeout=600)
            drivers[sanitizer] = target / "sweep_driver"
        return drivers[sanitizer]

    return build_once


def skip_without_runtime(sanitizer: str, folder: Path) -> None:
    """Compilers come without the sanitizers' libraries in some distributions."""
    source = folder / "empty.cpp"
    source.write_text("int main() {}")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")))
    command = [compiler, f"-fsanitize={sanitizer}", source, "-o", folder / "empty"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"{compiler} cannot link with -fsanitize={sanitizer}")


def run(command: list, timeout: float, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env={**os.environ, **OPTIONS, **environment},
    )
    if "unexpected memory mapping" in done.stdout:
        pytest.skip("ThreadSanitizer's runtime does not know this kernel's memory layout")
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("sanitizer", "isa", "cases"),
    [("address", WIDEST, 200), ("address", "generic", 100), ("thread", WIDEST, 50)],
)
def test_sweeps_are_right_and_clean_under_the_sanitizer(build, sanitizer, isa, cases):
    printed = run([build(sanitizer), cases], timeout=600, CONTRASTILE_ISA=isa)
    assert f"{cases} cases" in printed
    assert "0 mismatches" in printed
    if isa == "generic":
        assert "generic vectors" in printed
