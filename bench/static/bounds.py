"""From a compiled kernel to the bound that its instructions and the target's rates set.

A tile's work is what its warps run, by pipe: cycles = work / rate. The pipes of a multiprocessor work beside one
another, so a tile takes the multiprocessor at least as many cycles as its busiest pipe: that pipe bounds, and the
product's cycles by its own are the share of the matrix peak that this allows. Where only one block fits on a
multiprocessor, nothing runs beside it: the sums and exponentials of a tile wait for its product. The second bound adds
the two phases up, each by its own busiest pipe.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from contrastile.bench.static.compile import Compiled
from contrastile.bench.static.disassembly import Block, Instruction, count, main_loop, parse_amd, parse_sass
from contrastile.bench.static.instructions import (
    K_BYTES,
    Work,
    is_fma,
    is_matrix,
    matrix_kind,
    vector_bytes,
    work_of,
)
from contrastile.bench.static.rates import blocks_resident, matrix_rate, rates_of
from contrastile.kernels.plans import TilePlan

PIPES = ("matrix", "special", "fp32", "alu", "issue", "shared", "fill")
LEAST_SHARE_OF_FMA = 0.4  # of a block's instructions, where multiply-adds make the product
ROUNDS_TOLERANCE = 0.35  # the epilogue's multiply-adds are counted with the product's
TENSOR_MEMORY_ROWS = 128  # of a tcgen05 product


@dataclass(frozen=True)
class Tile:
    """A configuration as far as the bound needs it."""

    target: str
    plan: TilePlan
    depth: int
    dtype: str
    precision: str
    element_bytes: int
    tile_cols: int  # of a window: how often a group's rows are used once read

    @property
    def flop(self) -> int:
        return 2 * self.plan.block_rows * self.plan.block_cols * self.depth


@dataclass(frozen=True)
class Bound:
    """Of one tile on one multiprocessor."""

    kind: str  # of matrix instruction
    rounds: float  # of the main loop; 0: unrolled
    vector: int  # widest load from global memory, bytes a lane; 0: only TMA
    asynchronous: str  # "TMA", "cp.async" or "": how X and Y come into shared memory
    work: Work  # all warps
    cycles: dict[str, float]  # by pipe
    blocks: int  # resident on a multiprocessor
    pipe: str  # the busiest
    peak_share: float  # of the matrix peak, at most
    peak_share_of_one_block: float  # where nothing runs beside a block; equal to peak_share where two fit
    l2_demand: float  # bytes a cycle that the product asks of the L2 cache at the matrix peak
    dram_demand: float  # of DRAM, in parts of its bandwidth, if L2 keeps what a group of tile rows shares and no more


def bound_of(tile: Tile, compiled: Compiled) -> Bound:
    blocks = (parse_amd if compiled.is_amd else parse_sass)(compiled.assembly)
    everything = [i for block in blocks for i in block.instructions]
    kind = matrix_kind({i.opcode for i in everything})
    matrix = _matrix_instructions(blocks, kind)
    product, rest, rounds = _phases(tile, compiled, blocks, kind, matrix)
    opcodes = {i.opcode.split(".")[0] for i in everything}
    if "UTMALDG" in opcodes:
        embeddings = (tile.plan.block_rows + tile.plan.block_cols) * tile.depth * tile.element_bytes
        product += Work(filled=embeddings, loaded=embeddings)
    both = product + rest
    peak = matrix_rate(tile.target, tile.dtype, tile.precision)
    product_cycles, rest_cycles = _cycles(tile, product, peak), _cycles(tile, rest, peak)
    cycles = {pipe: product_cycles[pipe] + rest_cycles[pipe] for pipe in PIPES}
    pipe = max(cycles, key=lambda p: cycles[p])
    resident = blocks_resident(
        tile.target, compiled.num_warps, compiled.registers, compiled.shared, compiled.tensor_memory
    )
    ideal = tile.flop / peak
    at_least = cycles[pipe] if resident > 1 else max(product_cycles.values()) + max(rest_cycles.values())
    dram = _dram_bytes(tile) + both.stored
    return Bound(
        kind=kind,
        rounds=rounds,
        vector=max(map(vector_bytes, everything)),
        asynchronous="TMA" if "UTMALDG" in opcodes else "cp.async" if "LDGSTS" in opcodes else "",
        work=both,
        cycles=cycles,
        blocks=resident,
        pipe=pipe,
        peak_share=ideal / cycles[pipe],
        peak_share_of_one_block=ideal / at_least,
        l2_demand=(both.loaded + both.stored) / ideal,
        dram_demand=dram / rates_of(tile.target).dram / ideal,
    )


def _matrix_instructions(blocks: list[Block], kind: str) -> list[int]:
    """How many a block has. Multiply-adds count where they are most of a block: elsewhere they are the epilogue's."""
    if kind != "fma":
        return [sum(map(is_matrix, block.instructions)) for block in blocks]
    found = [sum(map(is_fma, block.instructions)) for block in blocks]
    return [
        n if n > LEAST_SHARE_OF_FMA * len(block.instructions) else 0 for n, block in zip(found, blocks, strict=True)
    ]


def _phases(
    tile: Tile, compiled: Compiled, blocks: list[Block], kind: str, matrix: list[int]
) -> tuple[Work, Work, float]:
    """Work of all warps for the product and after it, and the rounds of the main loop."""
    if kind == "tcgen05":
        return _tcgen05_phases(tile, compiled, blocks, matrix)
    counts = count(blocks, matrix, is_matrix if kind != "fma" else is_fma)
    before, loop, after = (_work(c) for c in (counts.before, counts.loop, counts.after))
    if kind == "fma":
        done, a_round = (_fma_flop(tile, c) for c in (counts.before, counts.loop))
    else:
        done, a_round = before.matrix, loop.matrix
    rounds = _rounds(tile.flop / compiled.num_warps, done, a_round, exact=kind != "fma")
    product = before + loop * rounds
    return product * compiled.num_warps, after * compiled.num_warps, rounds


def _tcgen05_phases(tile: Tile, compiled: Compiled, blocks: list[Block], matrix: list[int]) -> tuple[Work, Work, float]:
    """One warp gives the matrix instructions, in blocks that the others skip; sizes are those of the tile."""
    rows, cols = min(tile.plan.block_rows, TENSOR_MEMORY_ROWS), min(tile.plan.block_cols, 256)
    flop = 2 * rows * cols * (K_BYTES // tile.element_bytes)
    one = Work(matrix=flop, shared=(rows + cols) * K_BYTES)  # both operands from shared memory
    main = main_loop(blocks, matrix)
    in_loop = sum(matrix[i] for i in main)
    outside = sum(matrix) - in_loop
    rounds = _rounds(tile.flop, outside * flop, in_loop * flop, exact=True)
    counts = count(blocks, _marks(blocks, main), lambda i: i.opcode.startswith("LDTM"))
    product = _work(counts.before) + _work(counts.loop) * rounds
    return (
        product * compiled.num_warps + one * (outside + in_loop * rounds),
        _work(counts.after) * compiled.num_warps,
        rounds,
    )


def _marks(blocks: list[Block], main: frozenset[int]) -> list[int]:
    """Names the main loop to `count` by a block that every warp runs: the one that a round returns to."""
    heads = {s for i, block in enumerate(blocks) if i not in main for s in block.successors if s in main}
    head = min(heads, default=None)
    return [1 if i == head else 0 for i in range(len(blocks))]


def _rounds(wanted: float, done: float, a_round: float, exact: bool) -> float:
    """How often the main loop must run for all of the product's flop."""
    if not a_round:
        if abs(done - wanted) > wanted * (0 if exact else ROUNDS_TOLERANCE):
            raise RuntimeError(f"the kernel has {done:g} flop of matrix instructions a tile: expected {wanted:g}")
        return 0
    rounds = (wanted - done) / a_round
    if not exact:
        rounds = round(rounds)
    # A loop of two halves that leaves in its middle runs half a round.
    if rounds <= 0 or (exact and rounds * 2 % 1):
        raise RuntimeError(f"{done:g} and {a_round:g} flop a round never make the tile's {wanted:g}")
    return rounds


def _work(counter: Counter[Instruction]) -> Work:
    total = Work()
    for instruction, times in counter.items():
        total += work_of(instruction) * times
    return total


def _fma_flop(tile: Tile, counter: Counter[Instruction]) -> float:
    lanes = sum(n * (2 if i.opcode.startswith("FFMA2") else 1) for i, n in counter.items() if is_fma(i))
    return 2 * 32 * lanes


def _cycles(tile: Tile, work: Work, peak: int) -> dict[str, float]:
    rates = rates_of(tile.target)
    fp32, alu = work.fp32 / rates.fp32, work.alu / rates.alu
    if rates.unified:
        fp32 = alu = (work.fp32 + work.alu) / rates.fp32
    return {
        "matrix": work.matrix / peak,
        "special": work.special / rates.exponentials,
        "fp32": fp32,
        "alu": alu,
        "issue": work.issue / rates.issue,
        "shared": work.shared / rates.shared,
        "fill": work.filled / rates.shared,
    }


def _dram_bytes(tile: Tile) -> float:
    """A group of tile rows reads its rows once for all tiles beside one another, and every column once."""
    plan = tile.plan
    row = tile.depth * tile.element_bytes
    return plan.block_rows * row / tile.tile_cols + plan.block_cols * row / plan.group_rows
