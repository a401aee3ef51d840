"""What the CUDA kernels take of every chip, in the machine code of a built module: as docs/cuda.md says, no value in
local memory, operands by the instructions that are meant. Built once, not run: none of it needs a GPU.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from contrastile.bench.static import cuda, table
from contrastile.bench.static.cuda import CUDA_TARGETS, CudaKernel
from cuda_host import build as host
from installs import ROOT, Environment, install_with_nvcc_of_wheels

SOURCES = ROOT / "csrc" / "cuda"
DOCUMENT = ROOT / "docs" / "cuda.md"

PRODUCTS = {
    "16 bits": "Multiply16Bit<device::bf16>",
    "fp32": "MultiplyExactly",
    "tf32": "MultiplyTf32<Float32Products::tf32>",
    "tf32x3": "MultiplyTf32<Float32Products::tf32x3>",
}
WALKS = {"fused": "false, true", "fused anchors": "false, false", "fused candidates": "true, false"}


def launches(source: str) -> Iterator[tuple[str, str, str]]:
    """Kernel as in the document, and the threads and bytes of shared memory that the source starts it with."""
    if source in ("statistics", "coefficients", "positives"):
        kernels = [source, "coefficients sigmoid"] if source == "coefficients" else [source]
        for name, (kind, product) in itertools.product(kernels, PRODUCTS.items()):
            yield f"{name} {kind}", f"SumsTile<{product}>::threads", f"shared_bytes<SumsTile<{product}>>"
    if source == "gradient":
        kernels = [("gradient", 64), ("gradient", 128), ("gradient sigmoid", 128)]
        for (name, depth), (form, walk) in itertools.product(kernels, WALKS.items()):
            kernel = f"Walk<FusedTile<{PRODUCTS['16 bits']}, {depth}>, {depth}, {walk}>"
            yield f"{name} {form}, D <= {depth}", f"{kernel}::Tile::threads", f"{kernel}::shared_bytes"
    if source == "merge":
        yield "merge", "merge_threads", "0"
    if source == "rows":
        yield "rows fp32 into fp32", "rows_of_block * warp_size", "0"


def described() -> tuple[str, dict[str, list[int]]]:
    """The nvcc of docs/cuda.md and its table: threads, shared bytes, and registers of each target, by kernel."""
    text = DOCUMENT.read_text()
    version = text.partition("Registers by nvcc ")[2].split(":")[0]
    lines = text.partition("| kernel | threads |")[2].splitlines()
    assert lines[0] == f" shared bytes | {' | '.join(CUDA_TARGETS)} |"
    rows: dict[str, list[int]] = {}
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        name, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = [int(number) for number in numbers]
    return version, rows


def name_of(kernel: CudaKernel) -> str:
    # fp16 and bf16 have the same instructions, but for the conversions of the last pass over rows.
    kind = "16 bits" if kernel.dtype in ("bf16", "fp16") and kernel.name != "rows" else kernel.dtype
    name = f"{kernel.name} sigmoid" if kernel.is_sigmoid else kernel.name
    if kernel.depth:
        return f"{name} {kernel.form}, D <= {kernel.depth}"
    into = {"rounded": f"into {kernel.dtype}", "float32": "into fp32"}.get(kernel.form, "")
    return " ".join(filter(None, [name, kind, into]))


@pytest.fixture(scope="module")
def cuda_environment(tmp_path_factory) -> Environment:
    """An installation with the CUDA kernels of all chips: one build, of minutes, for all that reads it."""
    return install_with_nvcc_of_wheels(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def kernels(cuda_environment) -> tuple[CudaKernel, ...]:
    return cuda.read(cuda_environment.module)


@pytest.mark.slow
def test_nvcc_of_the_wheels_builds_the_cuda_kernels_of_all_chips_where_there_is_no_other(cuda_environment):
    report = cuda_environment.probe()
    assert report["available"]["cpu"] is None
    if not torch.cuda.is_available():
        assert report["available"]["cuda"] == "no CUDA device"
    if sys.platform == "linux":
        needed = subprocess.run(["ldd", cuda_environment.module], capture_output=True, text=True, check=True).stdout
        assert "libcudart" not in needed  # it is linked statically


@pytest.mark.slow
def test_the_module_has_every_kernel_for_every_chip_and_portable_code(kernels, cuda_environment):
    expected = {(target, name) for target in CUDA_TARGETS for name in described()[1]}
    assert {(k.compiled.target, name_of(k)) for k in kernels} == expected
    assert {k.name for k in kernels} == {path.stem for path in SOURCES.glob("*.cu")}
    listed = subprocess.run(
        [cuda.BINARIES / "cuobjdump", "--list-ptx", cuda_environment.module], capture_output=True, text=True
    ).stdout
    assert listed.count(".sm_80.ptx") == len(list(SOURCES.glob("*.cu")))


@pytest.mark.slow
@pytest.mark.parametrize("target", CUDA_TARGETS)
def test_kernels_keep_nothing_in_local_memory_and_use_the_instructions_that_are_meant(target, kernels):
    of_target = [kernel for kernel in kernels if kernel.compiled.target == target]
    assert [f"{kernel}: {fault}" for kernel in of_target for fault in cuda.faults_of(kernel)] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", CUDA_TARGETS)
def test_registers_threads_and_shared_memory_are_those_of_the_document(target, kernels):
    version, rows = described()
    if kernels[0].nvcc != version:
        pytest.skip(f"the table was made with nvcc {version}, this is {kernels[0].nvcc}")
    column = 2 + CUDA_TARGETS.index(target)
    found = {
        (name_of(k), k.threads, k.compiled.shared, k.compiled.registers) for k in kernels if k.compiled.target == target
    }
    assert found == {(name, *numbers[:2], numbers[column]) for name, numbers in rows.items()}


@pytest.mark.slow
@pytest.mark.parametrize("target", CUDA_TARGETS)
def test_no_bound_has_fallen(target, kernels, cuda_environment):
    made_with = next(row["compiler"] for row in table.read_rows() if row["source"] == "cuda")
    if made_with != f"nvcc {kernels[0].nvcc}":
        pytest.skip(f"the table was made with {made_with}, this is nvcc {kernels[0].nvcc}")
    rows = cuda.rows_of(cuda_environment.module, (target,))
    assert table.regressions(table.read_rows(), rows) == []


@pytest.mark.skipif(host.compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("source", sorted(path.stem for path in SOURCES.glob("*.cu")))
def test_threads_and_shared_memory_of_the_document_are_those_of_launches(source, tmp_path):
    rows = described()[1]
    lines = [f'#include "{SOURCES / source}.cu"', "namespace contrastile::cuda {"]
    for name, *asked in launches(source):
        lines += [
            f'static_assert({found} == {said}, "{name}");' for found, said in zip(asked, rows[name][:2], strict=True)
        ]
    assert len(lines) > 2
    file = tmp_path / "check.cpp"
    file.write_text("\n".join([*lines, "}"]))
    command = [host.compiler(), *host.flags(), "-fsyntax-only", file]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_kernel_points_to_the_table():
    for path in SOURCES.glob("*.cu"):
        header = path.read_text().partition("#include")[0]
        assert "docs/cuda.md" in header, path.name
