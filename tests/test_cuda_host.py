"""The layer that runs CUDA kernels on a host: what it computes, and that each fault it is there for is reported.

Expectations are written from the PTX ISA's formulas for fragments, not from the layer's. With CUDA_HOST_SANITIZER
set the kernels are built with that sanitizer; the last test runs the others so in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cuda_host import build as host

SOURCE = host.HERE / "self_test.cu"
SANITIZER = os.environ.get("CUDA_HOST_SANITIZER", "")
random = np.random.default_rng(0)

pytestmark = pytest.mark.skipif(host.compiler() is None, reason="there is no C++ compiler")

SCHEDULES = [
    {},
    {"blocks": "reversed"},
    *({"blocks": "random", "random_threads": True, "seed": seed} for seed in range(5)),
]


class Kernels:
    """run(kernel, arrays, numbers) of self_test_exports.h."""

    def __init__(self, checks: bool):
        self.checks = checks
        self.library = host.Library(host.build([SOURCE], SANITIZER, checks))

    def __call__(self, name: str, *arrays: np.ndarray, numbers: tuple[int, ...] = (), **settings) -> host.Report:
        self.library.configure(**settings)
        buffers = (ctypes.c_void_p * max(1, len(arrays)))(*(array.ctypes.data for array in arrays))
        return self.library.call("run", name.encode(), buffers, (ctypes.c_int * max(1, len(numbers)))(*numbers))


@pytest.fixture(scope="module")
def checked() -> Kernels:
    return Kernels(checks=True)


@pytest.fixture(scope="module")
def plain() -> Kernels:
    return Kernels(checks=False)


@pytest.fixture(params=["checked", "plain"])
def kernels(request) -> Kernels:
    return request.getfixturevalue(request.param)


# Blocks, barriers, lanes


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_blocks_sum_by_shuffles_shared_memory_and_atomics(kernels, schedule):
    values = random.integers(-1000, 1000, 5 * 96).astype(np.float32)
    total = np.zeros(1, np.float32)
    kernels("grid_sum", total, values, numbers=(5, 96), **schedule)
    assert total[0] == values.sum()


def test_schedule_sets_the_order_of_blocks_and_threads(kernels):
    def drawn(**schedule) -> np.ndarray:
        tickets = np.zeros((6, 32), np.uint32)
        kernels("tickets", tickets, np.zeros(1, np.uint32), numbers=(6,), **schedule)
        assert (np.sort(tickets.ravel()) == np.arange(6 * 32)).all()
        return tickets

    in_turn = np.arange(6 * 32).reshape(6, 32)
    assert (drawn() == in_turn).all()
    assert (drawn(blocks="reversed") == in_turn[::-1]).all()
    seeds = [drawn(blocks="random", random_threads=True, seed=seed) for seed in (1, 1, 2)]
    assert (seeds[0] == seeds[1]).all()
    for some in (seeds[0], seeds[2]):
        assert (np.diff(some[:, 0] // 32) != 1).any()
        assert (np.diff(some[0].astype(int)) != 1).any()
    assert (seeds[0] != seeds[2]).any()
    assert len({drawn(random_threads=True, seed=seed)[0].argmin() for seed in range(8)}) > 4  # who comes first


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_barrier_orders_what_threads_exchange(kernels, schedule):
    values, reversed_values = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    kernels("reverse", reversed_values, values, numbers=(0,), **schedule)
    assert (reversed_values == values[::-1]).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    "fault", [1, 2, 6], ids=["no barrier", "a warp's barrier between warps", "no barrier before the next write"]
)
def test_missing_barrier_is_a_race_in_every_schedule(checked, fault, schedule):
    # Which side of the exchange comes second, and so reports it, is the schedule's choice.
    message = (
        r"self_test::reverse, block \(0, 0, 0\), thread \(\d+, 0, 0\): race: (load|store)_shared at self_test.cu:\d+ "
        r"of shared memory at offset \d+ conflicts with a (write|read) by thread \d+ with no barrier between"
    )
    with pytest.raises(host.KernelFailure, match=message):
        checked("reverse", np.zeros(64, np.int32), np.zeros(64, np.int32), numbers=(fault,), **schedule)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (3, r"threads wait for others that do not come: 63 in block_barrier at self_test.cu:\d+ .* 1 have exited"),
        (4, r"divergent barrier: this thread is at self_test.cu:\d+, thread 0 at self_test.cu:\d+"),
        (5, r"threads wait for others .* 1 have exited"),
    ],
    ids=["a thread returns", "two places", "a thread exits early"],
)
def test_divergent_block_barrier_fails(kernels, fault, message):
    with pytest.raises(host.KernelFailure, match=message):
        kernels("reverse", np.zeros(64, np.int32), np.zeros(64, np.int32), numbers=(fault,))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_named_barriers_hand_over_between_warps(kernels, schedule):
    rounds = 4
    got = np.zeros((rounds, 32), np.int32)
    kernels("hand_over", got, numbers=(rounds, 0), **schedule)
    assert (got == 100 * np.arange(rounds)[:, None] + (np.arange(32) ^ 1)).all()


def test_reading_without_the_named_barrier_is_a_race(checked):
    with pytest.raises(host.KernelFailure, match=r"race: load_shared .* write by thread"):
        checked("hand_over", np.zeros((1, 32), np.int32), numbers=(1, 1))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (2, "barrier 1 was reached by 16 lanes of warp 0, not by all 32"),
        (3, "barrier 1 for 64 threads, but thread 0 came for 96"),
        (4, "comes to barrier 1 a second time"),
    ],
    ids=["half a warp", "another count", "twice"],
)
def test_misused_named_barrier_fails(kernels, fault, message):
    with pytest.raises(host.KernelFailure, match=message):
        kernels("hand_over", np.zeros((1, 32), np.int32), numbers=(1, fault))


def test_shuffles_and_votes(kernels):
    got = np.zeros((6, 32), np.uint32)
    kernels("lanes", got, numbers=(0,))
    lane = np.arange(32)
    expected = [
        np.full(32, 5),
        np.where(lane < 3, lane, lane - 3),
        np.where(lane + 3 > 31, lane, lane + 3),
        lane ^ 7,
        np.full(32, 1 + 8),
        np.full(32, sum(1 << each for each in range(0, 32, 3))),
    ]
    assert (got == np.array(expected)).all()


def test_halves_of_a_warp_meet_on_their_own(kernels):
    got = np.zeros(32, np.uint32)
    kernels("lanes", got, numbers=(5,), random_threads=True, seed=3)
    low = 0x5555 + 300
    high = 0x55550000 + 1900
    assert (got == np.where(np.arange(32) < 16, low, high)).all()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, r"31 in shuffle at self_test.cu:\d+ .* 1 have exited"),
        (2, "divergent warp: lane 2 is at vote_any .*, lane 0 at shuffle"),
        (3, r"thread \(31, 0, 0\): shuffle .* for lanes 0x7fffffff, of which this is none"),
        (4, "shuffle_xor .* reads lane 16, which lanes 0x0000ffff leave out"),
    ],
    ids=["a lane exits", "another operation", "outside its mask", "reads outside the mask"],
)
def test_divergent_warp_fails(kernels, fault, message):
    with pytest.raises(host.KernelFailure, match=message):
        kernels("lanes", np.zeros(192, np.uint32), numbers=(fault,))


# Shared memory and asynchronous copies


@pytest.mark.parametrize(
    ("target", "limit"),
    [("sm_80", 163), ("sm_86", 99), ("sm_89", 99), ("sm_90", 227), ("sm_100", 227), ("sm_120", 99)],
)
def test_shared_memory_beyond_the_target_is_refused(kernels, target, limit):
    kernels("shared_bytes", numbers=(1024 * limit,), target=target)
    message = f"self_test::strided<float> cannot be launched: .* {target} has {1024 * limit}"
    with pytest.raises(host.KernelFailure, match=message):
        kernels("shared_bytes", numbers=(1024 * limit + 1,), target=target)


@pytest.mark.parametrize("threads", [0, 33, 1056])
def test_blocks_that_no_device_takes_are_refused(kernels, threads):
    with pytest.raises(host.KernelFailure, match="whole warps, 1024 threads at most"):
        kernels("threads", numbers=(threads,))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, "misaligned access to global memory .* 16 bytes, 8 past a multiple"),
        (2, "misaligned access to global memory .* 4 bytes, 2 past"),
        (3, "misaligned access to shared memory .* 16 bytes, 4 past"),
        (4, "misaligned access to shared memory .* 8 bytes, 4 past"),
        (5, "misaligned access to global memory .* 8 bytes, 4 past"),
        (6, "misaligned access to shared memory .* 16 bytes, 8 past"),
        (7, "misaligned access to shared memory .* 16 bytes, 8 past"),
        (8, "access outside shared memory .* 4 bytes at offset 128 of 128"),
        (9, "misaligned access to global memory .* 4 bytes, 2 past"),
    ],
)
def test_misplaced_access_fails(kernels, fault, message):
    memory = np.zeros(64, np.complex128)
    kernels("misplaced", memory, numbers=(0,))
    with pytest.raises(
        host.KernelFailure, match=r"self_test::misplaced, block \(0, 0, 0\), thread \(4, 0, 0\): " + message
    ):
        kernels("misplaced", memory, numbers=(fault,))


def test_each_block_starts_from_poison(kernels):
    got = np.zeros((2, 32), np.float32)
    report = kernels("half_written", got, np.arange(16, dtype=np.float32), numbers=(2,))
    assert (got[:, :16] == np.arange(16)).all()
    assert np.isnan(got[:, 16:]).all()
    assert report.unwritten_bytes_read == (2 * 16 * 4 if kernels.checks else 0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("tail", [0, 3, 16])
def test_async_copies_land_at_their_wait_and_fill_with_zeros(kernels, tail, schedule):
    steps = 3
    pieces = random.integers(0, 256, (steps, 64, 16)).astype(np.uint8)
    got = np.zeros_like(pieces)
    kernels("copy_through_stages", got, pieces, numbers=(steps, tail, 0), **schedule)
    pieces[-1, -1, tail:] = 0
    assert (got == pieces[:, np.arange(64) ^ 1]).all()


def test_waiting_one_stage_early_reads_poison(plain):
    pieces, got = np.ones((3, 64, 4), np.float32), np.zeros((3, 64, 4), np.float32)
    plain("copy_through_stages", got, pieces, numbers=(3, 16, 1))
    assert np.isnan(got[:2]).all()  # in the third step the first copy lands late, on the third's place


def test_what_a_place_held_is_gone_once_the_next_copy_is_issued(plain):
    pieces, got = np.ones((3, 64, 4), np.float32), np.zeros((3, 64, 4), np.float32)
    plain("copy_through_stages", got, pieces, numbers=(3, 16, 4))
    assert np.isnan(got[1]).all()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, "race: load_shared .* conflicts with a cp.async in flight by thread"),
        (2, r"race: (cp_async|load_shared) .* conflicts with a (cp.async in flight|write|read) by thread"),
        (3, "conflicts with a cp.async in flight by thread"),
    ],
    ids=["one stage early", "no barrier after the wait", "never waited"],
)
def test_copy_that_has_not_landed_is_a_race(checked, fault, message):
    with pytest.raises(host.KernelFailure, match=message):
        checked(
            "copy_through_stages",
            np.zeros((3, 64, 4), np.float32),
            np.ones((3, 64, 4), np.float32),
            numbers=(3, 16, fault),
        )


def test_copies_nobody_waits_for_are_counted(plain):
    report = plain(
        "copy_through_stages", np.zeros((1, 64, 4), np.float32), np.ones((1, 64, 4), np.float32), numbers=(1, 16, 3)
    )
    assert report.copies_never_waited_for == 64


def test_small_async_copies(kernels):
    words, got = random.integers(0, 256, 64 * 4).astype(np.uint8), np.zeros(96 * 4, np.uint8)
    kernels("small_copies", got, words)
    for lane in range(32):
        assert (got[4 * lane :][:4] == np.where(np.arange(4) < lane % 5, words[4 * lane :][:4], 0)).all()
        assert (got[128 + 8 * lane :][:8] == np.where(np.arange(8) < lane % 9, words[8 * lane :][:8], 0)).all()


# Banks


@pytest.mark.parametrize(
    ("size", "stride", "passes", "conflicts"),
    [
        (4, 1, 1, 0),
        (4, 2, 2, 1),
        (4, 32, 32, 31),
        (4, 33, 1, 0),
        (4, 0, 1, 0),  # one word, given to all
        (2, 1, 1, 0),  # two lanes a word
        (2, 64, 32, 31),
        (8, 1, 2, 0),
        (8, 2, 4, 2),
        (16, 1, 4, 0),
        (16, 2, 8, 4),
        (16, 8, 32, 28),
        (16, 9, 4, 0),
    ],
)
def test_bank_conflicts_of_a_stride(checked, size, stride, passes, conflicts):
    if stride == 0:  # stores of many lanes to one place are a race
        with pytest.raises(host.KernelFailure, match="race: store_shared"):
            checked("strided", numbers=(size, stride, 1))
        return
    repeats = 3
    report = checked("strided", numbers=(size, stride, repeats))
    for banks in (report.loads, report.stores):
        assert (banks.requests, banks.wavefronts, banks.conflicts) == (repeats, repeats * passes, repeats * conflicts)


@pytest.mark.parametrize(("swizzled", "conflicts_per_matrix"), [(False, 7), (True, 0)])
def test_ldmatrix_of_128_byte_rows_conflicts_unless_swizzled(checked, swizzled, conflicts_per_matrix):
    tile = random.integers(0, 1 << 16, (64, 64)).astype(np.uint16)
    got = np.zeros((4, 4, 4, 32, 2), np.uint16)  # by 16 rows, 16 columns, matrix, lane, half
    report = checked("read_tile", got, tile, numbers=(swizzled,))
    matrices = tile.reshape(4, 2, 8, 4, 2, 8).transpose(0, 3, 4, 1, 2, 5)  # rows, columns, right, low, 8, 8
    assert (got == matrices.reshape(4, 4, 4, 32, 2)).all()
    assert report.matrix_loads.requests == 16
    assert report.matrix_loads.conflicts == 16 * 4 * conflicts_per_matrix
    assert report.stores.conflicts == 0


# Matrices: element i of a lane's fragment, as the PTX ISA places it

LANE = np.arange(32)[:, None]
GROUP, MEMBER = LANE >> 2, LANE % 4


def registers(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(32, count) elements, 16-bit ones two a register with the first in the lower half."""
    return np.ascontiguousarray(matrix[rows, columns]).view(np.uint32)


def bits(values: np.ndarray, element: str) -> np.ndarray:
    """Numbers that the format holds exactly, as its bits."""
    if element == "f16":
        return values.astype(np.float16).view(np.uint16)
    words = values.astype(np.float32).view(np.uint32)
    return words if element == "tf32" else (words >> 16).astype(np.uint16)


@pytest.mark.parametrize("element", ["bf16", "f16", "tf32"])
def test_product_takes_and_gives_fragments_as_documented(kernels, element):
    depth = 8 if element == "tf32" else 16
    a, b = random.integers(-99, 99, (16, depth)), random.integers(-99, 99, (depth, 8))
    c = random.integers(-999, 999, (16, 8)).astype(np.float32)
    i = np.arange(8)
    if element == "tf32":
        i = np.arange(4)
        a_place = GROUP + 8 * ((i == 1) | (i == 3)), MEMBER + 4 * (i >= 2)
        b_place = MEMBER + 4 * i[:2], np.broadcast_to(GROUP, (32, 2))
    else:
        first_rows = (i < 2) | ((i >= 4) & (i < 6))
        a_place = np.where(first_rows, GROUP, GROUP + 8), 2 * MEMBER + (i & 1) + 8 * (i >= 4)
        b_place = 2 * MEMBER + (i[:4] & 1) + 8 * (i[:4] >= 2), np.broadcast_to(GROUP, (32, 4))
    c_place = GROUP + 8 * (i[:4] >= 2), 2 * MEMBER + (i[:4] & 1)

    accumulator = np.ascontiguousarray(c[c_place])
    report = kernels(
        "multiply",
        accumulator,
        registers(bits(a, element), *a_place),
        registers(bits(b, element), *b_place),
        numbers=(("bf16", "f16", "tf32").index(element), 0),
    )
    assert (accumulator == (a @ b + c)[c_place]).all()
    assert report.matrix_products == 1


def test_tf32_product_does_not_read_the_low_bits(kernels):
    ones = np.full((32, 4), 0x3F800000 | 0x1FFF, np.uint32)
    accumulator = np.zeros((32, 4), np.float32)
    kernels("multiply", accumulator, ones, ones, numbers=(2, 0))
    assert (accumulator == 8).all()


def test_product_by_part_of_a_warp_fails(kernels):
    registers_of_lanes = np.zeros((32, 4), np.uint32)
    with pytest.raises(host.KernelFailure, match=r"divergent warp: lane 1 is at mma_m16n8k8_tf32 .* mma_m16n8k16"):
        kernels("multiply", np.zeros((32, 4), np.float32), registers_of_lanes, registers_of_lanes, numbers=(0, 1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_gives_fragments_as_documented(kernels, count, transposed):
    matrices = random.integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    got = np.zeros((32, count, 2), np.uint16)
    kernels("load_fragments", got, matrices, numbers=(count, transposed))
    for matrix in range(count):
        expected = matrices[matrix].T if transposed else matrices[matrix]
        assert (got[:, matrix] == expected[GROUP, 2 * MEMBER + np.arange(2)]).all()


# Numbers


def convert(kernels: Kernels, function: int, x: np.ndarray) -> np.ndarray:
    out = np.zeros(len(x), np.uint32)
    kernels("convert", out, np.ascontiguousarray(x, np.float32), numbers=(len(x), function))
    return out


EVERYTHING = np.concatenate(
    [
        random.integers(0, 1 << 32, 50_000, dtype=np.uint64).astype(np.uint32).view(np.float32),
        (random.standard_normal(20_000) * 10.0 ** random.uniform(-9, 5, 20_000)).astype(np.float32),
        np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32),
        (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32),
        ((np.arange(1 << 16, dtype=np.uint32) << 16) + 0x8000).view(np.float32),  # half way between two bf16
        np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519, 65520, 2**-24, 2**-25, 3 * 2**-25]),
    ]
)


def same_numbers(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


def nearest_bf16(x: np.ndarray) -> np.ndarray:
    """By comparing the two neighbours in float64."""
    down = (x.view(np.uint32) & 0xFFFF0000).astype(np.uint32)
    below, above = down.view(np.float32).astype(np.float64), (down + np.uint32(0x10000)).view(np.float32).astype(float)
    above = np.where(np.isinf(above), np.copysign(2.0**128, above), above)  # for the distance to what overflows
    middle = (below + above) / 2
    up = (abs(x) > abs(middle)) | ((x == middle) & ((down >> 16) % 2 == 1))
    rounded = np.where(up & np.isfinite(x), down + np.uint32(0x10000), down).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), rounded).astype(np.float32)


def test_16_bit_formats_round_to_nearest_even(plain):
    with np.errstate(all="ignore"):
        f16, bf16 = EVERYTHING.astype(np.float16).astype(np.float32), nearest_bf16(EVERYTHING)
    assert same_numbers(convert(plain, 4, EVERYTHING).view(np.float32), bf16)
    assert same_numbers(convert(plain, 5, EVERYTHING).view(np.float32), f16)


def test_pack_puts_its_first_number_low(plain):
    x = np.float32([-3.5, 0.25])
    assert (convert(plain, 6, x) == (x.view(np.uint32) >> 16 | 0x3F800000)).all()
    assert (convert(plain, 7, x) == (x.astype(np.float16).view(np.uint16).astype(np.uint32) | 0x3C000000)).all()


def test_tf32_rounds_to_nearest_away_from_zero(plain):
    x = EVERYTHING[np.isfinite(EVERYTHING) & (abs(EVERYTHING) > 1e-30) & (abs(EVERYTHING) < 1e30)]
    got = convert(plain, 3, x)
    fraction, exponent = np.frexp(x.astype(np.float64))
    expected = np.ldexp(np.copysign(np.floor(abs(fraction) * 2**11 + 0.5), fraction) / 2**11, exponent)
    assert (got.view(np.float32) == expected).all()


@pytest.mark.parametrize(
    ("function", "exact", "x"),
    [
        (0, np.exp2, np.concatenate([random.uniform(-130, 128, 20_000), np.arange(-140.0, 128)])),
        (1, np.log2, 2.0 ** np.concatenate([random.uniform(-126, 127, 20_000), [0.0]])),
        (2, np.reciprocal, random.uniform(-100, 100, 20_000)),
    ],
    ids=["exp2", "log2", "rcp"],
)
def test_approximations_are_close_but_not_exact(plain, function, exact, x):
    x = x.astype(np.float32)
    truth = exact(x.astype(np.float64))
    truth = np.where(abs(truth) < 2.0**-126, 0.0, truth)
    got = convert(plain, function, x).view(np.float32)
    normal = truth != 0
    error = abs(got - truth)[normal] / np.spacing(abs(truth[normal]).astype(np.float32))
    assert 1.0 < error.max() <= 2.0
    assert (got[abs(truth) < 2.0**-126.1] == 0).all()


def test_exp2_of_the_ends(plain):
    x = np.float32([-np.inf, np.inf, np.nan, 0.0, 1e-40, -127, -126, 128, 10])
    expected = np.float32([0, np.inf, np.nan, 1, 1, 0, 2.0**-126, np.inf, 1024])
    assert same_numbers(convert(plain, 0, x).view(np.float32), expected)
    whole = np.arange(-126, 128).astype(np.float32)
    assert same_numbers(convert(plain, 0, whole).view(np.float32), np.ldexp(np.float32(1), whole.astype(int)))


# A kernel with all of it


@pytest.mark.parametrize("schedule", [SCHEDULES[0], SCHEDULES[-1]], ids=str)
def test_pipelined_products_give_row_sums(kernels, schedule):
    x, y = (nearest_bf16(random.standard_normal((rows, 64)).astype(np.float32) / 8) for rows in (128, 192))
    sums = np.zeros(len(x), np.float32)
    packed = [(matrix.view(np.uint32) >> 16).astype(np.uint16) for matrix in (x, y)]
    report = kernels("exp2_row_sums", sums, *packed, numbers=(len(x), len(y)), **schedule)
    expected = np.exp2(x.astype(np.float64) @ y.astype(np.float64).T).sum(1)
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    assert report.matrix_products == 3 * (128 // 16) * (192 // 8) * (64 // 16)
    assert report.matrix_loads.conflicts == 0
    assert report.unwritten_bytes_read == report.copies_never_waited_for == 0


@pytest.mark.skipif(bool(SANITIZER), reason="a bound for the plain build")
def test_three_products_of_256_rows_take_less_than_five_seconds(plain):
    matrix = np.zeros((256, 64), np.uint16)
    start = time.perf_counter()
    plain("exp2_row_sums", np.zeros(256, np.float32), matrix, matrix, numbers=(256, 256))
    assert time.perf_counter() - start < 5


# Builds


def test_library_is_built_once(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "BUILDS", tmp_path)
    source = tmp_path / "small.cu"
    source.write_text("int first;")
    first = host.build([source])
    built = first.stat().st_mtime_ns
    assert host.build([source]) == first
    assert first.stat().st_mtime_ns == built
    assert host.build([source], checks=True) != first
    source.write_text("int second;")
    assert host.build([source]) != first


def test_source_that_does_not_compile_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "BUILDS", tmp_path)
    source = tmp_path / "wrong.cu"
    source.write_text("no such thing;")
    with pytest.raises(RuntimeError, match="error"):
        host.build([source])
    assert not list(tmp_path.glob("*.so"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("target", ["sm_80", "sm_90a", "sm_120a"])
def test_same_kernels_compile_for_a_device(target, tmp_path):
    command = ["nvcc", "-std=c++20", f"-arch={target}", f"-I{host.INCLUDES[1]}", "-cubin", "-Werror=all-warnings"]
    command += ["-diag-suppress=177", "-o", str(tmp_path / "cubin"), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def sanitized(*command: str) -> subprocess.CompletedProcess[str]:
    """python command..., with the kernels built under sanitizers."""
    try:
        environment = {**os.environ, "CUDA_HOST_SANITIZER": host.SANITIZERS, **host.sanitizer_environment()}
    except RuntimeError as missing:
        pytest.skip(str(missing))
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.mark.slow
@pytest.mark.skipif(bool(SANITIZER), reason="starts a process of its own")
def test_everything_above_holds_under_sanitizers():
    done = sanitized("-m", "pytest", "--noconftest", "-q", "-m", "not slow", "-p", "no:cacheprovider", __file__)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(bool(SANITIZER), reason="starts a process of its own")
def test_sanitizer_names_the_kernel_that_reads_past_a_buffer():
    program = """
import numpy as np, test_cuda_host as tests
too_short = np.zeros(5 * 96 - 1, np.float32)
tests.Kernels(checks=False)("grid_sum", np.zeros(1, np.float32), too_short, numbers=(5, 96))
"""
    done = sanitized("-c", program)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "in self_test::grid_sum" in done.stderr
