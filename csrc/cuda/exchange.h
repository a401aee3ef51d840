// Sums and maxima over the rows, columns and pairs of a tile, across the threads that share it. Always in one order.
#pragma once

#include "device.h"
#include "tile.h"

namespace contrastile::cuda {

// Shared memory through which warps meet; it may lie where embeddings were.
template <class Tile>
struct Exchange {
  float rows[Tile::warps_across][Tile::block_rows];
  float cols[Tile::warps_down][Tile::block_cols];
};

// What a warp has of every row, for the others.
template <class Combine, class Tile>
__device__ void leave_rows(RowValues<Tile>& rows, const Place<Tile>& place, Exchange<Tile>* exchange) {
  const Combine combine{};
#pragma unroll
  for (int r = 0; r < Tile::thread_rows; ++r) {
    for (int lanes = 1; lanes < 4; lanes *= 2) rows.of[r] = combine(rows.of[r], device::shuffle_xor(rows.of[r], lanes));
    if (device::lane_id() % 4 == 0) device::store_shared(&exchange->rows[place.across][place.row(r)], rows.of[r]);
  }
}

template <class Combine, class Tile>
__device__ void take_rows(RowValues<Tile>& rows, const Place<Tile>& place, Exchange<Tile>* exchange) {
  const Combine combine{};
#pragma unroll
  for (int r = 0; r < Tile::thread_rows; ++r) {
    rows.of[r] = Combine::nothing;
    for (int w = 0; w < Tile::warps_across; ++w)
      rows.of[r] = combine(rows.of[r], device::load_shared(&exchange->rows[w][place.row(r)]));
  }
}

// Every thread gets the combination over all columns for its rows.
template <class Combine, class Tile>
__device__ void combine_rows(RowValues<Tile>& rows, const Place<Tile>& place, Exchange<Tile>* exchange) {
  leave_rows<Combine>(rows, place, exchange);
  device::block_barrier();
  take_rows<Combine>(rows, place, exchange);
  device::block_barrier();
}

// Likewise, and over all rows for its columns.
template <class Combine, class Tile>
__device__ void combine_rows_and_cols(RowValues<Tile>& rows, ColValues<Tile>& cols, const Place<Tile>& place,
                                      Exchange<Tile>* exchange) {
  const Combine combine{};
  leave_rows<Combine>(rows, place, exchange);
#pragma unroll
  for (int c = 0; c < Tile::thread_cols; ++c) {
    for (int lanes = 4; lanes < warp_size; lanes *= 2)
      cols.of[c] = combine(cols.of[c], device::shuffle_xor(cols.of[c], lanes));
    if (device::lane_id() < 4) device::store_shared(&exchange->cols[place.down][place.col(c)], cols.of[c]);
  }
  device::block_barrier();
  take_rows<Combine>(rows, place, exchange);
#pragma unroll
  for (int c = 0; c < Tile::thread_cols; ++c) {
    cols.of[c] = Combine::nothing;
    for (int w = 0; w < Tile::warps_down; ++w)
      cols.of[c] = combine(cols.of[c], device::load_shared(&exchange->cols[w][place.col(c)]));
  }
  device::block_barrier();
}

// Of one value of every thread of the block.
template <class Combine, class Tile>
__device__ float combine_block(float value, Exchange<Tile>* exchange) {
  const Combine combine{};
  for (int lanes = 1; lanes < warp_size; lanes *= 2) value = combine(value, device::shuffle_xor(value, lanes));
  float* by_warp = &exchange->rows[0][0];
  if (device::lane_id() == 0) device::store_shared(by_warp + device::warp_id(), value);
  device::block_barrier();
  value = Combine::nothing;
  for (int w = 0; w < Tile::threads / warp_size; ++w) value = combine(value, device::load_shared(by_warp + w));
  device::block_barrier();
  return value;
}

template <class Tile>
__device__ bool all_of_block(bool condition, Exchange<Tile>* exchange) {
  return combine_block<Smaller>(condition ? 1.0f : 0.0f, exchange) > 0;
}

}  // namespace contrastile::cuda
