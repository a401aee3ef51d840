"""From a compiled kernel to the bound that its instructions and the target's rates set.

A tile's work is what its warps run, by pipe: cycles = work / rate. The pipes of a multiprocessor work beside one
another, so a tile takes the multiprocessor at least as many cycles as its busiest pipe: that pipe bounds, and the
product's cycles by its own are the share of the matrix peak that this allows. Where only one block fits on a
multiprocessor, nothing runs beside it: the sums and exponentials of a tile wait for its product. The second bound adds
the two phases up, each by its own busiest pipe.

A program of the tile kernels computes one tile; the main loop is that of its product, over features. A program of the
fused kernel walks a line of tiles; its main loop is the line, a round is a tile with all of its products, and what is
done once, before and after, is shared out among the tiles. Its coefficients wait for the logits and are waited for by
the gradients, so they are the second phase. tcgen05 products run beside the warps: there the phases do not add up.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from contrastile.bench.static.compile import Compiled
from contrastile.bench.static.disassembly import (
    Block,
    Instruction,
    count,
    inner_round,
    loop_round,
    main_loop,
    number_of,
    parse_amd,
    parse_sass,
    whole_path,
    without_recomputed,
)
from contrastile.bench.static.instructions import (
    K_BYTES,
    Work,
    is_fma,
    is_matrix,
    matrix_kind,
    stages_of_async_copies,
    stages_of_register_loads,
    stages_of_unrolled_copies,
    vector_bytes,
    work_of,
)
from contrastile.bench.static.rates import blocks_resident, matrix_rate, rates_of
from contrastile.bench.static.tiles import Tile, Walk

PIPES = ("matrix", "special", "fp32", "alu", "issue", "shared", "fill")
LEAST_SHARE_OF_FMA = 0.4  # of a block's instructions, where multiply-adds make the product
ROUNDS_TOLERANCE = 0.35  # the epilogue's multiply-adds are counted with the product's
TENSOR_MEMORY_ROWS = 128  # of a tcgen05 product
GRADIENT_BYTES = 4  # float32
COPIES = ("LDGSTS",)


@dataclass(frozen=True)
class Traits:
    """What is there to see in a kernel of any sort."""

    kind: str  # of matrix instruction
    vector: int  # widest load from global memory, bytes a lane; 0: only TMA
    asynchronous: str  # "TMA", "cp.async" or "": how embeddings come into shared memory
    exponentials: float  # of all warps, each instruction of the kernel run once
    blocks: int  # resident on a multiprocessor


@dataclass(frozen=True)
class Bound:
    """Of one tile on one multiprocessor."""

    kind: str  # of matrix instruction
    rounds: float  # of the main loop; 0: unrolled
    stages: int  # of embeddings that the block holds: those multiplied and those on their way; 0: there is but one step
    work: Work  # all warps
    cycles: dict[str, float]  # by pipe
    blocks: int  # resident on a multiprocessor
    pipe: str  # the busiest
    peak_share: float  # of the matrix peak, at most
    peak_share_of_one_block: float  # where nothing runs beside a block; equal to peak_share where two fit
    l2_demand: float  # bytes a cycle that the product asks of the L2 cache at the matrix peak
    dram_demand: float  # of DRAM, in parts of its bandwidth, if L2 keeps what a group of tile rows shares and no more


def traits_of(compiled: Compiled) -> Traits:
    return _traits(compiled, [i for block in _parsed(compiled) for i in block.instructions])


def bound_of(tile: Tile, compiled: Compiled) -> Bound:
    blocks = _parsed(compiled)
    traits = _traits(compiled, [i for block in blocks for i in block.instructions])
    kind = traits.kind
    matrix = _matrix_instructions(blocks, kind)
    others = number_of(blocks, compiled.results)
    if compiled.recomputes:
        others = [n + m for n, m in zip(others, _first_time(blocks, number_of(blocks, COPIES), matrix), strict=True)]
        matrix = _first_time(blocks, matrix, matrix)
    phases = _phases if tile.walk is None else _walked_phases
    product, rest, rounds = phases(tile, compiled, blocks, kind, matrix, others)
    if traits.asynchronous == "TMA":
        embeddings = tile.embeddings * tile.depth * tile.element_bytes
        product += Work(filled=embeddings, loaded=embeddings)
    both = product + rest
    peak = matrix_rate(tile.target, tile.dtype, tile.precision)
    product_cycles, rest_cycles = cycles_of(tile.target, product, peak), cycles_of(tile.target, rest, peak)
    cycles = {pipe: product_cycles[pipe] + rest_cycles[pipe] for pipe in PIPES}
    pipe = max(cycles, key=lambda p: cycles[p])
    ideal = tile.flop / peak
    at_least = cycles[pipe] if traits.blocks > 1 else max(product_cycles.values()) + max(rest_cycles.values())
    dram = _dram_bytes(tile) + both.stored if tile.walk is None else _dram_bytes_of_walk(tile, tile.walk, traits.blocks)
    return Bound(
        kind=kind,
        rounds=rounds,
        stages=_stages(tile, compiled, traits, blocks, matrix, others),
        work=both,
        cycles=cycles,
        blocks=traits.blocks,
        pipe=pipe,
        peak_share=ideal / cycles[pipe],
        peak_share_of_one_block=ideal / at_least,
        l2_demand=(both.loaded + both.stored) / ideal,
        dram_demand=dram / rates_of(tile.target).dram / ideal,
    )


@lru_cache(maxsize=1)  # bounds at several depths follow one another
def _parsed(compiled: Compiled) -> list[Block]:
    return (parse_amd if compiled.is_amd else parse_sass)(compiled.assembly)


def _traits(compiled: Compiled, everything: list[Instruction]) -> Traits:
    opcodes = {i.opcode.split(".")[0] for i in everything}
    return Traits(
        kind=matrix_kind({i.opcode for i in everything}),
        vector=max(map(vector_bytes, everything)),
        asynchronous="TMA" if "UTMALDG" in opcodes else "cp.async" if "LDGSTS" in opcodes else "",
        exponentials=_work(Counter(everything)).exponentials * compiled.num_warps,
        blocks=blocks_resident(
            compiled.target, compiled.num_warps, compiled.registers, compiled.shared, compiled.tensor_memory
        ),
    )


def _stages(
    tile: Tile, compiled: Compiled, traits: Traits, blocks: list[Block], matrix: list[int], others: list[int]
) -> int:
    """By the groups of copies that a product does not wait for, or by what the compiler reserved for TMA. So too for
    tcgen05, whose products stand outside the blocks that every warp runs.
    """
    steps = -(-tile.depth // tile.plan.block_depth) if tile.walk is None else tile.walk.steps
    if steps == 1:
        return 0
    if traits.asynchronous == "TMA" or traits.kind == "tcgen05":
        return compiled.ring
    is_product = is_fma if traits.kind == "fma" else is_matrix
    is_loop = bool(main_loop(blocks, matrix))
    instructions = loop_round(blocks, matrix, others) if is_loop else whole_path(blocks, matrix)
    if compiled.is_amd:
        return stages_of_register_loads(instructions, is_product, 0 if is_loop else steps)
    return (stages_of_async_copies if is_loop else stages_of_unrolled_copies)(instructions, is_product)


def _matrix_instructions(blocks: list[Block], kind: str) -> list[int]:
    """How many a block has. Multiply-adds count where they are most of a block: elsewhere they are the epilogue's."""
    if kind != "fma":
        return [sum(map(is_matrix, block.instructions)) for block in blocks]
    found = [sum(map(is_fma, block.instructions)) for block in blocks]
    return [
        n if n > LEAST_SHARE_OF_FMA * len(block.instructions) else 0 for n, block in zip(found, blocks, strict=True)
    ]


def _first_time(blocks: list[Block], numbers: list[int], matrix: list[int]) -> list[int]:
    return without_recomputed(blocks, numbers, matrix, lambda i: bool(work_of(i).exponentials))


def _phases(
    tile: Tile, compiled: Compiled, blocks: list[Block], kind: str, matrix: list[int], others: list[int]
) -> tuple[Work, Work, float]:
    """Work of all warps for the product and after it, and the rounds of the main loop."""
    if kind == "tcgen05":
        return _tcgen05_phases(tile, compiled, blocks, matrix)
    counts = count(blocks, matrix, is_matrix if kind != "fma" else is_fma, others=others)
    before, loop, after = (_work(c) for c in (counts.before, counts.loop, counts.after))
    if kind == "fma":
        done, a_round = (_fma_flop(tile, c) for c in (counts.before, counts.loop))
    else:
        done, a_round = before.matrix, loop.matrix
    rounds = _rounds(tile.padded_flop / compiled.num_warps, done, a_round, exact=kind != "fma")
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
    rounds = _rounds(tile.padded_flop, outside * flop, in_loop * flop, exact=True)
    counts = count(blocks, _marks(blocks, main), lambda i: i.opcode.startswith("LDTM"), up_to_first=True)
    product = _work(counts.before) + _work(counts.loop) * rounds
    return (
        product * compiled.num_warps + one * (outside + in_loop * rounds),
        _work(counts.after) * compiled.num_warps,
        rounds,
    )


def _walked_phases(
    tile: Tile, compiled: Compiled, blocks: list[Block], kind: str, matrix: list[int], others: list[int]
) -> tuple[Work, Work, float]:
    """Work of all warps for a tile, without its coefficients and for these, and the rounds of the main loop."""
    assert tile.walk is not None
    if kind == "tcgen05":
        return _walked_tcgen05_phases(tile, tile.walk, compiled, blocks, matrix)
    counts = count(blocks, matrix, lambda _: False, others=others)
    once, loop = _work(counts.before) + _work(counts.after), _work(counts.loop)
    a_warp = tile.padded_flop / compiled.num_warps
    again = _again(a_warp, loop, _work(Counter(inner_round(blocks, matrix, others))))
    rounds = _rounds_of_walk(tile.walk, a_warp, once.matrix, (loop + again).matrix, exact=False)
    coefficients = Counter(_coefficients(loop_round(blocks, matrix, others)))
    a_tile = compiled.num_warps / tile.walk.steps
    return (
        ((_work(counts.loop - coefficients) + again) * rounds + once) * a_tile,
        _work(coefficients) * rounds * a_tile,
        rounds,
    )


def _again(wanted: float, a_round: Work, inner: Work) -> Work:
    """Of a loop within a round, which counts once there: all but its first run, by the flop that the round lacks."""
    if not inner.matrix:
        return Work()
    times = (wanted - a_round.matrix) / inner.matrix
    if times < 0 or times % 1:
        raise RuntimeError(f"{a_round.matrix:g} and {inner.matrix:g} flop a run never make a tile's {wanted:g}")
    return inner * times


def _walked_tcgen05_phases(
    tile: Tile, walk: Walk, compiled: Compiled, blocks: list[Block], matrix: list[int]
) -> tuple[Work, Work, float]:
    main = main_loop(blocks, matrix)
    in_loop = sum(matrix[i] for i in main)
    rounds = _rounds_of_walk(walk, _tcgen05_instructions(tile, walk), sum(matrix) - in_loop, in_loop, exact=True)
    counts = count(blocks, _marks(blocks, main), lambda _: False)
    warps = _work(counts.loop) * rounds + _work(counts.before) + _work(counts.after)
    in_tensor_memory = sum(
        i.opcode.startswith("UTCHMMA") and i.operands.startswith("tmem")
        for index in main
        for i in blocks[index].instructions
    )
    products = _tcgen05_products(tile, walk, in_tensor_memory * rounds / walk.steps)
    return warps * (compiled.num_warps / walk.steps) + products, Work(), rounds


def _tcgen05_instructions(tile: Tile, walk: Walk) -> float:
    """Of one tile: the logits' reduce over features, each gradient over the other side."""
    rows, cols, depth = tile.plan.block_rows, tile.plan.block_cols, tile.plan.block_depth
    reduced = depth + (rows if walk.owns_candidates else cols) + ((rows if not walk.owns_candidates else 0) * walk.both)
    return reduced * tile.element_bytes / K_BYTES


def _tcgen05_products(tile: Tile, walk: Walk, in_tensor_memory: float) -> Work:
    """All operands come from shared memory, but for coefficients of the owned side's gradient in tensor memory."""
    rows, cols, depth = tile.plan.block_rows, tile.plan.block_cols, tile.plan.block_depth
    owned, walked = (cols, rows) if walk.owns_candidates else (rows, cols)
    read = depth * (rows + cols) + walked * (owned + depth) + walk.both * owned * (walked + depth)
    return Work(
        matrix=tile.padded_flop,
        shared=read * tile.element_bytes - in_tensor_memory * owned * K_BYTES,
    )


def _rounds_of_walk(walk: Walk, a_tile: float, outside: float, a_round: float, exact: bool) -> float:
    """How often the main loop runs for all tiles but those, or parts of them, that are computed outside. A round is one
    tile: no compiler unrolls so long a body. It may compute one several times, where the warps' layout has more rows.
    """
    tiles = a_round / a_tile
    if tiles < 1 or (exact and tiles != 1):
        raise RuntimeError(f"a round of the main loop has the products of {tiles:g} tiles: expected one")
    return walk.steps - outside / a_round


def _coefficients(instructions: list[Instruction]) -> list[Instruction]:
    """Of a round: what stands between the logits' last matrix instruction and the gradients' first one."""
    exponentials = [place for place, i in enumerate(instructions) if work_of(i).exponentials]
    products = [place for place, i in enumerate(instructions) if is_matrix(i)]
    first = max((p for p in products if p < exponentials[0]), default=-1) + 1
    last = min((p for p in products if p > exponentials[-1]), default=len(instructions))
    return instructions[first:last]


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
    if rounds < 0 or (exact and rounds * 2 % 1):
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


def cycles_of(target: str, work: Work, peak: int) -> dict[str, float]:
    """Of a multiprocessor, by pipe; `peak` is the rate of the matrix unit."""
    rates = rates_of(target)
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


def _dram_bytes_of_walk(tile: Tile, walk: Walk, blocks: int) -> float:
    """Resident programs walk the same tiles side by side: what they read, and the sums that they add to, comes and goes
    once for all of them. The owned rows and their gradient do so once a program.
    """
    plan, row, gradient = tile.plan, tile.depth * tile.element_bytes, 2 * tile.depth * GRADIENT_BYTES
    walked, owned = plan.block_cols, plan.block_rows
    if walk.owns_candidates:
        walked, owned = owned, walked
    programs = rates_of(tile.target).multiprocessors * max(1, blocks)
    of_walked = row + gradient if walk.both else row
    return owned * (row + gradient) / walk.steps + walked * of_walked / programs
