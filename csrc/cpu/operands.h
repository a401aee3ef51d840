// Embeddings and coefficients packed for the matrix products of a sweep.
//
// Anchors of the open window are packed once, as both operands they will be:
// against candidates over the features (S), and against coefficients over the
// rows (dY). Candidates are packed tile by tile into the scratch of a thread,
// coefficients are used where they lie. 16-bit embeddings are widened on the
// way.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "embeddings.h"
#include "plan.h"
#include "product_kernels.h"
#include "team.h"
#include "workspace.h"

namespace contrastile::cpu {

template <class Real>
class Operands {
 public:
  Operands(const EmbeddingView& anchors, const EmbeddingView& candidates, const Plan& plan, Workspace<Real>& workspace,
           int threads)
      : anchors_(anchors), candidates_(candidates), depth_(anchors.depth), row_block_(plan.row_block) {
    by_feature_stride_ = round_up(std::min(plan.row_block, plan.strip_rows), most_panel_rows) * depth_;
    by_row_stride_ = std::min(plan.row_block, plan.strip_rows) * round_up(depth_, most_panel_cols);
    anchors_by_feature_ = workspace.take(plan.blocks_per_strip() * by_feature_stride_);
    anchors_by_row_ = workspace.take(plan.blocks_per_strip() * by_row_stride_);
    for (int thread = 0; thread < threads; ++thread)
      packed_candidates_.push_back(workspace.take(packed_candidate_elements(plan)));
  }

  void open(const Window& window, bool towards_candidates, Team& team) {
    window_ = window;
    const std::int64_t blocks = ceil_div(window.rows(), row_block_);
    team.for_each(blocks * parts_of_block, [&](std::int64_t unit, int) {
      pack_by_feature(unit / parts_of_block, unit % parts_of_block);
      if (towards_candidates) pack_by_row(unit / parts_of_block, unit % parts_of_block);
    });
  }

  // S of one tile column: finish(block) is called when a row block's products
  // are complete.
  template <class TileOf, class Finish>
  void products(std::int64_t col, std::int64_t cols, std::int64_t blocks, int thread, const TileOf& tile_of,
                const Finish& finish) const {
    for (std::int64_t k = 0; k < depth_; k += depth_block) {
      const std::int64_t depth = std::min(depth_block, depth_ - k);
      kernels_.pack_b_by_lines(from(candidates_, col, k), cols, depth, packed_candidates_[thread]);
      for (std::int64_t block = 0; block < blocks; ++block) {
        const Tile<Real> tile = tile_of(block);
        const std::int64_t padded = round_up(tile.rows, kernels_.panel_rows);
        const Real* anchors = anchors_by_feature_ + block * by_feature_stride_ + padded * k;
        kernels_.multiply(tile.rows, cols, depth, {anchors, 0, Layout::packed}, packed_candidates_[thread], tile.values,
                          tile.width, k == 0 ? Accumulate::no : Accumulate::yes);
        if (k + depth == depth_) finish(block);
      }
    }
  }

  // dy (cols, D) += C^T X over one row block of a tile column; or = where it is the first.
  void add_candidate_gradient(Tile<Real> coefficients, std::int64_t cols, std::int64_t block, Real* dy,
                              Accumulate accumulate) const {
    kernels_.multiply(cols, depth_, coefficients.rows, {coefficients.values, coefficients.width, Layout::by_columns},
                      anchors_by_row_ + block * by_row_stride_, dy, depth_, accumulate);
  }

  // dx (rows, D) += C Y over one tile, in the features [begin, end); or = likewise.
  void add_anchor_gradient(Tile<Real> coefficients, std::int64_t col, std::int64_t cols, std::int64_t begin,
                           std::int64_t end, int thread, Real* dx, Accumulate accumulate) const {
    for (std::int64_t k = begin; k < end; k += most_grad_features) {
      const std::int64_t features = std::min(most_grad_features, end - k);
      kernels_.pack_b_by_columns(from(candidates_, col, k), features, cols, packed_candidates_[thread]);
      kernels_.multiply(coefficients.rows, features, cols, {coefficients.values, coefficients.width, Layout::by_lines},
                        packed_candidates_[thread], dx + k, depth_, accumulate);
    }
  }

 private:
  // So that a batch of one block is packed by all threads.
  static constexpr std::int64_t parts_of_block = 4;

  std::int64_t first_row(std::int64_t block) const { return window_.row_begin + block * row_block_; }
  std::int64_t block_rows(std::int64_t block) const { return std::min(row_block_, window_.row_end - first_row(block)); }

  void pack_by_feature(std::int64_t block, std::int64_t part) const {
    const std::int64_t rows = block_rows(block), padded = round_up(rows, kernels_.panel_rows);
    const auto [first, count] = share(rows, kernels_.panel_rows, part);
    for (std::int64_t k = 0; k < depth_ && count > 0; k += depth_block) {
      const std::int64_t depth = std::min(depth_block, depth_ - k);
      kernels_.pack_a_by_lines(from(anchors_, first_row(block) + first, k), count, depth,
                               anchors_by_feature_ + block * by_feature_stride_ + padded * k + first * depth);
    }
  }

  void pack_by_row(std::int64_t block, std::int64_t part) const {
    const std::int64_t rows = block_rows(block);
    const auto [first, count] = share(depth_, kernels_.panel_cols, part);
    if (count <= 0) return;
    kernels_.pack_b_by_columns(from(anchors_, first_row(block), first), count, rows,
                               anchors_by_row_ + block * by_row_stride_ + first * rows);
  }

  // (first, count) of one part of `lines`, in whole panels but for the last.
  static std::pair<std::int64_t, std::int64_t> share(std::int64_t lines, std::int64_t panel, std::int64_t part) {
    const std::int64_t most = round_up(ceil_div(lines, parts_of_block), panel);
    return {part * most, std::min(most, lines - part * most)};
  }

  static Strided from(const EmbeddingView& view, std::int64_t row, std::int64_t k) {
    return {view.at(row, k), view.row_stride, view.type};
  }

  const EmbeddingView anchors_, candidates_;
  const std::int64_t depth_, row_block_;
  const ProductKernels<Real>& kernels_ = product_kernels<Real>();
  Window window_{};
  std::int64_t by_feature_stride_, by_row_stride_;  // between row blocks
  Real *anchors_by_feature_, *anchors_by_row_;
  std::vector<Real*> packed_candidates_;  // by thread
};

}  // namespace contrastile::cpu
