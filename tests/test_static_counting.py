"""Disassembled kernels: blocks, loops, the work of an instruction and the stages of loads, by hand-counted code."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("triton")

from contrastile.bench.static import disassembly, instructions
from contrastile.bench.static.disassembly import Instruction
from static_code import PRODUCT, in_order

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


# A walk: the next tile's copies unless there is none, logits, exponentials, a slow path with logits again and copies
# of its own, and a gradient in a loop.
WALK = """
.L_x_1:
        /*0010*/               @P0 BRA `(.L_x_2) ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R51], [R2.64] ;
.L_x_2:
        /*0030*/                   HMMA.16816.F32.BF16 R0, R1, R2, R0 ;
        /*0040*/                   MUFU.EX2 R3, R3 ;
        /*0050*/              @!P1 BRA `(.L_x_4) ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R51], [R2.64] ;
.L_x_3:
        /*0070*/                   HMMA.16816.F32.BF16 R8, R1, R2, R8 ;
        /*0080*/               @P2 BRA `(.L_x_3) ;
        /*0090*/                   MUFU.EX2 R3, R3 ;
.L_x_4:
        /*00a0*/                   HMMA.16816.F32.BF16 R16, R1, R2, R16 ;
        /*00b0*/               @P3 BRA `(.L_x_4) ;
        /*00c0*/               @P4 BRA `(.L_x_1) ;
        /*00d0*/                   EXIT ;
"""


def test_a_slow_path_with_the_product_again_is_no_part_of_a_round_and_copies_are():
    blocks = disassembly.parse_sass(WALK)

    def first_time(numbers):
        return disassembly.without_recomputed(blocks, numbers, matrix, lambda i: i.opcode == "MUFU.EX2")

    matrix = disassembly.number_of(blocks, ("HMMA",))
    copies = disassembly.number_of(blocks, ("LDGSTS",))
    assert (sum(matrix), sum(first_time(matrix))) == (3, 2)
    assert (sum(copies), sum(first_time(copies))) == (2, 1)
    counts = disassembly.count(blocks, first_time(matrix), instructions.is_matrix, others=first_time(copies))
    once = {"LDGSTS.E.BYPASS.128": 1, "HMMA.16816.F32.BF16": 2, "MUFU.EX2": 1, "BRA": 4}
    assert opcodes(counts.loop) == once
    inner = disassembly.inner_round(blocks, first_time(matrix), first_time(copies))
    assert [i.opcode for i in inner] == ["HMMA.16816.F32.BF16", "BRA"]


def test_two_products_after_one_another_are_the_product_and_the_one_again():
    text = WALK.replace("@P4 BRA `(.L_x_1)", "@P4 NOP").replace(".L_x_2:", ".L_x_5:\n.L_x_2:")
    text = text.replace("/*0040*/", "/*0038*/  @P5 BRA `(.L_x_5) ;\n        /*0040*/")
    blocks = disassembly.parse_sass(text.partition(".L_x_4:")[0] + ".L_x_4:\n        /*00d0*/  EXIT ;\n")
    matrix = disassembly.number_of(blocks, ("HMMA",))
    with pytest.raises(RuntimeError, match="2 loops have matrix instructions"):
        counts_of(blocks)
    kept = disassembly.without_recomputed(blocks, matrix, matrix, lambda i: i.opcode == "MUFU.EX2")
    counts = disassembly.count(blocks, kept, instructions.is_matrix, others=[0] * len(blocks))
    assert opcodes(counts.loop) == {"HMMA.16816.F32.BF16": 1, "BRA": 1}
    assert opcodes(counts.after)["MUFU.EX2"] == 1


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


COPY, COMMIT = "LDGSTS.E.BYPASS.128 [R1], [R2.64]", "LDGDEPBAR"


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
