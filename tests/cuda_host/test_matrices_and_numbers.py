"""What the execution layer computes. Fragments are expected where the PTX ISA's formulas place their elements, written
from the document and not from the layer.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from cuda_host import build as host
from cuda_host.self_test import SANITIZER, SCHEDULES, Kernels, load

random = np.random.default_rng(0)

pytestmark = pytest.mark.skipif(host.compiler() is None, reason="there is no C++ compiler")


@pytest.fixture
def plain() -> Kernels:
    return load(checks=False)


@pytest.fixture(params=[True, False], ids=["checked", "plain"])
def kernels(request) -> Kernels:
    return load(request.param)


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
    start = time.process_time()
    plain("exp2_row_sums", np.zeros(256, np.float32), matrix, matrix, numbers=(256, 256))
    assert time.process_time() - start < 5
