"""Counting of disassembled kernels, and the bounds made of the counts, against hand-counted code."""

from __future__ import annotations

from collections import Counter

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from contrastile.backends.triton_sweep import launch_options  # noqa: E402
from contrastile.bench.static import bounds, disassembly, instructions, matrix, rates, report, table  # noqa: E402
from contrastile.bench.static.compile import Buffer, compile_kernel  # noqa: E402
from contrastile.bench.static.disassembly import Instruction  # noqa: E402
from contrastile.bench.static.matrix import (  # noqa: E402
    TARGETS,
    Configuration,
    bounded_configurations,
    covering_configurations,
)
from contrastile.kernels.plans import TilePlan  # noqa: E402
from support import INTERPRETING  # noqa: E402

needs_compiler = pytest.mark.skipif(INTERPRETING, reason="kernels are interpreted in this process, not compiled")

# Two rounds and a waiting loop within, a slow path of exponentials, a branch by call, an exit of some lanes.
SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R7 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_4:
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0 ;
        /*0040*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0050*/              @!PT LDS RZ, [RZ] ;
        /*0060*/               @P1 CALL.REL.NOINC `(.L_x_2) ;
        /*0070*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/                   MUFU.EX2 R3, R3 ;
        /*0090*/               @P1 BRA P2, `(.L_x_3) ;
        /*00a0*/                   MUFU.EX2 R4, R4 ;
        /*00b0*/                   MUFU.EX2 R5, R5 ;
.L_x_3:
        /*00c0*/              @!P0 EXIT ;
        /*00d0*/                   STG.E.128 [R2.64], R4 ;
        /*00e0*/                   EXIT ;
.L_x_0:
        /*00f0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R7 ;
        /*0100*/              @!P0 BRA `(.L_x_0) ;
        /*0110*/                   BRA `(.L_x_4) ;
.L_x_5:
        /*0120*/                   BRA `(.L_x_5);
"""

# A loop that may leave out its second half, a slow path, and a store for the lanes within bounds.
AMD = """
	s_load_dwordx2 s[0:1], s[0:1], 0x0
.LBB0_1:
	v_mfma_f32_32x32x8_bf16 v[2:17], v[26:27], v[30:31], v[2:17]
	s_cbranch_scc1 .LBB0_3
	v_mfma_f32_32x32x8_bf16 v[2:17], v[26:27], v[30:31], v[2:17]
.LBB0_3:
	s_cbranch_scc0 .LBB0_1
	s_and_saveexec_b64 s[0:1], vcc
	s_cbranch_execz .LBB0_4
	v_exp_f32_e32 v1, v1
	v_exp_f32_e32 v2, v2
.LBB0_4:
	s_and_saveexec_b64 s[0:1], vcc
	s_cbranch_execz .LBB0_5
	global_store_dwordx4 v[36:37], v[0:3], off
.LBB0_5:
	s_endpgm
.Lfunc_end0:
	s_code_end
"""


def opcodes(counter):
    return Counter(instruction.opcode for instruction in counter.elements())


def counts_of(blocks):
    matrix = [sum(map(instructions.is_matrix, block.instructions)) for block in blocks]
    return disassembly.count(blocks, matrix, instructions.is_matrix)


def test_sass_counts_the_loop_and_the_shortest_way_around_it():
    counts = counts_of(disassembly.parse_sass(SASS))
    assert opcodes(counts.before) == {"S2R": 1}
    assert opcodes(counts.loop) == {
        "BRA": 2,
        "CALL.REL.NOINC": 1,
        "HGMMA.64x128x16.F32.BF16": 1,
        "IADD3": 1,
        "NOP": 1,
        "SYNCS.PHASECHK.TRANS64.TRYWAIT": 1,
    }
    assert opcodes(counts.after) == {"BRA": 1, "EXIT": 2, "MUFU.EX2": 1, "STG.E.128": 1}


def test_amd_counts_whole_rounds_and_masked_stores_but_no_slow_path():
    counts = counts_of(disassembly.parse_amd(AMD))
    assert counts.loop[Instruction("v_mfma_f32_32x32x8_bf16", "v[2:17], v[26:27], v[30:31], v[2:17]")] == 2
    after = opcodes(counts.after)
    assert after["global_store_dwordx4"] == 1
    assert "v_exp_f32_e32" not in after


# A step whose atomic addition is branched around where all lanes are past the bounds, and a function that returns.
ATOMIC = """
.L_x_1:
        /*0010*/                   HMMA.16816.F32.BF16 R0, R1, R2, R0 ;
        /*0020*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm70_shflsync_bfly) ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/                   REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU [R2.64], R4 ;
.L_x_2:
        /*0050*/              @!P1 CALL.REL.NOINC `(.L_x_3) ;
        /*0060*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   EXIT ;
        .weak           $__internal_0_$__cuda_sm70_shflsync_bfly
        /*0080*/                   RET.REL.NODEC R4 `(gradient_kernel) ;
"""


def test_atomic_additions_of_inner_tiles_are_counted_and_functions_are_no_branches():
    blocks = disassembly.parse_sass(ATOMIC)
    assert opcodes(counts_of(blocks).loop) == {
        "HMMA.16816.F32.BF16": 1,
        "CALL.REL.NOINC": 2,
        "BRA": 2,
        "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU": 1,
    }


def test_an_unrolled_product_ends_at_its_last_matrix_instruction():
    text = "\n".join(
        f"        /*{16 * place:04x}*/                   {line} ;"
        for place, line in enumerate(
            ["FADD R0, R1, R2", "HMMA.16816.F32.BF16 R0, R1, R2, R0", "FMUL R0, R1, R2", "EXIT"]
        )
    )
    counts = counts_of(disassembly.parse_sass(text))
    assert opcodes(counts.before) == {"FADD": 1, "HMMA.16816.F32.BF16": 1}
    assert opcodes(counts.after) == {"EXIT": 1, "FMUL": 1}
    assert not counts.loop


def test_two_loops_of_products_are_refused():
    loop = "\n".join(
        f".L_x_{n}:\n        /*00{n}0*/  HMMA.16816.F32 R0, R1, R2, R0 ;\n        /*00{n}8*/  @P0 BRA `(.L_x_{n}) ;"
        for n in (1, 2)
    )
    blocks = disassembly.parse_sass(f"{loop}\n        /*0100*/  EXIT ;")
    with pytest.raises(RuntimeError, match="2 loops have matrix instructions"):
        counts_of(blocks)


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("HMMA.16816.F32.BF16", "R0, R1, R2, R0", {"matrix": 2 * 16 * 8 * 16}),
        ("HMMA.1688.F32.TF32", "R0, R1, R2, R0", {"matrix": 2 * 16 * 8 * 8}),
        # A warpgroup reads 64 + 128 rows of 32 bytes, or B's 128 where A is in registers; a warp has a quarter of it.
        ("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR20], R24", {"matrix": 65536, "shared": 192 * 32 / 4}),
        ("HGMMA.64x128x16.F32.BF16", "R24, R8, gdesc[UR20], R24", {"matrix": 65536, "shared": 128 * 32 / 4}),
        ("MUFU.EX2", "R3, R3", {"special": 32, "exponentials": 32}),
        ("MUFU.RCP", "R3, R3", {"special": 32}),
        ("FFMA", "R0, R1, R2, R0", {"fp32": 32}),
        ("FFMA2", "R0, R1, R2, R0", {"fp32": 64}),
        ("FSETP.GEU.AND", "P0, PT, R1, R2, PT", {"alu": 32}),
        ("LDSM.16.M88.4", "R16, [R56]", {"shared": 512}),
        ("LDSM.16.MT88.2", "R16, [R56]", {"shared": 256}),
        ("SHFL.BFLY", "PT, R1, R2, 0x1, 0x1f", {"shared": 128}),
        ("STS.128", "[R1], R4", {"shared": 512}),
        ("LDS.U16", "R4, [R1]", {"shared": 64}),
        ("LDGSTS.E.BYPASS.128", "[R51], [R2.64]", {"filled": 512, "loaded": 512}),
        ("LDG.E.64", "R4, [R2.64]", {"loaded": 256}),
        ("STG.E", "[R2.64], R4", {"stored": 128}),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "[R2.64], R4", {"stored": 128}),
        ("REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU", "[R2.64], R4", {"stored": 512}),
        ("STL.64", "[R1], R4", {"spilled": 256}),
        ("BAR.SYNC.DEFER_BLOCKING", "0x0", {}),
        ("v_mfma_f32_32x32x8_bf16", "v[2:17], v[26:27], v[30:31], v[2:17]", {"matrix": 2 * 32 * 32 * 8}),
        ("v_exp_f32_e32", "v1, v2", {"special": 64, "exponentials": 64}),
        ("v_pk_mul_f32", "v[0:1], v[2:3], v[4:5]", {"fp32": 64}),
        ("v_cndmask_b32_e32", "v1, v2, v3, vcc", {"alu": 64}),
        ("ds_read2st64_b64", "v[30:33], v94 offset1:16", {"shared": 64 * 16}),
        ("ds_write_b128", "v96, v[24:27] offset:16384", {"shared": 64 * 16}),
        ("global_load_dwordx4", "v[18:21], v[74:75], off", {"loaded": 64 * 16}),
        ("global_store_short", "v[0:1], v2, off", {"stored": 64 * 2}),
        ("global_atomic_add_f32", "v[0:1], v2, off", {"stored": 64 * 4}),
        ("s_barrier", "", {}),
    ],
)
def test_work_of_an_instruction(opcode, operands, expected):
    work = instructions.work_of(Instruction(opcode, operands))
    assert work == instructions.Work(issue=1, **expected)


def test_work_adds_up_over_warps_and_rounds():
    one = instructions.Work(issue=1, shared=128)
    assert one * 3 + instructions.Work(issue=2) == instructions.Work(issue=5, shared=384)


def test_rounds_of_the_main_loop_come_from_the_flop_of_a_tile():
    assert bounds._rounds(wanted=112, done=16, a_round=32, exact=True) == 3
    assert bounds._rounds(wanted=128, done=16, a_round=32, exact=True) == 3.5  # leaves in the middle of a round
    assert bounds._rounds(wanted=1000, done=40, a_round=100, exact=False) == 10
    assert bounds._rounds(wanted=64, done=64, a_round=0, exact=True) == 0
    with pytest.raises(RuntimeError, match="never make the tile's 100"):
        bounds._rounds(wanted=100, done=0, a_round=32, exact=True)
    with pytest.raises(RuntimeError, match="has 32 flop of matrix instructions a tile: expected 64"):
        bounds._rounds(wanted=64, done=32, a_round=0, exact=True)


def in_order(*lines):
    return [Instruction(*line.split(" ", 1)) if " " in line else Instruction(line, "") for line in lines]


PRODUCT, COPY, COMMIT = "HMMA.16816.F32 R0, R1, R2, R0", "LDGSTS.E.BYPASS.128 [R1], [R2.64]", "LDGDEPBAR"


@pytest.mark.parametrize(
    ("waits_until_left", "commits_after", "commits_before", "stages"),
    [
        (0, 1, 0, 1),  # the one stage there is room for is loaded when the products are done
        (1, 1, 0, 2),
        (0, 0, 1, 2),  # the next stage is asked for before the products
        (2, 1, 0, 3),
        (10, 2, 0, 6),  # a stage is two groups: ten of them are five stages beside the one in use
        (1, 2, 0, 1),  # half a stage is none
    ],
)
def test_stages_of_copies_are_those_that_products_do_not_wait_for(
    waits_until_left, commits_after, commits_before, stages
):
    loop = in_order(
        f"DEPBAR.LE SB0, 0x{waits_until_left:x}",
        "DEPBAR.LE SB1, 0x0",  # of something else
        *[COPY, COMMIT] * commits_before,
        PRODUCT,
        *[COPY, COMMIT] * commits_after,
    )
    for turn in range(len(loop)):  # wherever the round begins
        turned = loop[turn:] + loop[:turn]
        assert instructions.stages_of_async_copies(turned, instructions.is_matrix) == stages
    assert instructions.stages_of_async_copies(in_order(PRODUCT), instructions.is_matrix) == 1


def test_stages_of_an_unrolled_product_are_those_of_its_first_step():
    stage = [COPY, COMMIT, COPY, COMMIT]
    path = in_order(*stage, *stage, "DEPBAR.LE SB0, 0x2", PRODUCT, *stage, "DEPBAR.LE SB0, 0x0", PRODUCT, PRODUCT)
    assert instructions.stages_of_unrolled_copies(path, instructions.is_matrix) == 2
    path = in_order(*stage, "DEPBAR.LE SB0, 0x0", PRODUCT, *stage, "DEPBAR.LE SB0, 0x0", PRODUCT)
    assert instructions.stages_of_unrolled_copies(path, instructions.is_matrix) == 1
    loads = ["global_load_dwordx4 v[18:21], v[74:75], off"] * 2
    # The first step's loads are waited for in any case, and one of the second's is late.
    path = in_order(*loads, "s_waitcnt vmcnt(0)", loads[0], PRODUCT, loads[1], "s_waitcnt vmcnt(0)", PRODUCT)
    assert instructions.stages_of_register_loads(path, instructions.is_matrix, steps=2) == 2
    path = in_order(*loads, "s_waitcnt vmcnt(0)", PRODUCT, *loads, "s_waitcnt vmcnt(0)", PRODUCT)
    assert instructions.stages_of_register_loads(path, instructions.is_matrix, steps=2) == 1


def test_loads_into_registers_are_ahead_where_products_run_before_they_are_waited_for():
    load, write = "global_load_dwordx4 v[18:21], v[74:75], off", "ds_write_b128 v96, v[24:27]"
    product = "v_mfma_f32_32x32x8_bf16 v[2:17], v[26:27], v[30:31], v[2:17]"
    small = "global_load_dword v1, v[2:3], off"  # of the weights
    for lines, stages in (
        ((load, load, product, small, "s_waitcnt vmcnt(0)", write), 2),
        ((load, product, load, "s_waitcnt vmcnt(0)", write), 2),  # one of two is late
        ((load, "s_waitcnt vmcnt(0)", write, product), 1),
        ((load, "s_waitcnt vmcnt(1)", product, "s_waitcnt vmcnt(0)", write), 2),
        ((product,), 1),
    ):
        assert instructions.stages_of_register_loads(in_order(*lines), instructions.is_matrix) == stages


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
    found, plan = matrix.bound(configuration), configuration.plan
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
    expected = {(c.target, c.sweep, table.dtype_of(c), str(c.depth)) for c in bounded_configurations()}
    assert {tuple(row[name] for name in table.KEY) for row in rows} == expected
    assert all(table.is_kept(row) for row in rows)


def test_plain_lines_align_and_name_their_columns():
    lines = table.plain_lines([{"a": "1", "b": "long"}, {"a": "10", "b": "x"}], ("a", "b"))
    assert lines == ["a   b", "1   long", "10  x"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_bound_has_fallen(target):
    rows = [table.row_of(c) for c in covering_configurations() if c.target == target and c.is_bounded]
    assert table.regressions(table.read_rows(), filter(table.is_kept, rows)) == []
