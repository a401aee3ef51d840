"""The CUDA kernels of a built contrastile._C: what they take of each chip, what is wrong with them, and their bounds.

They are read from the machine code that the module holds, as it would run; nothing is compiled here. One kernel serves
launches that differ in null pointers; bounds are those of InfoNCE, told by what it surely stores: of the fewest
instructions that such a launch may run. cuobjdump and nvdisasm are those that come with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from contrastile.bench.static.bounds import Bound, bound_of
from contrastile.bench.static.compile import BINARIES, Compiled
from contrastile.bench.static.matrix import DEPTHS, FUSED_DEPTHS, FUSED_WINDOW, TARGETS, WINDOW
from contrastile.bench.static.rates import LIMITS, blocks_resident
from contrastile.bench.static.table import Row, row
from contrastile.bench.static.tiles import Tile, Walk
from contrastile.kernels.plans import TilePlan

CUDA_TARGETS = tuple(target for target in TARGETS if target.startswith("sm_"))
PANEL_BYTES = 128  # of a row, that come into shared memory together
GROUP_ROWS = 8
PLAIN_THREADS = 256  # of kernels without a tile
# What a launch of InfoNCE surely stores: all sums, a strip by 16 bytes (8 of float32), additions to a gradient.
_RESULTS = {"statistics": ("STG.",), "coefficients": ("STG.E.128", "STG.E.64"), "gradient": ("RED.", "REDG.")}
_PRODUCTS = {"4bf16": "bf16", "3f16": "fp16", "ProductsE1": "tf32x3", "ProductsE2": "tf32", "MultiplyExactly": "fp32"}
_KERNEL = re.compile(r"\d(statistics|coefficients|gradient|positives|merge|finish_rows|rows)_kernel")
_TILE = re.compile(r"4TileI.*?Li(\d+)ELi(\d+)ELi(\d+)ELi(\d+)ELi(\d+)EE")
_WALK = re.compile(r"Li(\d+)ELb(\d)ELb(\d)E")
_SIGMOID = "FamilyE1E"
_UNROUNDED = re.compile(r"finish_rows_kernelI(?:N\w+?E|f)fE")
_SECTION = re.compile(r"\.section\s+\.text\.(\S+?),")
_VERSION = re.compile(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)")


@dataclass(frozen=True)
class CudaKernel:
    """One kernel for one target."""

    name: str  # of its file
    dtype: str  # of products, or of a gradient: bf16, fp16, tf32, tf32x3 or fp32; empty: there is but one
    depth: int  # most features of the gradient kernel; 0: any number
    form: str  # of the gradient kernel: fused, fused anchors, fused candidates; of rows: rounded or float32
    is_sigmoid: bool  # weights by sigmoids, not by exponentials
    rows: int  # of a tile; 0: there is none
    cols: int
    stages: int
    compiled: Compiled
    nvcc: str  # its version

    @property
    def sweep(self) -> str:
        sweep = {"coefficients": "gradient", "gradient": self.form}.get(self.name, self.name)
        return f"{sweep} sigmoid" if self.is_sigmoid else sweep

    @property
    def threads(self) -> int:
        return 32 * self.compiled.num_warps

    def __str__(self) -> str:
        depth = f" D<={self.depth}" if self.depth else ""
        weights = "sigmoid" if self.is_sigmoid else ""
        return " ".join(filter(None, [self.compiled.target, self.name, weights, self.form, self.dtype])) + depth


@cache
def read(module: Path) -> tuple[CudaKernel, ...]:
    """Of all targets. Raises RuntimeError where the module has no CUDA kernels."""
    with tempfile.TemporaryDirectory() as folder:
        _output_of(BINARIES / "cuobjdump", "--extract-elf", "all", module.resolve(), folder=Path(folder))
        cubins = sorted(Path(folder).glob("*.cubin"))
        kernels = tuple(kernel for cubin in cubins for kernel in _kernels_of(cubin))
    if not kernels:
        raise RuntimeError(f"{module} holds no CUDA kernels: build it with CONTRASTILE_CUDA=1")
    return kernels


def _kernels_of(cubin: Path) -> Iterator[CudaKernel]:
    target = re.findall(r"sm_\d+", cubin.name)[-1]
    version = _VERSION.search(cubin.read_bytes())
    if version is None:
        raise RuntimeError(f"{cubin.name} does not say which nvcc made it")
    usage = _output_of(BINARIES / "cuobjdump", "--dump-resource-usage", cubin)
    registers = {name: int(n) for name, n in re.findall(r"Function (\S+):\s+REG:(\d+)", usage)}
    parts = _SECTION.split(_output_of(BINARIES / "nvdisasm", "--no-dataflow", "--print-code", cubin))
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        yield _kernel_of(name, text, target, registers[name], version.group(1).decode())


def _kernel_of(mangled: str, text: str, target: str, registers: int, version: str) -> CudaKernel:
    found, tile, walk = _KERNEL.search(mangled), _TILE.search(mangled), None
    if found is None:
        raise RuntimeError(f"{mangled} is no kernel that is known")
    name = found.group(1).removeprefix("finish_")
    dtype = next((dtype for part, dtype in _PRODUCTS.items() if part in mangled), "")
    rows, cols, down, across, stages = map(int, tile.groups()) if tile else (0, 0, PLAIN_THREADS // 32, 1, 0)
    shared, depth, form = stages * (rows + cols) * PANEL_BYTES, 0, ""
    if tile and name == "gradient":
        walk = _WALK.search(mangled, tile.end())
        assert walk is not None
        depth, owns_candidates, both = map(int, walk.groups())
        form = "fused" if both else "fused candidates" if owns_candidates else "fused anchors"
        # The owned side, the walked one twice, coefficients, and sums of every warp.
        shared = 3 * rows * depth * 2 + rows * PANEL_BYTES + 4 * (across * rows + down * cols)
    if name == "rows":
        form, dtype = "float32" if _UNROUNDED.search(mangled) else "rounded", dtype or "fp32"
    compiled = Compiled(
        target,
        text,
        num_warps=down * across,
        registers=registers,
        spilled=len(re.findall(r"\bSTL\b", text)) * 4,
        shared=shared,
        tensor_memory=0,
        results=_RESULTS.get(name, ("STG.",)),
        recomputes=bool(tile),
    )
    return CudaKernel(name, dtype, depth, form, _SIGMOID in mangled, rows, cols, stages, compiled, version)


def faults_of(kernel: CudaKernel) -> list[str]:
    """What is wrong with a kernel, in words."""
    text, limits = kernel.compiled.assembly, LIMITS[kernel.compiled.target]
    faults = [f"{name}: it keeps values in local memory" for name in ("LDL", "STL") if re.search(rf"\b{name}\b", text)]
    # Products by the matrix unit, from operands that it loads as matrices, from embeddings that were copied ahead.
    wanted = ["LDGSTS"] if kernel.rows else []
    wanted += ["HMMA", "LDSM"] if kernel.rows and kernel.dtype != "fp32" else []
    faults += [f"no {name}" for name in wanted if not re.search(rf"\b{name}\b", text)]
    faults += _few_by_special_unit(kernel)
    if kernel.compiled.registers > limits.registers_a_thread:
        faults.append(f"{kernel.compiled.registers} registers a thread, of {limits.registers_a_thread}")
    if not blocks_of(kernel):
        faults.append("not one block fits on a multiprocessor")
    return faults


def _few_by_special_unit(kernel: CudaKernel) -> list[str]:
    """An exponential a pair, of sigmoids one for each of two terms and a reciprocal: fewer are computed a slow way."""
    if kernel.name not in ("statistics", "coefficients", "gradient"):
        return []
    terms = kernel.rows * kernel.cols // kernel.threads * (2 if kernel.is_sigmoid else 1)
    text, faults = kernel.compiled.assembly, []
    for name in ("EX2", "RCP") if kernel.is_sigmoid else ("EX2",):
        found = len(re.findall(rf"\bMUFU\.{name}\b", text))
        faults += [f"{found} MUFU.{name} a thread, expected {terms}"] if found < terms else []
    return faults


def blocks_of(kernel: CudaKernel) -> int:
    """Resident on a multiprocessor together."""
    made = kernel.compiled
    return blocks_resident(made.target, made.num_warps, made.registers, made.shared, made.tensor_memory)


@cache
def bound(kernel: CudaKernel, depth: int) -> Bound:
    """Of the statistics, coefficients and gradient kernels, but for float32 in three products or by multiply-adds."""
    walk = None
    if kernel.depth:
        steps = FUSED_WINDOW // kernel.cols
        walk = Walk(steps, kernel.form == "fused candidates", kernel.form == "fused")
    is_float32 = kernel.dtype == "tf32"
    tile = Tile(
        target=kernel.compiled.target,
        plan=_plan(kernel),
        depth=depth,
        dtype="fp32" if is_float32 else kernel.dtype,
        precision="tf32" if is_float32 else "ieee",
        element_bytes=4 if is_float32 else 2,
        tile_cols=WINDOW // kernel.cols,
        walk=walk,
    )
    try:
        return bound_of(tile, kernel.compiled)
    except RuntimeError as error:
        raise RuntimeError(f"{kernel}: {error}") from error


def _plan(kernel: CudaKernel) -> TilePlan:
    block_depth = kernel.depth or PANEL_BYTES // (4 if kernel.dtype == "tf32" else 2)
    group = 1 if kernel.depth else GROUP_ROWS
    return TilePlan(kernel.rows, kernel.cols, block_depth, group, kernel.compiled.num_warps, kernel.stages, False)


def bounded(dtype: str = "bf16") -> Iterator[tuple[str, str, str, int]]:
    """Target, sweep, dtype and features of the table's rows."""
    for target in CUDA_TARGETS:
        for sweep in ("statistics", "gradient"):
            yield from ((target, sweep, dtype, depth) for depth in DEPTHS)
            yield target, sweep, "tf32", 512
        for sweep in ("fused", "fused anchors", "fused candidates"):
            yield from ((target, sweep, dtype, depth) for depth in FUSED_DEPTHS)


def rows_of(module: Path, targets: tuple[str, ...] = CUDA_TARGETS) -> list[Row]:
    """Rows of the table."""
    kernels = read(module)
    found = []
    for target, sweep, dtype, depth in bounded():
        if target not in targets:
            continue
        kernel = next(
            k
            for k in kernels
            if (k.compiled.target, k.sweep, k.dtype) == (target, sweep, dtype) and k.depth in (0, depth)
        )
        key = {"target": target, "sweep": sweep, "dtype": dtype, "D": str(depth), "source": "cuda"}
        found.append(row(key, _plan(kernel), kernel.compiled, bound(kernel, depth), f"nvcc {kernel.nvcc}"))
    return found


def _output_of(program: Path, *arguments: str | Path, folder: Path | None = None) -> str:
    finished = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=folder)
    if finished.returncode:
        raise RuntimeError(f"{program.name} failed: {finished.stderr.strip()}")
    return finished.stdout
