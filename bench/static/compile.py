"""Compiles a kernel for a target that need not be here, from the same arguments as a launch takes.

Triton derives a kernel's signature from the arguments of its launch: dtypes, which numbers are multiples of 16, which
members of a named tuple are None. Here its own code does so too, from buffers that have a dtype and no memory, so that
what is examined is what a launch on that target would run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from contrastile.bench.static.disassembly import RESULTS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

ALIGNMENT = 16  # bytes: what a launch may assume of a tensor's first element
# Of Triton's intermediate form: shared memory for so many tiles of embeddings, (stages, rows, features).
_RING = re.compile(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x(?:bf16|f16|f32),")
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Buffer:
    """A tensor to Triton's eyes: a dtype and an aligned address."""

    dtype: torch.dtype
    shape: tuple[int, ...] = (1,)

    def data_ptr(self) -> int:
        return ALIGNMENT

    def stride(self) -> tuple[int, ...]:
        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.insert(0, strides[0] * size)
        return tuple(strides)


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target."""

    target: str
    assembly: str  # SASS, or AMD ISA
    num_warps: int
    registers: int  # a thread
    spilled: int  # bytes of registers a thread keeps in memory
    shared: int  # bytes a block
    tensor_memory: int  # columns a block (sm_100)
    ring: int = 0  # stages of embeddings that the compiler reserved shared memory for; 0: none (NVIDIA)
    results: tuple[str, ...] = RESULTS  # how the stores and atomic additions begin that the launch surely runs
    recomputes: bool = False  # whether a slow path has the tile's product again, and copies are branched around

    @property
    def is_amd(self) -> bool:
        return self.target.startswith("gfx")


def compile_kernel(kernel: Any, arguments: Mapping[str, Any], options: Mapping[str, Any], target: str) -> Compiled:
    """Arguments by name, constants included; options as of a launch; target "sm_90", "gfx942", ... Raises RuntimeError
    where Triton cannot.
    """
    gpu = _gpu_target(target)
    backend = make_backend(gpu)
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("kernels run in Triton's interpreter here: unset TRITON_INTERPRET to compile them")
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, extra = binder(**arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, extra, bound, specialization, extra)
    source = ASTSource(kernel, signature, constants, attributes)
    try:
        binary = triton.compile(source, target=gpu, options=parsed.__dict__)
    except Exception as error:
        raise RuntimeError(f"{kernel.__name__} does not compile for {target}: {error}") from error
    memory = {
        "num_warps": binary.metadata.num_warps,
        "shared": binary.metadata.shared,
        "tensor_memory": getattr(binary.metadata, "tmem_size", 0) or 0,
    }
    if gpu.backend == "hip":
        text = binary.asm["amdgcn"]
        return Compiled(
            target,
            text,
            registers=_amd_value(text, "vgpr_count"),
            spilled=_amd_value(text, "private_segment_fixed_size"),
            **memory,
        )
    sass = _run_on(binary.asm["cubin"], BINARIES / "nvdisasm", "--no-dataflow", "--print-code")
    registers, spilled = _nvidia_resources(binary.asm["cubin"], sass)
    ring = min(map(int, _RING.findall(binary.asm["ttgir"])), default=0)
    return Compiled(target, sass, registers=registers, spilled=spilled, ring=ring, **memory)


def _gpu_target(target: str) -> GPUTarget:
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    if target.startswith("gfx9"):
        return GPUTarget("hip", target, 64)
    raise ValueError(f"target is {target!r}: expected sm_NN or gfx9NN")


def _amd_value(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", text)
    if found is None:
        raise RuntimeError(f"the AMD assembly has no .{name}")
    return int(found.group(1))


def _nvidia_resources(cubin: bytes, sass: str) -> tuple[int, int]:
    """Registers a thread, and bytes of stack where it is written to: some kernels reserve one and leave it alone."""
    report = _run_on(cubin, BINARIES / "cuobjdump", "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no registers: {report}")
    return int(found.group(1)), int(found.group(2)) if re.search(r"\bSTL\b", sass) else 0


def _run_on(cubin: bytes, program: Path, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        finished = subprocess.run([program, *options, file.name], capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{program.name} failed: {finished.stderr.strip()}")
    return finished.stdout
