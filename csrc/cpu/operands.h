// Embeddings and coefficients packed for the matrix products of a sweep.
//
// Anchors of the open window are packed once, as both operands they will be:
// against candidates over the features (S), and against coefficients over the
// rows (dY). Candidates are packed tile by tile into the scratch of a thread,
// coefficients are used where they lie. 16-bit embeddings are widened on the
// way.
//
// Features may be cut into segments, with products of their own: S is complete
// up to a segment's end before the next one is added to it, and a segment of a
// gradient has coefficients of its own. An ordinary sweep has one segment.
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
  // segment_ends: ascending, the last is D.
  Operands(const EmbeddingView& anchors, const EmbeddingView& candidates, const std::vector<std::int64_t>& segment_ends,
           const Plan& plan, Workspace<Real>& workspace, int threads)
      : anchors_(anchors), candidates_(candidates), depth_(anchors.depth), row_block_(plan.row_block) {
    cut(segment_ends);
    const std::int64_t most_rows = std::min(plan.row_block, plan.strip_rows);
    by_feature_stride_ = round_up(most_rows, most_panel_rows) * depth_;
    by_row_stride_ = most_rows * padded_depth(segment_ends);
    anchors_by_feature_ = workspace.take(plan.blocks_per_strip() * by_feature_stride_);
    anchors_by_row_ = workspace.take(plan.blocks_per_strip() * by_row_stride_);
    for (int thread = 0; thread < threads; ++thread)
      packed_candidates_.push_back(workspace.take(packed_candidate_elements(plan)));
  }

  // Features of the segments, each in whole panels: what the plan is made for.
  static std::int64_t padded_depth(const std::vector<std::int64_t>& segment_ends) {
    std::int64_t padded = 0, begin = 0;
    for (const std::int64_t end : segment_ends) padded += round_up(end - std::exchange(begin, end), most_panel_cols);
    return padded;
  }

  void open(const Window& window, bool towards_candidates, Team& team) {
    window_ = window;
    const std::int64_t blocks = ceil_div(window.rows(), row_block_);
    team.for_each(blocks * parts_of_block, [&](std::int64_t unit, int) {
      pack_by_feature(unit / parts_of_block, unit % parts_of_block);
      if (towards_candidates) pack_by_row(unit / parts_of_block, unit % parts_of_block);
    });
  }

  // S of one tile column: finish(block, segment) is called when a row block's
  // products are complete up to the segment's end.
  template <class TileOf, class Finish>
  void products(std::int64_t col, std::int64_t cols, std::int64_t blocks, int thread, const TileOf& tile_of,
                const Finish& finish) const {
    const std::int64_t padded_cols = round_up(cols, kernels_.panel_cols);
    for (std::size_t first = 0, end = 0; first < slices_.size(); first = end) {
      const auto packed = [&](const Slice& slice) {
        return packed_candidates_[thread] + (slice.begin - slices_[first].begin) * padded_cols;
      };
      for (; end < slices_.size() && slices_[end].end() - slices_[first].begin <= depth_block; ++end)
        kernels_.pack_b_by_lines(from(candidates_, col, slices_[end].begin), cols, slices_[end].depth,
                                 packed(slices_[end]));
      for (std::int64_t block = 0; block < blocks; ++block) {
        const Tile<Real> tile = tile_of(block);
        const std::int64_t padded = round_up(tile.rows, kernels_.panel_rows);
        for (std::size_t s = first; s < end; ++s) {
          const Slice& slice = slices_[s];
          const Real* anchors = anchors_by_feature_ + block * by_feature_stride_ + padded * slice.begin;
          kernels_.multiply(tile.rows, cols, slice.depth, {anchors, 0, Layout::packed}, packed(slice), tile.values,
                            tile.width, s == 0 ? Accumulate::no : Accumulate::yes);
          if (slice.end() == segments_[slice.segment].end) finish(block, slice.segment);
        }
      }
    }
  }

  // dy (cols, D) += C^T X over one row block of a tile column, in the features
  // of a segment; or = where it is the first.
  void add_candidate_gradient(Tile<Real> coefficients, std::int64_t cols, std::int64_t block, std::size_t segment,
                              Real* dy, Accumulate accumulate) const {
    const auto [begin, end, padded_begin] = segments_[segment];
    kernels_.multiply(
        cols, end - begin, coefficients.rows, {coefficients.values, coefficients.width, Layout::by_columns},
        anchors_by_row_ + block * by_row_stride_ + padded_begin * coefficients.rows, dy + begin, depth_, accumulate);
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
  struct Segment {
    std::int64_t begin, end;
    std::int64_t padded_begin;  // with those before it in whole panels
  };

  struct Slice {  // of a segment, as deep as a product for S is at a time
    std::int64_t begin, depth;
    std::size_t segment;

    std::int64_t end() const { return begin + depth; }
  };

  // So that a batch of one block is packed by all threads.
  static constexpr std::int64_t parts_of_block = 4;

  void cut(const std::vector<std::int64_t>& segment_ends) {
    std::int64_t begin = 0, padded = 0;
    for (const std::int64_t end : segment_ends) {
      for (std::int64_t k = begin; k < end; k += depth_block)
        slices_.push_back({k, std::min(depth_block, end - k), segments_.size()});
      segments_.push_back({begin, end, padded});
      padded += round_up(end - begin, most_panel_cols);
      begin = end;
    }
  }

  std::int64_t first_row(std::int64_t block) const { return window_.row_begin + block * row_block_; }
  std::int64_t block_rows(std::int64_t block) const { return std::min(row_block_, window_.row_end - first_row(block)); }

  void pack_by_feature(std::int64_t block, std::int64_t part) const {
    const std::int64_t rows = block_rows(block), padded = round_up(rows, kernels_.panel_rows);
    const auto [first, count] = share(rows, kernels_.panel_rows, part);
    if (count <= 0) return;
    for (const Slice& slice : slices_)
      kernels_.pack_a_by_lines(
          from(anchors_, first_row(block) + first, slice.begin), count, slice.depth,
          anchors_by_feature_ + block * by_feature_stride_ + padded * slice.begin + first * slice.depth);
  }

  void pack_by_row(std::int64_t block, std::int64_t part) const {
    const std::int64_t rows = block_rows(block);
    for (const auto& [begin, end, padded_begin] : segments_) {
      const auto [first, count] = share(end - begin, kernels_.panel_cols, part);
      if (count > 0)
        kernels_.pack_b_by_columns(from(anchors_, first_row(block), begin + first), count, rows,
                                   anchors_by_row_ + block * by_row_stride_ + (padded_begin + first) * rows);
    }
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
  std::vector<Segment> segments_;
  std::vector<Slice> slices_;
  Window window_{};
  std::int64_t by_feature_stride_, by_row_stride_;  // between row blocks
  Real *anchors_by_feature_, *anchors_by_row_;
  std::vector<Real*> packed_candidates_;  // by thread
};

}  // namespace contrastile::cpu
