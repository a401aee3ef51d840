// Which pairs of a tile count, and sums of exponentials over them.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "device.h"
#include "exchange.h"
#include "tile.h"

namespace contrastile::cuda {

constexpr float log2_e = 1.44269504f;
constexpr float smallest_sum = 0x1p-80f;  // of exp(logit - shift): what a float then loses is below its precision
constexpr float largest_sum = 0x1p100f;   // no part of it has overflowed, nor will a sum of several

// Where a tile lies: among the tiles of its window, and its first pair in the window and in the problem.
struct Origin {
  int tile_row, tile_col;
  int row_in_window, col_in_window;
  int row, col;
};

template <class Tile>
__device__ Origin origin_of(const Window& window, int tile_row, int tile_col) {
  const int row = tile_row * Tile::block_rows, col = tile_col * Tile::block_cols;
  return {tile_row, tile_col, row, col, window.first_row + row, window.first_col + col};
}

constexpr int tile_rows_of_group = 8;  // that are walked together, to reuse the L2 cache

template <class Tile>
__device__ Origin origin_of_block(const Window& window) {
  const int tile_rows = (window.rows + Tile::block_rows - 1) / Tile::block_rows;
  const int tile_cols = (window.cols + Tile::block_cols - 1) / Tile::block_cols;
  const int group = block_id() / (tile_rows_of_group * tile_cols);
  const int in_group = block_id() % (tile_rows_of_group * tile_cols);
  const int left = tile_rows - group * tile_rows_of_group;
  const int rows = left < tile_rows_of_group ? left : tile_rows_of_group;
  return origin_of<Tile>(window, group * tile_rows_of_group + in_group % rows, in_group / rows);
}

template <class Tile>
__device__ void multiply_by_scale(Values<Tile>& products, const Pairs& pairs, const Origin& origin,
                                  const Place<Tile>& place) {
#pragma unroll
  for (int r = 0; r < Tile::thread_rows; ++r) {
    const int row = origin.row + place.row(r);
    const float scale = row < pairs.rows ? pairs.scale[row] : 0;
#pragma unroll
    for (int c = 0; c < Tile::thread_cols; ++c) products.at[r][c] *= scale;
  }
}

// Where something lies in a tile's side of `size`; outside of it, before or after it.
__device__ inline int place_in(std::int64_t offset, int size) {
  return offset < 0 ? -1 : offset < size ? static_cast<int>(offset) : size;
}

// -inf in the place of pairs of equal groups.
template <class Tile>
__device__ void keep_other_groups(Values<Tile>& logits, const Pairs& pairs, const Origin& origin,
                                  const Place<Tile>& place, int rows, int cols) {
#pragma unroll
  for (int r = 0; r < Tile::thread_rows; ++r) {
    if (place.row(r) >= rows) continue;
    const std::int64_t group = pairs.row_groups[origin.row + place.row(r)];
#pragma unroll
    for (int c = 0; c < Tile::thread_cols; ++c)
      if (place.col(c) < cols && pairs.col_groups[origin.col + place.col(c)] == group) logits.at[r][c] = -infinity;
  }
}

// -inf in the place of logits above their row's ceiling. A NaN stays.
template <class Tile>
__device__ void keep_under_ceilings(Values<Tile>& logits, const Pairs& pairs, const Origin& origin,
                                    const Place<Tile>& place, int rows) {
#pragma unroll
  for (int r = 0; r < Tile::thread_rows; ++r) {
    if (place.row(r) >= rows) continue;
    const float ceiling = pairs.row_ceiling[origin.row + place.row(r)];
#pragma unroll
    for (int c = 0; c < Tile::thread_cols; ++c)
      if (logits.at[r][c] > ceiling) logits.at[r][c] = -infinity;
  }
}

// -inf in the place of padding, positives and masked pairs. Most rows of most tiles have none, and compare nothing.
template <class Tile>
__device__ void keep_negatives(Values<Tile>& logits, const Pairs& pairs, const Origin& origin,
                               const Place<Tile>& place) {
  const int rows = place_in(pairs.rows - origin.row, Tile::block_rows);
  const int cols = place_in(pairs.cols - origin.col, Tile::block_cols);
#pragma unroll
  for (int r = 0; r < Tile::thread_rows; ++r) {
    const int row = origin.row + place.row(r);
    const bool is_row = place.row(r) < rows;
    const int end = is_row ? cols : 0;
    const int positive = pairs.positives && is_row ? place_in(pairs.positives[row] - origin.col, Tile::block_cols) : -1;
    const int self = pairs.masks_self ? place_in(row + pairs.self_offset - origin.col, Tile::block_cols) : -1;
    const auto is_outside = [](int col) { return col < 0 || col >= Tile::block_cols; };
    if (end == Tile::block_cols && is_outside(positive) && is_outside(self)) continue;
#pragma unroll
    for (int c = 0; c < Tile::thread_cols; ++c) {
      const int col = place.col(c);
      if (col >= end || col == positive || col == self) logits.at[r][c] = -infinity;
    }
  }
  if (pairs.row_groups) keep_other_groups(logits, pairs, origin, place, rows, cols);
  if (pairs.row_ceiling) keep_under_ceilings(logits, pairs, origin, place, rows);
}

// A maximum to subtract: that of no elements, -inf, becomes 0.
__device__ inline float finite(float maximum) { return maximum == -infinity ? 0 : maximum; }

__device__ inline float exponential(float x) { return device::exp2_approx(x * log2_e); }

// Whether a sum of exponentials under a common shift has lost nothing to underflow, not overflowed, and is no NaN.
__device__ inline bool is_exact(float sum) { return sum >= smallest_sum && sum <= largest_sum; }

template <class Tile>
__device__ bool are_exact(const RowValues<Tile>& sums, const Pairs& pairs, const Origin& origin,
                          const Place<Tile>& place) {
  bool exact = true;
#pragma unroll
  for (int r = 0; r < Tile::thread_rows; ++r)
    exact = exact && (origin.row + place.row(r) >= pairs.rows || is_exact(sums.of[r]));
  return exact;
}
template <class Tile>
__device__ bool are_exact(const ColValues<Tile>& sums, const Pairs& pairs, const Origin& origin,
                          const Place<Tile>& place) {
  bool exact = true;
#pragma unroll
  for (int c = 0; c < Tile::thread_cols; ++c)
    exact = exact && (origin.col + place.col(c) >= pairs.cols || is_exact(sums.of[c]));
  return exact;
}

// (maximum, sum of exp(logit - maximum)) of every row and column, exact at any magnitude.
template <class Tile>
__device__ void sums_by_own_maxima(const Values<Tile>& logits, const Place<Tile>& place, Exchange<Tile>* exchange,
                                   RowValues<Tile>& row_max, RowValues<Tile>& row_sum, ColValues<Tile>& col_max,
                                   ColValues<Tile>& col_sum) {
  fill(row_max, -infinity);
  fill(col_max, -infinity);
  logits.for_each([&](int r, int c, float logit) {
    row_max.of[r] = fmaxf(row_max.of[r], logit);
    col_max.of[c] = fmaxf(col_max.of[c], logit);
  });
  combine_rows_and_cols<Larger>(row_max, col_max, place, exchange);
  fill(row_sum, 0);
  fill(col_sum, 0);
  logits.for_each([&](int r, int c, float logit) {
    row_sum.of[r] += exponential(logit - finite(row_max.of[r]));
    col_sum.of[c] += exponential(logit - finite(col_max.of[c]));
  });
  combine_rows_and_cols<Add>(row_sum, col_sum, place, exchange);
}

// A value of every row in its place of a line; a null line wants none.
template <class Tile>
__device__ void store(float* lines, const RowValues<Tile>& values, const Window& window, const Origin& origin,
                      const Place<Tile>& place) {
  if (!lines || place.across || device::lane_id() % 4) return;
#pragma unroll
  for (int r = 0; r < Tile::thread_rows; ++r) {
    const int row = origin.row_in_window + place.row(r);
    if (row < window.rows) lines[origin.tile_col * window.rows + row] = values.of[r];
  }
}
template <class Tile>
__device__ void store(float* lines, const ColValues<Tile>& values, const Window& window, const Origin& origin,
                      const Place<Tile>& place) {
  if (!lines || place.down || device::lane_id() >= 4) return;
#pragma unroll
  for (int c = 0; c < Tile::thread_cols; ++c) {
    const int col = origin.col_in_window + place.col(c);
    if (col < window.cols) lines[origin.tile_row * window.cols + col] = values.of[c];
  }
}

}  // namespace contrastile::cuda
