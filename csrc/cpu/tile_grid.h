// Where the tiles of an open window lie: in the matrix of logits, and in the
// workspace.
//
// A window is kept tile column by tile column, each row-major of its own width,
// so that a tile column can be one operand of a product and a row block of it
// another.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan.h"
#include "vector_kernels.h"

namespace contrastile::cpu {

template <class Real>
class TileGrid {
 public:
  TileGrid(const Plan& plan, bool triangle) : plan_(plan), triangle_(triangle) {}

  void open(const Window& window, Real* scores) {
    window_ = window;
    scores_ = scores;
  }

  const Window& window() const { return window_; }
  std::int64_t tile_count() const { return ceil_div(window_.cols(), plan_.col_block); }
  std::int64_t block_count() const { return ceil_div(window_.rows(), plan_.row_block); }

  std::int64_t tile_begin(std::int64_t tile) const { return window_.col_begin + tile * plan_.col_block; }
  std::int64_t tile_cols(std::int64_t tile) const {
    return std::min(plan_.col_block, window_.col_end - tile_begin(tile));
  }
  std::int64_t block_begin(std::int64_t block) const { return window_.row_begin + block * plan_.row_block; }
  std::int64_t block_rows(std::int64_t block) const {
    return std::min(plan_.row_block, window_.row_end - block_begin(block));
  }

  // One triangle: the row blocks below a tile column's diagonal tile are
  // another tile's mirror image.
  std::int64_t blocks_of(std::int64_t tile) const {
    return triangle_ ? std::min(diagonal_block(tile) + 1, block_count()) : block_count();
  }
  std::int64_t first_tile_of(std::int64_t block) const {
    return triangle_ ? std::max<std::int64_t>(block - diagonal_block(0), 0) : 0;
  }
  bool on_diagonal(std::int64_t tile, std::int64_t block) const { return triangle_ && diagonal_block(tile) == block; }

  // How many of the window's rows, from its first, have logits in this tile
  // column.
  std::int64_t rows_of(std::int64_t tile) const { return std::min(blocks_of(tile) * plan_.row_block, window_.rows()); }

  // Logits of rows [first_row, first_row + rows) of the window within one tile
  // column.
  Tile<Real> tile_at(std::int64_t tile, std::int64_t first_row, std::int64_t rows) const {
    const std::int64_t width = round_up(tile_cols(tile), tile_width_multiple);
    return {scores_ + tile * plan_.col_block * window_.rows() + first_row * width, rows, width};
  }
  Tile<Real> tile_at(std::int64_t tile, std::int64_t block) const {
    return tile_at(tile, block * plan_.row_block, block_rows(block));
  }

  // Of per-row partial results of one tile, among those of the window.
  std::int64_t partial_index(std::int64_t tile, std::int64_t block) const {
    return tile * window_.rows() + block * plan_.row_block;
  }

 private:
  std::int64_t diagonal_block(std::int64_t tile) const {
    return tile + (window_.col_begin - window_.row_begin) / plan_.col_block;
  }

  const Plan plan_;
  const bool triangle_;
  Window window_{};
  Real* scores_ = nullptr;
};

}  // namespace contrastile::cpu
