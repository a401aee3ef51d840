"""What one instruction of a warp asks of a multiprocessor, read off its name: SASS of NVIDIA, ISA of AMD."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields

from contrastile.bench.static.disassembly import Instruction

# Lanes that only move or compare run beside those that multiply; the names are the first part of an opcode.
_FP32 = {"FADD", "FMUL", "FFMA", "IMAD", "FADD32I", "FMUL32I", "FFMA32I", "HFMA2", "HADD2", "HMUL2"}
_FP32_PAIRS = {"FADD2", "FMUL2", "FFMA2"}
_ALU = {
    *("FMNMX", "FMNMX3", "FSETP", "FSEL", "FSET", "F2FP", "SEL", "PRMT", "LOP3", "LOP", "SHF", "SHL", "SHR", "LEA"),
    *("IADD", "IADD3", "VIADD", "IMNMX", "IMNMX3", "VIMNMX", "VIMNMX3", "VIADDMNMX", "ISETP", "IABS", "SGXT", "BMSK"),
}
_SPECIAL = {"MUFU", "I2F", "I2FP", "F2I", "F2F", "POPC", "FLO"}
_AMD_SPECIAL = ("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_", "v_sin_", "v_cos_")
_LANES, _AMD_LANES = 32, 64
WARPS_A_GROUP = 4  # that give one wgmma together
K_BYTES = 32  # of a wgmma or tcgen05 operand's row
_SUFFIXES = {"128": 16, "F32x4": 16, "64": 8, "F32x2": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # bytes
_WIDEST = 16  # bytes of a lane's load
_GROUPS = 2  # of cp.async for one stage of a tile: anchors and candidates
_MFMA = re.compile(r"v_mfma_f32_(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True)
class Work:
    """Of one warp."""

    issue: float = 0
    matrix: float = 0  # flop of matrix instructions
    fp32: float = 0  # results, as all below
    alu: float = 0
    special: float = 0
    exponentials: float = 0  # among the special ones
    shared: float = 0  # bytes that warps and the matrix unit read and write; a shuffle takes that way too
    filled: float = 0  # bytes that asynchronous copies put into shared memory
    loaded: float = 0  # bytes from global memory
    stored: float = 0
    spilled: float = 0  # bytes to and from a thread's own memory

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def __mul__(self, times: float) -> Work:
        return Work(*(getattr(self, f.name) * times for f in fields(Work)))


def is_matrix(instruction: Instruction) -> bool:
    return instruction.opcode.startswith(("HMMA", "HGMMA", "UTCHMMA", "v_mfma"))


def is_fma(instruction: Instruction) -> bool:
    return instruction.opcode.split(".")[0] in ("FFMA", "FFMA2")


def matrix_kind(opcodes: set[str]) -> str:
    """The matrix unit's instruction as PTX and AMD call it; "fma" where there is none."""
    for prefix, kind in (("UTCHMMA", "tcgen05"), ("HGMMA", "wgmma"), ("HMMA", "mma.sync"), ("v_mfma", "mfma")):
        if any(opcode.startswith(prefix) for opcode in opcodes):
            return kind
    return "fma"


def work_of(instruction: Instruction) -> Work:
    """Of every instruction but tcgen05 and TMA, whose sizes are not in their names."""
    if instruction.opcode[0].islower():
        return _amd_work(instruction)
    opcode, operands = instruction.opcode, instruction.operands
    name = opcode.split(".")[0]
    if name in _FP32:
        return Work(issue=1, fp32=_LANES)
    if name in _FP32_PAIRS:
        return Work(issue=1, fp32=2 * _LANES)
    if name in _ALU:
        return Work(issue=1, alu=_LANES)
    if name in _SPECIAL:
        return Work(issue=1, special=_LANES, exponentials=_LANES if opcode.startswith("MUFU.EX2") else 0)
    if name == "HMMA":
        return Work(issue=1, matrix=2 * 16 * 8 * int(opcode.split(".")[1].removeprefix("168")))
    if name == "HGMMA":
        return _wgmma_work(opcode, operands)
    if name in ("LDSM", "STSM"):
        matrices = int(opcode.rsplit(".", 1)[1]) if opcode[-1] in "124" and "88." in opcode else 1
        return Work(issue=1, shared=matrices * 128)
    if name == "SHFL":
        return Work(issue=1, shared=4 * _LANES)
    size = _bytes_of(opcode) * _LANES
    if name in ("LDS", "STS", "ATOMS"):
        return Work(issue=1, shared=size)
    if name == "LDGSTS":
        return Work(issue=1, filled=size, loaded=size)
    if name in ("LDG", "LD"):
        return Work(issue=1, loaded=size)
    if name in ("STG", "ST", "RED", "REDG", "ATOMG", "ATOM"):
        return Work(issue=1, stored=size)
    if name in ("LDL", "STL"):
        return Work(issue=1, spilled=size)
    return Work(issue=1)


def _wgmma_work(opcode: str, operands: str) -> Work:
    """A warp's quarter of a warpgroup's product; the unit reads B, and A unless in registers, from shared memory."""
    rows, cols, depth = map(int, opcode.split(".")[1].split("x"))
    in_registers = not operands.split(",")[1].strip().startswith("gdesc")
    read = (cols + (0 if in_registers else rows)) * K_BYTES
    return Work(issue=1, matrix=2 * rows * cols * depth / WARPS_A_GROUP, shared=read / WARPS_A_GROUP)


def _bytes_of(opcode: str) -> int:
    """A lane's, by the suffix of a load or store."""
    parts = opcode.split(".")[1:]
    return next((size for suffix, size in _SUFFIXES.items() if suffix in parts), 4)


def vector_bytes(instruction: Instruction) -> int:
    """A lane's bytes of a load from global memory, into registers or shared memory; 0 for all else."""
    opcode = instruction.opcode
    if opcode.startswith(("global_load", "buffer_load")):
        return _amd_bytes_of(opcode)
    return _bytes_of(opcode) if opcode.split(".")[0] in ("LDG", "LDGSTS") else 0


def stages_of_async_copies(loop: list[Instruction], is_product: Callable[[Instruction], bool]) -> int:
    """Stages of cp.async that a round's products run with: the one they use and those still under way.

    LDGDEPBAR closes a group of copies, "DEPBAR.LE SB0, n" waits until n groups at most are left. A round closes the
    groups of one stage.
    """
    groups = sum(i.opcode == "LDGDEPBAR" for i in loop)
    if not groups:
        return 1
    under_way: int | None = None  # unknown until the first wait
    fewest: list[int] = []
    for i in (*loop, *loop):
        if (left := _groups_left(i)) is not None:
            under_way = left
        elif i.opcode == "LDGDEPBAR" and under_way is not None:
            under_way += 1
        elif is_product(i) and under_way is not None:
            fewest.append(under_way)
    return 1 + min(fewest) // groups if fewest else 1


def _groups_left(instruction: Instruction) -> int | None:
    """Of copies, at most, after a wait for them; None: no such wait."""
    if not instruction.opcode.startswith("DEPBAR.LE"):
        return None
    found = re.match(r"SB0, 0x([0-9a-f]+)", instruction.operands)
    return None if found is None else int(found.group(1), 16)


def stages_of_unrolled_copies(path: list[Instruction], is_product: Callable[[Instruction], bool]) -> int:
    """The same of a product without a loop: what its first step runs with."""
    under_way = 0
    for i in path:
        if i.opcode == "LDGDEPBAR":
            under_way += 1
        elif (left := _groups_left(i)) is not None:
            under_way = min(under_way, left)
        elif is_product(i):
            return 1 + under_way // _GROUPS
    return 1


def stages_of_register_loads(
    instructions: list[Instruction], is_product: Callable[[Instruction], bool], steps: int = 0
) -> int:
    """2 where products run while wide loads are under way, 1 where they are waited for at once. The compiler may place
    a load late: most of them count. Of a loop's round, or of `steps` without a loop, the first of which has to wait.

    "s_waitcnt vmcnt(n)" waits until n loads at most are left; they arrive in order.
    """
    products = 0
    under_way: list[tuple[int, bool]] = []  # products before each load, and whether it is a wide one
    covered: list[bool] = []  # of each wide load that was waited for, whether a product ran meanwhile
    # What a loop's second round waits for was asked for in the first.
    for i in instructions if steps else (*instructions, *instructions):
        if is_product(i):
            products += 1
        elif size := vector_bytes(i):
            under_way.append((products, size == _WIDEST))
        elif i.opcode == "s_waitcnt" and (found := re.search(r"vmcnt\((\d+)\)", i.operands)):
            arrived = max(0, len(under_way) - int(found.group(1)))
            covered += [products > before for before, is_wide in under_way[:arrived] if is_wide]
            del under_way[:arrived]
    if steps:
        del covered[: len(covered) // steps]
    return 2 if covered and 2 * sum(covered) >= len(covered) else 1


def _amd_work(instruction: Instruction) -> Work:
    opcode = instruction.opcode
    if found := _MFMA.match(opcode):
        rows, cols, depth = map(int, found.groups())
        return Work(issue=1, matrix=2 * rows * cols * depth)
    if opcode.startswith(_AMD_SPECIAL):
        return Work(issue=1, special=_AMD_LANES, exponentials=_AMD_LANES if opcode.startswith("v_exp_") else 0)
    if opcode.startswith(("v_pk_", "v_add_f32", "v_sub_f32", "v_mul_f32", "v_fma", "v_mac_f32")):
        return Work(issue=1, fp32=_AMD_LANES)
    if opcode.startswith("v_") and not opcode.startswith(("v_readfirstlane", "v_nop")):
        return Work(issue=1, alu=_AMD_LANES)
    size = _amd_bytes_of(opcode) * _AMD_LANES
    if opcode.startswith("ds_"):
        return Work(issue=1, shared=size)
    if opcode.startswith(("global_load", "buffer_load", "flat_load")):
        is_direct = instruction.operands.endswith(" lds")  # straight into shared memory
        return Work(issue=1, loaded=size, filled=size if is_direct else 0)
    if opcode.startswith(("global_store", "buffer_store", "flat_store", "global_atomic")):
        return Work(issue=1, stored=size)
    if opcode.startswith("scratch_"):
        return Work(issue=1, spilled=size)
    return Work(issue=1)


def _amd_bytes_of(opcode: str) -> int:
    size = 4
    for suffix, found in (("b128", 16), ("dwordx4", 16), ("b96", 12), ("dwordx3", 12), ("b64", 8), ("dwordx2", 8)):
        if suffix in opcode:
            size = found
            break
    else:
        if opcode.endswith(("short", "ushort", "u16", "b16", "short_d16", "short_d16_hi", "b16_d16_hi")):
            size = 2
    return 2 * size if re.match(r"ds_(read|write)2", opcode) else size
