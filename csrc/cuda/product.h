// The product of a tile, from embeddings that come into shared memory 128 bytes of a row at a time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "arguments.h"
#include "device.h"
#include "multiply.h"
#include "panels.h"
#include "tile.h"

namespace contrastile::cuda {

// Adds the product of two panels, (block_rows, 128 bytes) and (block_cols, 128 bytes) transposed.
template <class Tile>
__device__ void add_panels(Values<Tile>& total, const Place<Tile>& place, const char* left, const char* right) {
  using Product = typename Tile::Product;
  constexpr int down = Tile::warp_rows / 16, across = Tile::warp_cols / 16;
#pragma unroll
  for (int step = 0; step < panel_steps; ++step) {
    std::uint32_t rows[down][4];
#pragma unroll
    for (int m = 0; m < down; ++m) load_left(rows[m], left, place.down * Tile::warp_rows + m * 16, step);
#pragma unroll
    for (int n = 0; n < across; ++n) {
      std::uint32_t cols[4];
      load_right(cols, right, place.across * Tile::warp_cols + n * 16, step);
#pragma unroll
      for (int m = 0; m < down; ++m) {
        Product::add(total.at, m, 2 * n, rows[m], cols);
        Product::add(total.at, m, 2 * n + 1, rows[m], cols + 2);
      }
    }
  }
}

__device__ inline void load_floats(float (&to)[4], const char* chunk) {
  const device::Vector16 bytes = device::load_shared(reinterpret_cast<const device::Vector16*>(chunk));
  for (int k = 0; k < 4; ++k) to[k] = float_of(bytes.words[k]);
}

// The same by multiply-adds of float32. Lanes of one row or column read the same chunk, others different banks.
template <class Tile>
__device__ void add_panels_exactly(Values<Tile>& total, const Place<Tile>& place, const char* left, const char* right) {
#pragma unroll 2
  for (int chunk = 0; chunk < panel_chunks; ++chunk) {
    float rows[Tile::thread_rows][4];
#pragma unroll
    for (int r = 0; r < Tile::thread_rows; ++r) load_floats(rows[r], left + place_in_panel(place.row(r), chunk));
#pragma unroll
    for (int c = 0; c < Tile::thread_cols; ++c) {
      float col[4];
      load_floats(col, right + place_in_panel(place.col(c), chunk));
#pragma unroll
      for (int r = 0; r < Tile::thread_rows; ++r)
#pragma unroll
        for (int k = 0; k < 4; ++k) total.at[r][c] = fmaf(rows[r][k], col[k], total.at[r][c]);
    }
  }
}

template <class Tile>
constexpr int stage_bytes = (Tile::block_rows + Tile::block_cols) * panel_bytes;

// Products of all pairs of a tile, features in turn through `stages` panels of each side: one is multiplied while the
// others are on their way. The functions say which anchor and candidate a row and a column of the tile are.
template <class Tile, class AnchorAt, class CandidateAt>
__device__ Values<Tile> tile_products(const Pairs& pairs, char* shared, const Place<Tile>& place, AnchorAt anchor_at,
                                      CandidateAt candidate_at) {
  const auto anchors = anchors_of<typename Tile::Element>(pairs);
  const auto candidates = candidates_of<typename Tile::Element>(pairs);
  const int steps = (anchors.row_bytes + panel_bytes - 1) / panel_bytes;
  const auto left = [&](int step) { return shared + step % Tile::stages * stage_bytes<Tile>; };
  const auto right = [&](int step) { return left(step) + Tile::block_rows * panel_bytes; };
  const auto copy = [&](int step) {
    if (step < steps) {
      copy_panel<Tile::block_rows, Tile::threads>(left(step), anchors, step * panel_bytes, anchor_at);
      copy_panel<Tile::block_cols, Tile::threads>(right(step), candidates, step * panel_bytes, candidate_at);
    }
    device::commit_group();  // an empty group too, so that as many are always under way
  };
  Values<Tile> products{};
  for (int step = 0; step < Tile::stages - 1; ++step) copy(step);
  for (int step = 0; step < steps; ++step) {
    device::wait_group<Tile::stages - 2>();
    device::block_barrier();  // all parts of this panel are there, and all threads are done with the one before
    copy(step + Tile::stages - 1);
    if constexpr (std::is_same_v<typename Tile::Product, MultiplyExactly>)
      add_panels_exactly(products, place, left(step), right(step));
    else
      add_panels(products, place, left(step), right(step));
  }
  device::block_barrier();
  return products;
}

// The same of neighbouring anchors and candidates.
template <class Tile>
__device__ Values<Tile> tile_products(const Pairs& pairs, char* shared, const Place<Tile>& place,
                                      int first_row, int first_col) {
  return tile_products(
      pairs, shared, place, [&](int row) { return first_row + row; }, [&](int col) { return first_col + col; });
}

}  // namespace contrastile::cuda
