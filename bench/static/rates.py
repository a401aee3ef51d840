"""Published rates and limits of the targets, a multiprocessor (NVIDIA) or compute unit (AMD) and cycle.

Matrix rates are a data sheet's dense Tflop/s by the number of multiprocessors and the boost clock:
    sm_80   A100 SXM: bf16 312 at 1.41 GHz, 108 multiprocessors (NVIDIA A100 architecture white paper, 2020)
    sm_86   RTX A6000: bf16 154.8 at 1.80 GHz, 84 (GA102 white paper, 2020); GeForce cards run at half of it
    sm_90   H100 SXM: bf16 989.4 at 1.83 GHz, 132 (H100 architecture white paper, 2022)
    sm_100  B200: bf16 2250, 148; 8192 flop a cycle as in FlashAttention-4 (Zadouri et al. 2026)
    sm_120  RTX PRO 6000 Blackwell: bf16 503.8 at 2.62 GHz, 188 (its data sheet, 2025); GeForce cards at half of it
    gfx942  MI300X: bf16 1307.4 at 2.10 GHz, 304 compute units (AMD CDNA3 white paper, 2023)
DRAM: the data sheets' bandwidth over the same clock and count.

Lanes, exponentials and shared memory, by what confirms them:
    sm_80, sm_86, sm_90   CUDA C++ Programming Guide, "Arithmetic Instructions": 16 exponentials, 64 comparisons, minima
                          and integers; a pipe of its own, 16 lanes for each of four schedulers since Volta (NVIDIA's
                          developer forum). 128 bytes a cycle of shared memory: tuning guides and white papers
    sm_100                16 exponentials, as on sm_90: the abstract of FlashAttention-4 (Zadouri et al. 2026) has them
                          "scale more slowly or remain unchanged", no source gives more. 128 bytes of shared memory as
                          measured for tcgen05 operands (SemiAnalysis, "Dissecting Nvidia Blackwell", 2026).
                          Not confirmed: 64 lanes for comparisons, minima and integers. A diagram of the B200 shows 128
                          that are shared with float32 (Cornell Virtual Workshop); neither is any row's busiest unit
    sm_120                float32 and integers on the same 128 lanes, one or the other in a cycle (RTX Blackwell white
                          paper, 2025). Not confirmed: that comparisons and minima take these too, and 16 exponentials
    gfx942                CDNA3 ISA guide: 4 SIMDs of 16 lanes, packed instructions two results a lane, transcendental
                          ones at a quarter; 128 bytes of LDS (CDNA3 white paper)
Atomic additions count as stores: no maker publishes the rate at which the L2 cache adds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """A cycle and multiprocessor."""

    matrix16: int  # dense flop of bf16 and fp16 products
    matrix_tf32: int  # of tf32 products
    matrix_fp32: int  # of float32 products by a matrix unit; 0: such products are multiply-adds of the fp32 lanes
    fp32: int  # lanes that add, multiply or multiply-add
    alu: int  # lanes for comparisons, selections, minima, conversions and integers
    unified: bool  # whether these two are the same lanes
    exponentials: int  # results
    issue: int  # instructions of a warp
    shared: int  # bytes
    dram: float  # bytes
    multiprocessors: int  # of the device


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds."""

    registers: int  # 32 bit, of all threads (on AMD: of one lane of a SIMD, all its waves)
    registers_a_thread: int
    warps: int
    blocks: int
    shared: int  # bytes
    shared_a_block: int
    reserved_a_block: int  # bytes of shared memory that the system takes
    tensor_memory: int  # columns (sm_100)


_KIB = 1024

RATES = {
    "sm_80": Rates(2048, 1024, 0, 64, 64, False, 16, 4, 128, 2039e9 / 1.41e9 / 108, 108),
    "sm_86": Rates(1024, 512, 0, 128, 64, False, 16, 4, 128, 768e9 / 1.80e9 / 84, 84),
    "sm_90": Rates(4096, 2048, 0, 128, 64, False, 16, 4, 128, 3350e9 / 1.83e9 / 132, 132),
    "sm_100": Rates(8192, 4096, 0, 128, 64, False, 16, 4, 128, 8000e9 / 1.85e9 / 148, 148),
    "sm_120": Rates(1024, 512, 0, 128, 128, True, 16, 4, 128, 1792e9 / 2.62e9 / 188, 188),
    "gfx942": Rates(2048, 1024, 256, 64, 64, True, 16, 4, 128, 5300e9 / 2.10e9 / 304, 304),
}

LIMITS = {
    "sm_80": Limits(65536, 255, 64, 32, 164 * _KIB, 163 * _KIB, _KIB, 0),
    "sm_86": Limits(65536, 255, 48, 16, 100 * _KIB, 99 * _KIB, _KIB, 0),
    "sm_90": Limits(65536, 255, 64, 32, 228 * _KIB, 227 * _KIB, _KIB, 0),
    "sm_100": Limits(65536, 255, 64, 32, 228 * _KIB, 227 * _KIB, _KIB, 512),
    "sm_120": Limits(65536, 255, 48, 24, 100 * _KIB, 99 * _KIB, _KIB, 0),
    "gfx942": Limits(512, 512, 32, 32, 64 * _KIB, 64 * _KIB, 0, 0),
}


def rates_of(target: str) -> Rates:
    if target not in RATES:
        raise ValueError(f"target is {target!r}: rates are known of {', '.join(RATES)}")
    return RATES[target]


def matrix_rate(target: str, dtype: str, precision: str) -> int:
    """Dense flop a cycle of products of this dtype; of float32 as fp32 lanes do them where no matrix unit does."""
    rates = rates_of(target)
    if dtype != "fp32":
        return rates.matrix16
    if precision == "tf32":
        return rates.matrix_tf32
    return rates.matrix_fp32 or 2 * rates.fp32


def blocks_resident(target: str, num_warps: int, registers: int, shared: int, tensor_memory: int) -> int:
    """Blocks that fit on one multiprocessor together; 0 where not even one does."""
    limits = LIMITS[target]
    if registers > limits.registers_a_thread or shared > limits.shared_a_block:
        return 0
    if target.startswith("gfx"):
        # Registers come in eights; a SIMD holds eight waves at most, and a block's waves spread over four SIMDs.
        waves_a_simd = min(8, limits.registers // max(8, -(-registers // 8) * 8))
        by_registers = 4 * waves_a_simd // num_warps
    else:
        # A warp's registers come in 256, and each of four schedulers holds its share of the warps.
        a_warp = -(-registers * 32 // 256) * 256
        by_registers = limits.registers // a_warp // 4 * 4 // num_warps
    bounds = [by_registers, limits.warps // num_warps, limits.blocks]
    if shared + limits.reserved_a_block:
        bounds.append(limits.shared // (shared + limits.reserved_a_block))
    if tensor_memory:
        bounds.append(limits.tensor_memory // tensor_memory)
    return min(bounds)
