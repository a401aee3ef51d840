// Panels: 128 bytes of each of some rows in shared memory, as operands of matrix instructions.
//
// Each row's eight 16-byte chunks stand in an order that depends on the row: the 8 rows that a matrix load reads one
// chunk of then lie in different banks.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "device.h"
#include "tile.h"

namespace contrastile::cuda {

constexpr int chunk_bytes = 16, panel_bytes = 128, panel_chunks = panel_bytes / chunk_bytes;

__device__ inline int place_in_panel(int row, int chunk) {
  return row * panel_bytes + (chunk ^ row % panel_chunks) * chunk_bytes;
}

// Rows of one side of the pairs, as bytes.
struct Embeddings {
  const char* data;
  std::int64_t stride;
  int rows, row_bytes;
};

template <class Element>
__device__ Embeddings anchors_of(const Pairs& pairs) {
  constexpr std::int64_t size = sizeof(Element);
  return {static_cast<const char*>(pairs.anchors), pairs.anchor_stride * size, pairs.rows,
          static_cast<int>(pairs.depth * size)};
}
template <class Element>
__device__ Embeddings candidates_of(const Pairs& pairs) {
  constexpr std::int64_t size = sizeof(Element);
  return {static_cast<const char*>(pairs.candidates), pairs.candidate_stride * size, pairs.cols,
          static_cast<int>(pairs.depth * size)};
}

// Begins to copy 128 bytes of each of `Rows` rows, from `first_byte` on; what lies past a row's end is 0. `row_at` says
// which row goes where; one past the last repeats that.
template <int Rows, int Threads, class RowAt>
__device__ void copy_panel(char* panel, const Embeddings& embeddings, int first_byte, RowAt row_at) {
  constexpr int rows_at_once = Threads / panel_chunks;
  static_assert(Rows % rows_at_once == 0 && rows_at_once % panel_chunks == 0);
  const int row = device::thread_id() / panel_chunks, chunk = device::thread_id() % panel_chunks;
  const int byte = first_byte + chunk * chunk_bytes;
  const bool is_inside = byte < embeddings.row_bytes;
  char* to = panel + place_in_panel(row, chunk);
#pragma unroll
  for (int first = 0; first < Rows; first += rows_at_once) {
    const int wanted = row_at(first + row), source = wanted < embeddings.rows ? wanted : embeddings.rows - 1;
    device::cp_async<16>(to + first * panel_bytes,
                         embeddings.data + source * embeddings.stride + (is_inside ? byte : 0), is_inside ? 16 : 0);
  }
}

// Operands of matrix instructions are 32 bytes deep: 16 elements of 16 bits, or 8 of 32.
constexpr int step_chunks = 2, panel_steps = panel_chunks / step_chunks;

// Four 8 x 8 matrices from the 16 rows after `first_row`, a multiple of 8, and two chunks after `first_chunk`, which is
// even: a lane's place among them does not depend on where they begin. Down first or across first, by where the second
// matrix lies.
__device__ inline const char* down_first(const char* panel, int first_row, int first_chunk) {
  const int lane = device::lane_id();
  return panel + first_row * panel_bytes + (place_in_panel(lane % 16, lane / 16) ^ first_chunk * chunk_bytes);
}
__device__ inline const char* across_first(const char* panel, int first_row, int first_chunk) {
  const int lane = device::lane_id();
  const int place = place_in_panel(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  return panel + first_row * panel_bytes + (place ^ first_chunk * chunk_bytes);
}

// 16 rows of a left operand; and 16 columns of a right one, 8 in each half, from a panel whose rows they are.
__device__ inline void load_left(std::uint32_t (&operand)[4], const char* panel, int first_row, int step) {
  device::ldmatrix<4>(operand, down_first(panel, first_row, step * step_chunks));
}
__device__ inline void load_right(std::uint32_t (&operand)[4], const char* panel, int first_row, int step) {
  device::ldmatrix<4>(operand, across_first(panel, first_row, step * step_chunks));
}

// The same of 16-bit operands that lie transposed: 16 rows of the panel deep, from a chunk of its columns on.
__device__ inline void load_left_transposed(std::uint32_t (&operand)[4], const char* panel, int step, int first_chunk) {
  device::ldmatrix_trans<4>(operand, across_first(panel, step * 16, first_chunk));
}
__device__ inline void load_right_transposed(std::uint32_t (&operand)[4], const char* panel, int step,
                                             int first_chunk) {
  device::ldmatrix_trans<4>(operand, down_first(panel, step * 16, first_chunk));
}

// Values of a tile of 64 columns, rounded to 16 bits.
template <class Tile>
__device__ void store_panel(char* panel, const Values<Tile>& values, const Place<Tile>& place) {
  using Element = typename Tile::Element;
  static_assert(sizeof(Element) * Tile::block_cols == panel_bytes);
#pragma unroll
  for (int r = 0; r < Tile::thread_rows; ++r)
#pragma unroll
    for (int c = 0; c < Tile::thread_cols; c += 2) {
      const int col = place.col(c);
      char* at = panel + place_in_panel(place.row(r), col / 8) + col % 8 * 2;
      device::store_shared(reinterpret_cast<std::uint32_t*>(at),
                           device::pack<Element>(values.at[r][c], values.at[r][c + 1]));
    }
}

}  // namespace contrastile::cuda
