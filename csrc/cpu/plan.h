// How the N x M logits are cut up. Sizes depend on the problem alone, never on timing, so that the
// order of every sum, and with it every bit of the result, is fixed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "embeddings.h"
#include "vector_kernels.h"

namespace contrastile::cpu {

// A block of logits held in the workspace at one time: a strip of rows, and all columns where they fit.
struct Window {
  std::int64_t row_begin, row_end;
  std::int64_t col_begin, col_end;

  std::int64_t rows() const { return row_end - row_begin; }
  std::int64_t cols() const { return col_end - col_begin; }
};

struct Plan {
  std::int64_t row_block;    // rows of one tile
  std::int64_t col_block;    // columns of one tile; equal to row_block for one triangle
  std::int64_t strip_rows;   // rows of a window
  std::int64_t chunk_cols;   // columns of a window
  std::int64_t grad_rows;    // rows of dX that one unit of work owns
  std::int64_t depth_block;  // columns of 16-bit embeddings widened at a time

  std::int64_t tiles_per_chunk() const { return ceil_div(chunk_cols, col_block); }
  std::int64_t grad_units() const { return ceil_div(strip_rows, grad_rows); }
};

struct PlanRequest {
  std::int64_t rows, cols, depth;
  bool triangle;
  bool widens;   // 16-bit embeddings
  int threads;
  std::int64_t workspace_elements;
};

inline constexpr std::int64_t min_strip_rows = 128;
inline constexpr std::int64_t row_partials_per_tile = 4;   // maximum, sum, mass, moment
inline constexpr std::int64_t col_vectors_per_thread = 5;  // maximum, sum, shift, gain, mass

inline std::int64_t thread_scratch_elements(const Plan& plan, bool widens) {
  return plan.col_block * (col_vectors_per_thread + (widens ? plan.depth_block : 0));
}

// Elements a window of `strip_rows` x `chunk_cols` takes: logits, partial sums, the widened strip of anchors.
inline std::int64_t window_elements(const Plan& plan, std::int64_t depth, bool widens) {
  const std::int64_t width = round_up(plan.chunk_cols, tile_width_multiple);
  return plan.strip_rows * (width + row_partials_per_tile * plan.tiles_per_chunk() + (widens ? depth : 0));
}

// All that a sweep allocates for tiles; pieces are rounded up to cache lines.
inline std::int64_t workspace_elements(const Plan& plan, std::int64_t depth, bool widens, int threads) {
  constexpr std::int64_t line = 16;
  return window_elements(plan, depth, widens) + (row_partials_per_tile + 2) * line +
         threads * (thread_scratch_elements(plan, widens) + (col_vectors_per_thread + 1) * line);
}

inline Plan make_plan(const PlanRequest& request) {
  Plan plan;
  plan.row_block = 256;
  // Wide tiles amortise packing; narrow problems are cut finer so that there is work for every thread.
  plan.col_block =
      request.triangle ? plan.row_block : std::clamp<std::int64_t>(round_up(ceil_div(request.cols, 8), 64), 128, 512);
  plan.depth_block = std::min<std::int64_t>(request.depth, 256);
  plan.chunk_cols = request.cols;
  plan.strip_rows = 1;
  const std::int64_t budget =
      request.workspace_elements - request.threads * thread_scratch_elements(plan, request.widens);
  const std::int64_t per_row = window_elements(plan, request.depth, request.widens);
  const std::int64_t fitting = std::max<std::int64_t>(budget / per_row, 0);
  if (fitting >= request.rows) {
    plan.strip_rows = request.rows;
  } else if (fitting >= plan.row_block) {
    plan.strip_rows = fitting / plan.row_block * plan.row_block;
  } else {
    const std::int64_t least = request.triangle ? plan.row_block : std::max(fitting, min_strip_rows);
    plan.strip_rows = std::min(least, request.rows);
    const std::int64_t per_tile = plan.strip_rows * (plan.col_block + row_partials_per_tile);
    const std::int64_t fixed = request.widens ? plan.strip_rows * request.depth : 0;
    const std::int64_t tiles = std::max<std::int64_t>((budget - fixed) / per_tile, 1);
    plan.chunk_cols = std::min(tiles * plan.col_block, request.cols);
  }
  plan.grad_rows = std::clamp<std::int64_t>(round_up(ceil_div(plan.strip_rows, 4), 32), 32, plan.row_block);
  while (plan.row_block % plan.grad_rows != 0) plan.grad_rows += 32;
  return plan;
}

// Windows in the order of a sweep. One triangle: every strip begins at its own diagonal.
inline std::vector<Window> windows_of(const Plan& plan, std::int64_t rows, std::int64_t cols, bool triangle) {
  std::vector<Window> windows;
  for (std::int64_t row = 0; row < rows; row += plan.strip_rows) {
    const std::int64_t row_end = std::min(row + plan.strip_rows, rows);
    for (std::int64_t col = triangle ? row : 0; col < cols; col += plan.chunk_cols)
      windows.push_back({row, row_end, col, std::min(col + plan.chunk_cols, cols)});
  }
  return windows;
}

}  // namespace contrastile::cpu
