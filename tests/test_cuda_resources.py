"""What the CUDA kernels take of every chip, by its assembler: no spilled register, room for the blocks they ask for.

Compiled, not run: nvcc needs no GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

NVCC = shutil.which("nvcc")
KERNELS = Path(__file__).parents[1] / "csrc" / "cuda"
TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
REGISTERS = 65536  # of a multiprocessor
# Threads of a block, and blocks that the registers must hold at once.
BLOCKS = {
    "statistics": {"16 bits": (128, 2), "32 bits": (256, 1)},
    "coefficients": {"16 bits": (128, 2), "32 bits": (256, 1)},
    "positives": {"16 bits": (128, 2), "32 bits": (256, 1)},
    "gradient": {"64 features": (128, 2), "128 features": (256, 1)},
    "merge": {"": (256, 4)},
    "rows": {"": (256, 4)},
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="there is no nvcc")]


def entries(source: str, target: str, folder: Path) -> list[tuple[str, int, int]]:
    """(mangled name, registers, bytes spilled) of every kernel."""
    cubin = folder / f"{source}-{target}.cubin"
    command = [NVCC, "-std=c++20", "-O3", f"-arch={target}", "-Xptxas", "-v", "-cubin", "-o", cubin]
    done = subprocess.run([*command, KERNELS / f"{source}.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    return [(name, int(registers), int(spilled)) for name, spilled, registers in found]


def form_of(source: str, name: str) -> str:
    if source == "gradient":
        return "128 features" if "ELi128ELb" in name else "64 features"
    if source in ("merge", "rows"):
        return ""
    return "16 bits" if "Multiply16Bit" in name else "32 bits"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[tuple[str, str], list[tuple[str, int, int]]]:
    folder = tmp_path_factory.mktemp("cubins")
    cases = [(source, target) for source in BLOCKS for target in TARGETS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(lambda case: entries(*case, folder), cases), strict=True))


def test_every_source_is_examined():
    assert {path.stem for path in KERNELS.glob("*.cu")} == set(BLOCKS)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", BLOCKS)
def test_kernels_spill_nothing_and_leave_room_for_their_blocks(source, target, compiled):
    kernels = compiled[source, target]
    assert {form_of(source, name) for name, *_ in kernels} == set(BLOCKS[source])
    for name, registers, spilled in kernels:
        threads, blocks = BLOCKS[source][form_of(source, name)]
        assert spilled == 0, f"{name} spills {spilled} bytes"
        assert -(-registers // 8) * 8 * threads * blocks <= REGISTERS, f"{name} takes {registers} registers"
