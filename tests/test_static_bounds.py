"""Bounds made of the counts of a kernel, the rates they come from, and the committed table of them."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from contrastile.backends.triton_launches import launch_options  # noqa: E402
from contrastile.bench.static import bounds, cuda, disassembly, instructions, launches, matrix, rates, report, table  # noqa: E402
from contrastile.bench.static.compile import Buffer, compile_kernel  # noqa: E402
from contrastile.bench.static.matrix import (  # noqa: E402
    TARGETS,
    Configuration,
    bounded_configurations,
    covering_configurations,
)
from contrastile.kernels.plans import TilePlan  # noqa: E402
from static_code import PRODUCT, in_order  # noqa: E402
from support import INTERPRETING  # noqa: E402

needs_compiler = pytest.mark.skipif(INTERPRETING, reason="kernels are interpreted in this process, not compiled")


def test_rounds_of_the_main_loop_come_from_the_flop_of_a_tile():
    assert bounds._rounds(wanted=112, done=16, a_round=32, exact=True) == 3
    assert bounds._rounds(wanted=128, done=16, a_round=32, exact=True) == 3.5  # leaves in the middle of a round
    assert bounds._rounds(wanted=1000, done=40, a_round=100, exact=False) == 10
    assert bounds._rounds(wanted=64, done=64, a_round=0, exact=True) == 0
    with pytest.raises(RuntimeError, match="never make the tile's 100"):
        bounds._rounds(wanted=100, done=0, a_round=32, exact=True)
    with pytest.raises(RuntimeError, match="has 32 flop of matrix instructions a tile: expected 64"):
        bounds._rounds(wanted=64, done=32, a_round=0, exact=True)


WALKED = TilePlan(64, 32, 256, 1, 4, 3, False)


def walk_tile(target="sm_80", depth=200, **walk):
    return bounds.Tile(target, WALKED, depth, "bf16", "ieee", 2, 64, bounds.Walk(**{"steps": 10, **walk}))


@pytest.mark.parametrize(("owns_candidates", "both"), [(False, True), (False, False), (True, False)])
def test_a_walked_tile_counts_its_products_and_shares_out_what_is_owned(owns_candidates, both):
    tile = walk_tile(owns_candidates=owns_candidates, both=both)
    assert tile.flop == (3 if both else 2) * 2 * 64 * 32 * 200
    assert tile.padded_flop == tile.flop / 200 * 256
    assert tile.embeddings == (64 + 32 / 10 if owns_candidates else 32 + 64 / 10)
    gradient = 2 * 4 * 200
    programs = 108 * 2
    owned, walked = (32, 64) if owns_candidates else (64, 32)
    expected = owned * (400 + gradient) / 10 + walked * (400 + gradient * both) / programs
    assert bounds._dram_bytes_of_walk(tile, tile.walk, 2) == pytest.approx(expected)


def test_rounds_of_a_walk_are_its_steps_but_for_what_is_computed_outside():
    walk = bounds.Walk(10, False, True)
    assert bounds._rounds_of_walk(walk, 30, 0, 30, exact=True) == 10
    assert bounds._rounds_of_walk(walk, 30, 15, 30, exact=True) == 9.5
    assert bounds._rounds_of_walk(walk, 30, 0, 40, exact=False) == 10  # a third is computed twice
    assert bounds._rounds_of_walk(walk, 30, 0, 120, exact=False) == 10  # all of it four times
    for a_round, exact in ((40, True), (60, True), (20, False)):
        with pytest.raises(RuntimeError, match=f"products of {a_round / 30:g} tiles"):
            bounds._rounds_of_walk(walk, 30, 0, a_round, exact)


def test_a_loop_within_a_round_runs_as_often_as_the_flop_of_a_tile_says():
    once, inner = instructions.Work(issue=50, matrix=80), instructions.Work(issue=5, matrix=16)
    assert bounds._again(96, once, inner) == instructions.Work(issue=5, matrix=16)
    assert bounds._again(80, once, inner) == instructions.Work()
    assert bounds._again(96, once, instructions.Work()) == instructions.Work()
    for wanted in (88, 64):
        with pytest.raises(RuntimeError, match=f"never make a tile's {wanted}"):
            bounds._again(wanted, once, inner)


def test_coefficients_are_what_stands_between_logits_and_gradients():
    round_ = in_order("LDSM.16.M88.4 R1", PRODUCT, "FMUL R3", "MUFU.EX2 R3", "FADD R3", PRODUCT, "REDG.E.ADD.F32x4 R1")
    assert [i.opcode for i in bounds._coefficients(round_)] == ["FMUL", "MUFU.EX2", "FADD"]


def test_tcgen05_products_read_their_operands_from_shared_memory_but_for_those_in_tensor_memory():
    plan = TilePlan(128, 64, 256, 1, 8, 2, True)
    tile = bounds.Tile("sm_100", plan, 256, "bf16", "ieee", 2, 64, bounds.Walk(10, False, True))
    assert bounds._tcgen05_instructions(tile, tile.walk) == 256 / 16 + 64 / 16 + 128 / 16
    # A product of 16 deep reads 32 bytes for every row of both its operands.
    read = 16 * (128 + 64) * 32 + 4 * (128 + 256) * 32 + 8 * (64 + 256) * 32
    assert bounds._tcgen05_products(tile, tile.walk, 0).shared == read
    assert bounds._tcgen05_products(tile, tile.walk, 4).shared == read - 4 * 128 * 32


@pytest.mark.parametrize(
    ("target", "teraflops", "gigahertz", "multiprocessors"),
    [
        ("sm_80", 312, 1.41, 108),
        ("sm_86", 154.8, 1.80, 84),
        ("sm_90", 989.4, 1.83, 132),
        ("sm_100", 2250, 1.85, 148),
        ("sm_120", 503.8, 2.617, 188),
        ("gfx942", 1307.4, 2.10, 304),
    ],
)
def test_matrix_rates_are_those_of_the_data_sheets(target, teraflops, gigahertz, multiprocessors):
    published = teraflops * 1e3 / gigahertz / multiprocessors
    assert rates.matrix_rate(target, "bf16", "ieee") == pytest.approx(published, rel=0.01)
    assert rates.matrix_rate(target, "fp32", "tf32") == pytest.approx(published / 2, rel=0.01)


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "tensor_memory", "blocks"),
    [
        ("sm_90", 8, 168, 0, 0, 1),
        ("sm_90", 8, 128, 0, 0, 2),
        ("sm_90", 4, 128, 98328, 0, 2),  # 228 KiB hold two
        ("sm_90", 4, 256, 0, 0, 0),  # more registers than a thread has
        ("sm_100", 4, 64, 0, 256, 2),  # 512 columns of tensor memory
        ("sm_86", 4, 32, 0, 0, 12),  # 48 warps
        ("sm_86", 4, 32, 100 * 1024, 0, 0),
        ("gfx942", 8, 128, 32768, 0, 2),
        ("gfx942", 8, 136, 32768, 0, 1),
    ],
)
def test_blocks_resident_on_a_multiprocessor(target, warps, registers, shared, tensor_memory, blocks):
    assert rates.blocks_resident(target, warps, registers, shared, tensor_memory) == blocks


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match="sm_70"):
        rates.rates_of("sm_70")
    with pytest.raises(ValueError, match="which is 'most'"):
        report.report("most")


@triton.jit
def exponential_kernel(source, target, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, tl.exp2(tl.load(source + place)))


@triton.jit
def product_kernel(x, y, target, DEPTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DEPTH: tl.constexpr):
    row, feature = tl.arange(0, BLOCK), tl.arange(0, BLOCK_DEPTH)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in tl.range(0, DEPTH, BLOCK_DEPTH):
        place = row[:, None] * DEPTH + first + feature[None, :]
        total = tl.dot(tl.load(x + place), tl.load(y + place).T, total)
    tl.store(target + row[:, None] * BLOCK + row[None, :], total)


@needs_compiler
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_a_kernel_of_exponentials_counts_one_for_every_element(target):
    arguments = {"source": Buffer(torch.float32), "target": Buffer(torch.float32), "BLOCK": 2048}
    kernel = compile_kernel(exponential_kernel, arguments, launch_options(4, 1), target)
    blocks = (disassembly.parse_amd if kernel.is_amd else disassembly.parse_sass)(kernel.assembly)
    counts = disassembly.count(blocks, [0] * len(blocks), lambda _: False)
    work = bounds._work(counts.after) * 4
    assert (work.exponentials, work.loaded, work.stored) == (2048, 4 * 2048, 4 * 2048)
    assert work.matrix == work.shared == work.spilled == kernel.spilled == 0


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
def test_a_plain_product_counts_its_own_flop_and_bytes(target):
    depth, block, block_depth = 256, 64, 64
    arguments = {
        **{name: Buffer(torch.bfloat16) for name in ("x", "y")},
        **{"target": Buffer(torch.float32), "DEPTH": depth, "BLOCK": block, "BLOCK_DEPTH": block_depth},
    }
    kernel = compile_kernel(product_kernel, arguments, launch_options(4, 2), target)
    plan = TilePlan(block, block, block_depth, 1, 4, 2, False)
    found = bounds.bound_of(bounds.Tile(target, plan, depth, "bf16", "ieee", 2, 1), kernel)
    assert found.kind == {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}.get(target, "mma.sync")
    assert found.work.matrix == 2 * block * block * depth
    assert found.work.exponentials == 0
    assert found.work.stored == 4 * block * block
    read = 2 * block * depth * 2
    # The last rounds' loads of what is not there any more are counted, though masked.
    assert read <= found.work.loaded <= read * 2


@needs_compiler
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_fused_kernel_counts_a_tile_and_its_atomic_additions(target):
    configuration = Configuration(target, "fused", "bf16", 64)
    found, plan = launches.bound(configuration), configuration.plan
    tile_flop = 3 * 2 * plan.block_rows * plan.block_cols * 64
    assert found.work.matrix == pytest.approx(tile_flop, rel=1e-6)
    assert found.work.exponentials >= plan.block_rows * plan.block_cols
    # The candidates' gradient goes out with every tile, the anchors' once; a pipelined loop leaves out part of a tile.
    steps = matrix.FUSED_WINDOW / plan.block_cols
    assert found.work.stored == pytest.approx(4 * 64 * (plan.block_cols + plan.block_rows / steps), rel=5e-3)
    assert found.peak_share_of_one_block <= found.peak_share < 1


def committed_row(**changes):
    return {**table.read_rows()[0], **changes}


def test_a_bound_that_falls_by_more_than_three_percent_is_named():
    before = [committed_row(peak_share="0.800", one_block_share="0.600")]
    assert table.regressions(before, [committed_row(peak_share="0.780", one_block_share="0.600")]) == []
    fallen = table.regressions(before, [committed_row(peak_share="0.800", one_block_share="0.570")])
    assert len(fallen) == 1
    assert "one_block_share was 0.600, is 0.570" in fallen[0]
    with pytest.raises(ValueError, match="no committed bound"):
        table.regressions(before, [committed_row(D="7")])


def test_the_committed_table_has_a_row_for_every_configuration_in_order():
    rows = table.read_rows()
    assert table.text_of(rows) == table.COMMITTED.read_text()
    expected = {(c.target, c.sweep, table.dtype_of(c), str(c.depth), "triton") for c in bounded_configurations()}
    of_cuda = {(*named[:3], str(named[3]), "cuda") for named in cuda.bounded()}
    assert {tuple(row[name] for name in table.KEY) for row in rows} == expected | of_cuda
    assert all(table.is_kept(row) == (row["source"] == "triton") for row in rows)
    assert len({row["compiler"] for row in rows}) == 2


def test_plain_lines_align_and_name_their_columns():
    lines = table.plain_lines([{"a": "1", "b": "long"}, {"a": "10", "b": "x"}], ("a", "b"))
    assert lines == ["a   b", "1   long", "10  x"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_bound_has_fallen(target):
    made_with = next(row["compiler"] for row in table.read_rows() if row["source"] == "triton")
    if made_with != f"triton {triton.__version__}":
        pytest.skip(f"the table was made with {made_with}, this is {triton.__version__}")
    rows = [table.row_of(c) for c in covering_configurations() if c.target == target and c.is_bounded]
    assert table.regressions(table.read_rows(), filter(table.is_kept, rows)) == []
