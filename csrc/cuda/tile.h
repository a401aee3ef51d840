// A tile of pairs as a block of threads holds it: which thread has which pair, and sums over its rows and columns.
//
// Warps share a tile out in equal rectangles. Within a warp, values lie as m16n8 products leave them: a thread has two
// rows, 8 apart, of every 16, and two neighbouring columns of every 8.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "device.h"

namespace contrastile::cuda {

using device::warp_size;
__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr float infinity = std::numeric_limits<float>::infinity();

__device__ inline int block_id() { return static_cast<int>(blockIdx.x); }

template <class Product_, int BlockRows, int BlockCols, int WarpsDown, int WarpsAcross, int Stages>
struct Tile {
  using Product = Product_;
  using Element = typename Product::Element;
  static constexpr int block_rows = BlockRows, block_cols = BlockCols;
  static constexpr int warps_down = WarpsDown, warps_across = WarpsAcross, stages = Stages;
  static constexpr int threads = warp_size * WarpsDown * WarpsAcross;
  static constexpr int warp_rows = BlockRows / WarpsDown, warp_cols = BlockCols / WarpsAcross;
  static constexpr int thread_rows = warp_rows / 8, thread_cols = warp_cols / 4;
  static_assert(warp_rows % 16 == 0 && warp_cols % 16 == 0);
};

// A thread's place in a tile.
template <class Tile>
struct Place {
  int down = device::warp_id() / Tile::warps_across, across = device::warp_id() % Tile::warps_across;
  int first_row = down * Tile::warp_rows + device::lane_id() / 4;
  int first_col = across * Tile::warp_cols + device::lane_id() % 4 * 2;

  __device__ int row(int r) const { return first_row + r * 8; }
  __device__ int col(int c) const { return first_col + c / 2 * 8 + c % 2; }
};

// One value of every pair that a thread has.
template <class Tile>
struct Values {
  float at[Tile::thread_rows][Tile::thread_cols];

  template <class Function>
  __device__ void for_each(Function function) {
#pragma unroll
    for (int r = 0; r < Tile::thread_rows; ++r)
#pragma unroll
      for (int c = 0; c < Tile::thread_cols; ++c) function(r, c, at[r][c]);
  }
  template <class Function>
  __device__ void for_each(Function function) const {
#pragma unroll
    for (int r = 0; r < Tile::thread_rows; ++r)
#pragma unroll
      for (int c = 0; c < Tile::thread_cols; ++c) function(r, c, at[r][c]);
  }
};

// One value of every row, or column, that a thread has pairs of.
template <class Tile>
struct RowValues {
  float of[Tile::thread_rows];
};
template <class Tile>
struct ColValues {
  float of[Tile::thread_cols];
};

struct Add {
  static constexpr float nothing = 0;
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  static constexpr float nothing = -infinity;
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Smaller {
  static constexpr float nothing = infinity;
  __device__ float operator()(float a, float b) const { return fminf(a, b); }
};

template <class Tile>
__device__ void fill(RowValues<Tile>& values, float value) {
#pragma unroll
  for (int r = 0; r < Tile::thread_rows; ++r) values.of[r] = value;
}
template <class Tile>
__device__ void fill(ColValues<Tile>& values, float value) {
#pragma unroll
  for (int c = 0; c < Tile::thread_cols; ++c) values.of[c] = value;
}

}  // namespace contrastile::cuda
