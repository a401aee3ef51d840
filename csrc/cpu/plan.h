// How the N x M logits are cut up. Sizes depend on the problem alone, never on
// timing, so that the order of every sum, and with it every bit of the result,
// is fixed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "embeddings.h"
#include "product_kernels.h"
#include "vector_kernels.h"

namespace contrastile::cpu {

// A block of logits held in the workspace at one time: a strip of rows, and all
// columns where they fit.
struct Window {
  std::int64_t row_begin, row_end;
  std::int64_t col_begin, col_end;

  std::int64_t rows() const { return row_end - row_begin; }
  std::int64_t cols() const { return col_end - col_begin; }
};

struct Plan {
  std::int64_t row_block;      // rows of one tile
  std::int64_t col_block;      // columns of one tile; equal to row_block for one triangle
  std::int64_t strip_rows;     // rows of a window
  std::int64_t chunk_cols;     // columns of a window
  std::int64_t grad_rows;      // rows of dX that one unit of work owns,
  std::int64_t grad_features;  // and features
  std::int64_t planes;         // logits of every pair that a window holds

  std::int64_t tiles_per_chunk() const { return ceil_div(chunk_cols, col_block); }
  std::int64_t blocks_per_strip() const { return ceil_div(strip_rows, row_block); }
  std::int64_t grad_units(std::int64_t depth) const {
    return ceil_div(strip_rows, grad_rows) * ceil_div(depth, grad_features);
  }
};

struct PlanRequest {
  std::int64_t rows, cols, depth;
  bool triangle;
  bool whole_rows;  // windows hold all columns, unless not even a few rows of them fit
  int threads;
  std::int64_t workspace_elements;
  std::int64_t planes = 1;
};

// A tile of float logits stays in a second-level cache of 512 KiB or more.
inline constexpr std::int64_t most_tile_rows = most_tile_width;  // of one triangle also its columns
inline constexpr std::int64_t most_tile_cols = 256;
// Columns of dX that are added to at a time; fewer than least_grad_features
// would read coefficients more often than they are used.
inline constexpr std::int64_t most_grad_features = 512;
inline constexpr std::int64_t least_grad_features = 128;
inline constexpr std::int64_t good_grad_rows = 120;
inline constexpr std::int64_t min_strip_rows = 128;
// Candidates of a window are packed for each product, which as many rows pay for.
inline constexpr std::int64_t good_strip_rows = 5 * most_tile_rows;
inline constexpr std::int64_t row_partials_per_tile = 4;   // maximum, sum, mass, moment
inline constexpr std::int64_t col_vectors_per_thread = 5;  // maximum, sum, shift, gain, mass

// Scratch is set aside for this many, so that up to there the cut, and every
// bit, is the same for any number.
inline constexpr int usual_threads = 4;

// Candidates of one tile as one thread packs them: by features for S, by
// columns for dX.
inline std::int64_t packed_candidate_elements(const Plan& plan) {
  return round_up(plan.col_block, most_panel_cols) * std::max(depth_block, most_grad_features);
}

inline std::int64_t thread_scratch_elements(const Plan& plan) {
  return plan.planes * plan.col_block * col_vectors_per_thread + packed_candidate_elements(plan);
}

// Logits of a window, tile columns one after another; products read past the
// last row.
inline std::int64_t plane_elements(const Plan& plan) {
  return plan.strip_rows * round_up(plan.chunk_cols, tile_width_multiple) + most_panel_rows * plan.col_block;
}

inline std::int64_t score_elements(const Plan& plan) { return plan.planes * plane_elements(plan); }

// Anchors of a window, packed as either operand.
inline std::int64_t packed_anchor_elements(const Plan& plan, std::int64_t depth) {
  return plan.blocks_per_strip() * (round_up(std::min(plan.row_block, plan.strip_rows), most_panel_rows) * depth +
                                    std::min(plan.row_block, plan.strip_rows) * round_up(depth, most_panel_cols));
}

// What a window of strip_rows x chunk_cols takes: logits, partial sums, packed
// anchors.
inline std::int64_t window_elements(const Plan& plan, std::int64_t depth) {
  return score_elements(plan) + plan.planes * plan.strip_rows * row_partials_per_tile * plan.tiles_per_chunk() +
         packed_anchor_elements(plan, depth);
}

// All that a sweep allocates for tiles; pieces are rounded up to cache lines.
inline std::int64_t workspace_elements(const Plan& plan, std::int64_t depth, int threads) {
  constexpr std::int64_t line = 16;
  return window_elements(plan, depth) + (row_partials_per_tile + 3) * line +
         threads * (thread_scratch_elements(plan) + (col_vectors_per_thread + 2) * line);
}

// Tiles beside one another in a window of the plan's rows.
inline std::int64_t fitting_tiles(const Plan& plan, const PlanRequest& request, std::int64_t budget) {
  const std::int64_t per_tile = plan.planes * plan.strip_rows * (plan.col_block + row_partials_per_tile);
  return (budget - packed_anchor_elements(plan, request.depth)) / per_tile;
}

// As many columns as fit, evenly over the windows beside one another.
inline void cut_columns(Plan& plan, const PlanRequest& request, std::int64_t budget) {
  const std::int64_t tiles = ceil_div(request.cols, plan.col_block);
  const std::int64_t windows = ceil_div(tiles, std::max<std::int64_t>(fitting_tiles(plan, request, budget), 1));
  plan.chunk_cols = std::min(ceil_div(tiles, windows) * plan.col_block, request.cols);
}

// Units of work for dX share out rows: coefficients are then read by one of them,
// and once. Each packs its candidates for itself, so that where it would have
// few rows to use them for, features are shared out as well.
inline void cut_gradient(Plan& plan, const PlanRequest& request) {
  const std::int64_t most_parts = std::max<std::int64_t>(request.depth / least_grad_features, 1);
  std::int64_t feature_parts = 1, row_parts = request.threads;
  for (std::int64_t parts = 2; parts <= std::min<std::int64_t>(most_parts, request.threads); ++parts) {
    if (plan.strip_rows >= row_parts * good_grad_rows) break;
    if (request.threads % parts == 0) feature_parts = parts, row_parts = request.threads / parts;
  }
  plan.grad_features = round_up(ceil_div(request.depth, feature_parts), most_panel_cols);
  plan.grad_rows = round_up(ceil_div(plan.strip_rows, row_parts), most_panel_rows);
}

inline Plan make_plan(const PlanRequest& request) {
  Plan plan;
  plan.planes = request.planes;
  // Wide tiles amortise packing; narrow problems are cut finer so that there is
  // work for every thread. Blocks of one triangle are whole panels both ways.
  if (request.triangle) {
    plan.row_block = std::clamp<std::int64_t>(round_up(ceil_div(request.rows, 6), 96), 96, most_tile_rows);
    plan.col_block = plan.row_block;
  } else {
    plan.row_block = most_tile_rows;
    plan.col_block = std::clamp<std::int64_t>(round_up(ceil_div(request.cols, 8), 64), 128, most_tile_cols);
  }
  plan.chunk_cols = request.cols;
  const std::int64_t budget =
      request.workspace_elements - std::max(request.threads, usual_threads) * thread_scratch_elements(plan);
  plan.strip_rows = plan.row_block;
  const std::int64_t fitting_blocks = std::max<std::int64_t>(budget / window_elements(plan, request.depth), 0);
  const std::int64_t fitting_rows = fitting_blocks * plan.row_block;
  Plan square = plan;  // nearly: at least as wide as high
  square.strip_rows = good_strip_rows;
  const bool square_fits = fitting_tiles(square, request, budget) * plan.col_block >= good_strip_rows;
  if (fitting_rows >= request.rows) {
    plan.strip_rows = request.rows;
  } else if (!request.triangle && !request.whole_rows && square_fits && fitting_rows < good_strip_rows &&
             good_strip_rows < request.rows) {
    plan = square;
    cut_columns(plan, request, budget);
  } else if (fitting_blocks >= 1) {
    const std::int64_t strips = ceil_div(request.rows, fitting_rows);
    plan.strip_rows = round_up(ceil_div(request.rows, strips), plan.row_block);
  } else {
    if (!request.triangle) plan.strip_rows = std::min(min_strip_rows, request.rows);
    cut_columns(plan, request, budget);
  }
  cut_gradient(plan, request);
  return plan;
}

// Windows in the order of a sweep. One triangle: every strip begins at its own
// diagonal.
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
