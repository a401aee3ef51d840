"""Joins the sums that tiles left behind into running totals, in the order of the tiles.

reads   4 bytes for every tile, entry and sum, once
writes  4 bytes for every entry and sum
bound   DRAM bandwidth; about 1 / (16 D) of the traffic-free time of the tiles that it follows
"""

from __future__ import annotations

import triton
import triton.language as tl
from contrastile.kernels.tiles import finite

SMALLEST_TOTAL = tl.constexpr(2.0**-20)


@triton.jit
def merge_kernel(
    tile_sums,  # Sums (tiles, length)
    totals,  # Sums (length,), joined with what they hold
    tiles,
    length,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = entry < length
    first_place = entry.to(tl.int64)
    if totals.max is not None:
        total_max = tl.load(totals.max + entry, mask=valid, other=0.0)
        total_sum = tl.load(totals.sum + entry, mask=valid, other=0.0)
        place = first_place
        for _ in range(tiles):
            tile_max = tl.load(tile_sums.max + place, mask=valid, other=0.0)
            tile_sum = tl.load(tile_sums.sum + place, mask=valid, other=0.0)
            joint_max = tl.maximum(total_max, tile_max)
            shift = finite(joint_max)
            total_sum = total_sum * tl.exp(total_max - shift) + tile_sum * tl.exp(tile_max - shift)
            total_max = joint_max
            place += length
        total_max, total_sum = near_its_sum(total_max, total_sum)
        tl.store(totals.max + entry, total_max, mask=valid)
        tl.store(totals.sum + entry, total_sum, mask=valid)
    if totals.mass is not None:
        total_mass = tl.load(totals.mass + entry, mask=valid, other=0.0)
        place = first_place
        for _ in range(tiles):
            total_mass += tl.load(tile_sums.mass + place, mask=valid, other=0.0)
            place += length
        tl.store(totals.mass + entry, total_mass, mask=valid)
    if totals.weight is not None:
        total_weight = tl.load(totals.weight + entry, mask=valid, other=0.0)
        place = first_place
        for _ in range(tiles):
            total_weight += tl.load(tile_sums.weight + place, mask=valid, other=0.0)
            place += length
        tl.store(totals.weight + entry, total_weight, mask=valid)


@triton.jit
def near_its_sum(maximum, total):
    """The same under a shift that is at most 14 above the sum's logarithm. A tile's may be 55 above: a gradient sweep
    that then takes a tile's shift up to 40 above the row's would lose the row to underflow.
    """
    is_far = (total > 0) & (total < SMALLEST_TOTAL)
    nearer = tl.where(is_far, maximum + tl.log(total), maximum)
    return nearer, tl.where(is_far, total * tl.exp(maximum - nearer), total)
