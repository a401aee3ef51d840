"""The layer that runs CUDA kernels on a host: threads, memory, banks, and that each fault it is there for is reported.

What it computes is in cuda_host/test_matrices_and_numbers.py. The last tests run both files again with the kernels
built under sanitizers, in a process of their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_host import build as host
from cuda_host.self_test import SANITIZER, SCHEDULES, SOURCE, Kernels, load

random = np.random.default_rng(0)

pytestmark = pytest.mark.skipif(host.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def checked() -> Kernels:
    return load(checks=True)


@pytest.fixture(scope="module")
def plain() -> Kernels:
    return load(checks=False)


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
    command = ["nvcc", "-std=c++20", f"-arch={target}", f"-I{host.INCLUDES[-1]}", "-cubin", "-Werror=all-warnings"]
    command += ["-diag-suppress=177", "-o", str(tmp_path / "cubin"), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def sanitized(*command: str) -> subprocess.CompletedProcess[str]:
    """python command..., with the kernels built under sanitizers."""
    try:
        environment = {**os.environ, "CUDA_HOST_SANITIZER": host.SANITIZERS, **host.sanitizer_environment()}
        environment["PYTHONPATH"] = str(host.HERE.parent)
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
    done = sanitized(
        "-m", "pytest", "--noconftest", "-q", "-m", "not slow", "-p", "no:cacheprovider", __file__, str(host.HERE)
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(bool(SANITIZER), reason="starts a process of its own")
def test_sanitizer_names_the_kernel_that_reads_past_a_buffer():
    program = """
import numpy as np
from cuda_host.self_test import load
too_short = np.zeros(5 * 96 - 1, np.float32)
load(checks=False)("grid_sum", np.zeros(1, np.float32), too_short, numbers=(5, 96))
"""
    done = sanitized("-c", program)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "in self_test::grid_sum" in done.stderr
