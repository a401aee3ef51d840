// Both sweeps over tiles of S = scale * X Y^T.
//
//     statistics   one product, 2 N M D flop (half for one triangle)
//     gradient     one more product each for dX and dY; S is computed again
//                  unless it is still in the workspace, which holds the last
//                  window of the statistics sweep
//     memory       one workspace, O(N + M) vectors; dX and dY are the only
//                  N x D accumulators
//     bound        the matrix products; measured in bench/
//
// A window of logits (plan.h) lies in the workspace tile column by tile column,
// each row-major of its own width. A thread takes a tile column and forms its
// logits, with the candidates in its cache. When the window holds logits, a
// thread again takes a tile column and, block of rows by block of rows, turns
// them into coefficients in place and adds C^T X to rows of dY that nobody else
// touches, with those in its cache. dX needs all columns, so it follows when
// the whole window holds coefficients, by blocks of features and rows. Every
// sum thus has one owner and one order: results do not depend on the number of
// threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "masks.h"
#include "operands.h"
#include "plan.h"
#include "running_sum.h"
#include "softmax_weights.h"
#include "sweeps.h"
#include "team.h"
#include "tile_grid.h"
#include "vector_kernels.h"
#include "workspace.h"

namespace contrastile::cpu {

template <class Real>
class TileSweep {
 public:
  TileSweep(const PairProblem<Real>& problem, const Execution& execution, bool whole_rows)
      : problem_(problem),
        rows_(problem.anchors.rows),
        cols_(problem.candidates.rows),
        depth_(problem.anchors.depth),
        triangle_(problem.self_similarity),
        plan_(make_plan({rows_, cols_, depth_, triangle_, whole_rows, execution.threads,
                         execution.workspace_bytes / std::int64_t(sizeof(Real))})),
        grid_(plan_, triangle_),
        windows_(windows_of(plan_, rows_, cols_, triangle_)),
        team_(int(std::min<std::int64_t>(execution.threads, std::max(plan_.tiles_per_chunk(), plan_.grad_units(depth_))))),
        workspace_(workspace_elements(plan_, depth_, team_.threads())),
        operands_(problem.anchors, problem.candidates, {depth_}, plan_, workspace_, team_.threads()),
        row_max_(rows_, minus_infinity<Real>),
        row_sum_(rows_, Real(0)),
        col_max_(cols_, minus_infinity<Real>),
        col_sum_(cols_, Real(0)),
        positive_logit_(rows_, minus_infinity<Real>),
        row_mass_(rows_, 0.0),
        row_weight_(rows_, 0.0),
        col_mass_(cols_, 0.0),
        row_moment_(rows_, 0.0) {
    const std::int64_t partials = plan_.strip_rows * plan_.tiles_per_chunk();
    scores_ = workspace_.take(score_elements(plan_));
    partial_max_ = workspace_.take(partials);
    partial_sum_ = workspace_.take(partials);
    partial_mass_ = workspace_.take(partials);
    partial_weight_ = partial_sum_;  // whose sums are merged when the tiles are weighed
    partial_moment_ = workspace_.take(partials);
    for (int thread = 0; thread < team_.threads(); ++thread) {
      Scratch scratch;
      for (Real** vector :
           {&scratch.col_max, &scratch.col_sum, &scratch.col_shift, &scratch.col_gain, &scratch.col_mass})
        *vector = workspace_.take(plan_.col_block);
      scratch_.push_back(scratch);
    }
  }

  void statistics(bool columns, std::int64_t* row_rank) {
    if (row_rank && plan_.chunk_cols < cols_) {  // a positive may lie in a later window
      for (const Window& window : windows_) {
        open(window);
        score_window(false, false);
      }
    }
    for (const Window& window : windows_) {
      open(window);
      score_window(true, columns);
      merge_row_statistics();
      if (row_rank) count_ranks(row_rank);
    }
    fold_triangle();
  }

  void gradient(const GivenWeights<Real>& weights, const PairGrads<Real>& grads, bool row_stats, bool col_stats) {
    begin_gradient(grads, false);
    for (const Window& window : windows_) {
      open(window);
      score_window(row_stats, col_stats);
      if (row_stats) merge_row_statistics();
      weigh_scored(weights, grads);
    }
    if (row_stats) fold_triangle();
  }

  void softmax_gradient(bool columns, double gain, const PairGrads<Real>& grads) {
    SoftmaxWeights<Real> softmax(rows_, columns ? cols_ : 0, problem_.positives, triangle_, gain);
    const bool in_one_sweep = !columns && !triangle_ && plan_.chunk_cols == cols_;
    begin_gradient(grads, !in_one_sweep);
    if (in_one_sweep) {  // a row's normaliser is known within its strip
      for (const Window& window : windows_) {
        open(window);
        score_window(true, false);
        merge_row_statistics();
        softmax.normalise_rows(window.row_begin, window.row_end, row_max_, row_sum_, positive_logit_);
        weigh_scored(softmax.weights(), grads);
      }
      return;
    }
    statistics(columns, nullptr);
    softmax.normalise_rows(0, rows_, row_max_, row_sum_, positive_logit_);
    if (triangle_)
      softmax.mirror();
    else if (columns)
      softmax.normalise_columns(col_max_, col_sum_, positive_logit_);

    // Backwards, because the last window's logits are still in the workspace.
    weigh_scored(softmax.weights(), grads);
    for (std::size_t k = windows_.size() - 1; k-- > 0;) {
      open(windows_[k]);
      score_window(false, false);
      weigh_scored(softmax.weights(), grads);
    }
  }

  void store_stats(const PairStats<Real>& stats) const {
    const auto copy = [](const std::vector<Real>& from, Real* to) {
      if (to) std::copy(from.begin(), from.end(), to);
    };
    copy(row_max_, stats.row_max);
    copy(row_sum_, stats.row_sum);
    copy(triangle_ ? row_max_ : col_max_, stats.col_max);
    copy(triangle_ ? row_sum_ : col_sum_, stats.col_sum);
    copy(positive_logit_, stats.positive_logit);
  }

  void store_sums(const PairGrads<Real>& grads) const {
    const auto copy = [](const std::vector<double>& from, Real* to) {
      if (to) std::transform(from.begin(), from.end(), to, [](double value) { return Real(value); });
    };
    copy(row_moment_, grads.row_moment);
    std::vector<double> row_mass = row_mass_;
    if (triangle_)
      for (std::int64_t i = 0; i < rows_; ++i) row_mass[i] += col_mass_[i];
    copy(row_mass, grads.row_mass);
    copy(triangle_ ? row_mass : col_mass_, grads.col_mass);
    copy(row_weight_, grads.row_weight);
  }

 private:
  struct Scratch {  // of one thread
    Real *col_max, *col_sum, *col_shift, *col_gain, *col_mass;
  };

  // ---- phases
  // --------------------------------------------------------------------------------------

  // Whoever comes first to a part of dX or dY writes it, the others add; of one triangle all add to zeros.
  void begin_gradient(const PairGrads<Real>& grads, bool backwards) {
    towards_candidates_ = candidate_gradient(grads) != nullptr;
    backwards_ = backwards;
    if (!triangle_ || !grads.dx) return;
    constexpr std::int64_t rows_per_unit = 64;
    team_.for_each(ceil_div(rows_, rows_per_unit), [&](std::int64_t unit, int) {
      const std::int64_t first = unit * rows_per_unit;
      std::fill_n(grads.dx + first * depth_, std::min(rows_per_unit, rows_ - first) * depth_, Real(0));
    });
  }

  Accumulate onto_anchors(std::int64_t tile) const {
    const Window& window = grid_.window();
    const bool first = tile == 0 && (backwards_ ? window.col_end == cols_ : window.col_begin == 0);
    return first && !triangle_ ? Accumulate::no : Accumulate::yes;
  }

  Accumulate onto_candidates(std::int64_t block) const {
    const Window& window = grid_.window();
    const bool first = block == 0 && (backwards_ ? window.row_end == rows_ : window.row_begin == 0);
    return first && !triangle_ ? Accumulate::no : Accumulate::yes;
  }

  void open(const Window& window) {
    grid_.open(window, scores_);
    operands_.open(window, towards_candidates_, team_);
  }

  // The longest tile columns of a triangle come first, so that no thread ends with one.
  template <class Work>
  void for_each_tile(const Work& work) {
    const std::int64_t last = grid_.tile_count() - 1;
    team_.for_each(last + 1, [&](std::int64_t unit, int thread) { work(triangle_ ? last - unit : unit, thread); });
  }

  void score_window(bool row_stats, bool col_stats) {
    for_each_tile([&](std::int64_t tile, int thread) { score(tile, thread, row_stats, col_stats); });
  }

  void weigh_scored(const GivenWeights<Real>& weights, const PairGrads<Real>& grads) {
    for_each_tile([&](std::int64_t tile, int thread) {
      load_col_weights(tile, weights, thread);
      for (std::int64_t block = 0; block < grid_.blocks_of(tile); ++block) weigh(tile, block, weights, grads, thread);
    });
    finish_window(grads);
  }

  void finish_window(const PairGrads<Real>& grads) {
    team_.for_each(grid_.block_count(), [&](std::int64_t block, int) { add_row_sums(block, grads.row_weight); });
    if (!grads.dx) return;
    team_.for_each(plan_.grad_units(depth_),
                   [&](std::int64_t unit, int thread) { add_anchor_gradient(unit, grads.dx, thread); });
  }

  // ---- one tile
  // ------------------------------------------------------------------------------------

  // Logits of a tile column, finished block by block while they are in the
  // cache.
  void score(std::int64_t tile, int thread, bool row_stats, bool col_stats) {
    operands_.products(
        grid_.tile_begin(tile), grid_.tile_cols(tile), grid_.blocks_of(tile), thread,
        [&](std::int64_t block) { return grid_.tile_at(tile, block); },
        [&](std::int64_t block, std::size_t) { finish_logits(tile, block, thread, row_stats, col_stats); });
  }

  void finish_logits(std::int64_t tile, std::int64_t block, int thread, bool row_stats, bool col_stats) {
    const Tile<Real> logits = grid_.tile_at(tile, block);
    const Scratch& scratch = scratch_[thread];
    const std::int64_t row = grid_.block_begin(block), col = grid_.tile_begin(tile), cols = grid_.tile_cols(tile);
    for (std::int64_t i = 0; i < logits.rows; ++i)
      std::fill(logits.values + i * logits.width + cols, logits.values + (i + 1) * logits.width, minus_infinity<Real>);
    mask(logits, problem_, row, col, cols, [&](std::int64_t i, std::int64_t j, Real logit) {
      positive_logit_[row + i] = logit;
      if (triangle_) positive_logit_[col + j] = logit;
    });

    const std::int64_t partial = grid_.partial_index(tile, block);
    const bool col_running = triangle_ ? row_stats && !grid_.on_diagonal(tile, block) : col_stats;
    kernels_.scale_and_maxima(logits, problem_.scale + row, partial_max_ + partial,
                              col_running ? scratch.col_max : nullptr);
    if (!row_stats) return;
    kernels_.exp_sums(logits, partial_max_ + partial, partial_sum_ + partial, scratch.col_max,
                      col_running ? scratch.col_sum : nullptr);
    if (!col_running) return;
    for (std::int64_t j = 0; j < cols; ++j)
      merge_running_sum(col_max_[col + j], col_sum_[col + j], scratch.col_max[j], scratch.col_sum[j]);
  }

  void load_col_weights(std::int64_t tile, const GivenWeights<Real>& weights, int thread) {
    if (!weights.col_shift) return;
    const Scratch& scratch = scratch_[thread];
    const std::int64_t col = grid_.tile_begin(tile), cols = grid_.tile_cols(tile);
    std::copy_n(weights.col_shift + col, cols, scratch.col_shift);
    std::copy_n(weights.col_gain + col, cols, scratch.col_gain);
    std::fill(scratch.col_shift + cols, scratch.col_shift + plan_.col_block, -minus_infinity<Real>);
    std::fill(scratch.col_gain + cols, scratch.col_gain + plan_.col_block, Real(0));
  }

  // Coefficients of a tile in the place of its logits, and what they add to dY.
  void weigh(std::int64_t tile, std::int64_t block, const GivenWeights<Real>& weights, const PairGrads<Real>& grads,
             int thread) {
    const Tile<Real> logits = grid_.tile_at(tile, block);
    const Scratch& scratch = scratch_[thread];
    const std::int64_t row = grid_.block_begin(block), col = grid_.tile_begin(tile), cols = grid_.tile_cols(tile);
    const std::int64_t partial = grid_.partial_index(tile, block);
    WeightTerm<Real> row_term{}, col_term{};
    if (weights.row_shift)
      row_term = {weights.row_shift + row, weights.row_gain + row, partial_mass_ + partial,
                  grads.row_weight ? partial_weight_ + partial : nullptr};
    if (weights.col_shift) {
      std::fill_n(scratch.col_mass, plan_.col_block, Real(0));
      col_term = {scratch.col_shift, scratch.col_gain, scratch.col_mass, nullptr};
    }
    kernels_.weigh(logits, problem_.scale + row, partial_max_ + partial, row_term, col_term, weights.function,
                   partial_moment_ + partial);
    if (!weights.row_shift) std::fill_n(partial_mass_ + partial, logits.rows, Real(0));
    // On the diagonal of one triangle the mirror image is in the same tile, and
    // rows have counted it.
    if (weights.col_shift && !grid_.on_diagonal(tile, block))
      for (std::int64_t j = 0; j < cols; ++j) col_mass_[col + j] += scratch.col_mass[j];
    if (weights.positive_coeff) {
      for_each_positive(problem_.positives + row, logits.rows, col, cols, [&](std::int64_t i, std::int64_t j) {
        const Real coefficient = weights.positive_coeff[row + i];
        logits.values[i * logits.width + j] = coefficient * problem_.scale[row + i];
        partial_moment_[partial + i] += coefficient * positive_logit_[row + i];
      });
    }
    Real* dy = candidate_gradient(grads);
    if (dy && !grid_.on_diagonal(tile, block))
      operands_.add_candidate_gradient(logits, cols, block, 0, dy + col * depth_, onto_candidates(block));
  }

  // Of one triangle, dY is dX: pairs above the diagonal count towards both
  // their ends.
  Real* candidate_gradient(const PairGrads<Real>& grads) const { return triangle_ ? grads.dx : grads.dy; }

  // dX += scale C Y for one unit of rows and features, tile after tile.
  void add_anchor_gradient(std::int64_t unit, Real* dx, int thread) {
    const std::int64_t feature_parts = ceil_div(depth_, plan_.grad_features);
    const std::int64_t first = unit / feature_parts * plan_.grad_rows;
    const std::int64_t end = std::min(first + plan_.grad_rows, grid_.window().rows());
    if (first >= end) return;  // of a shorter last window
    const std::int64_t feature = unit % feature_parts * plan_.grad_features;
    const std::int64_t feature_end = std::min(feature + plan_.grad_features, depth_);
    Real* target = dx + (grid_.window().row_begin + first) * depth_;
    for (std::int64_t tile = grid_.first_tile_of(first / plan_.row_block); tile < grid_.tile_count(); ++tile) {
      const std::int64_t rows = std::min(end, grid_.rows_of(tile)) - first;
      if (rows <= 0) continue;
      operands_.add_anchor_gradient(grid_.tile_at(tile, first, rows), grid_.tile_begin(tile), grid_.tile_cols(tile),
                                    feature, feature_end, thread, target, onto_anchors(tile));
    }
  }

  // One triangle: what rows have not seen to their left was counted as columns.
  void fold_triangle() {
    if (!triangle_) return;
    for (std::int64_t i = 0; i < rows_; ++i) merge_running_sum(row_max_[i], row_sum_[i], col_max_[i], col_sum_[i]);
  }

  // ---- sums over a window's tile columns, in their order
  // -------------------------------------------

  void merge_row_statistics() {
    team_.for_each(grid_.block_count(), [&](std::int64_t block, int) {
      const std::int64_t row = grid_.block_begin(block);
      for (std::int64_t tile = grid_.first_tile_of(block); tile < grid_.tile_count(); ++tile) {
        const std::int64_t partial = grid_.partial_index(tile, block);
        for (std::int64_t i = 0; i < grid_.block_rows(block); ++i)
          merge_running_sum(row_max_[row + i], row_sum_[row + i], partial_max_[partial + i], partial_sum_[partial + i]);
      }
    });
  }

  void add_row_sums(std::int64_t block, bool weights) {
    const std::int64_t row = grid_.block_begin(block);
    for (std::int64_t tile = grid_.first_tile_of(block); tile < grid_.tile_count(); ++tile) {
      const std::int64_t partial = grid_.partial_index(tile, block);
      // C of one triangle stands for both s_ij and s_ji: a diagonal tile holds
      // every pair twice.
      const double share = grid_.on_diagonal(tile, block) ? 0.5 : 1.0;
      for (std::int64_t i = 0; i < grid_.block_rows(block); ++i) {
        row_mass_[row + i] += partial_mass_[partial + i];
        if (weights) row_weight_[row + i] += partial_weight_[partial + i];
        row_moment_[row + i] += share * partial_moment_[partial + i];
      }
    }
  }

  void count_ranks(std::int64_t* row_rank) {
    team_.for_each(grid_.block_count(), [&](std::int64_t block, int) {
      const std::int64_t row = grid_.block_begin(block);
      for (std::int64_t tile = 0; tile < grid_.tile_count(); ++tile)
        kernels_.count_above(grid_.tile_at(tile, block), grid_.tile_cols(tile), positive_logit_.data() + row,
                             row_rank + row);
    });
  }

  const PairProblem<Real> problem_;
  const std::int64_t rows_, cols_, depth_;
  const bool triangle_;
  bool towards_candidates_ = false, backwards_ = false;
  const Plan plan_;
  TileGrid<Real> grid_;
  const std::vector<Window> windows_;
  const VectorKernels<Real>& kernels_ = vector_kernels<Real>();
  Team team_;
  Workspace<Real> workspace_;
  Operands<Real> operands_;

  Real *scores_, *partial_max_, *partial_sum_, *partial_mass_, *partial_weight_, *partial_moment_;
  std::vector<Scratch> scratch_;

  std::vector<Real> row_max_, row_sum_, col_max_, col_sum_, positive_logit_;
  std::vector<double> row_mass_, row_weight_, col_mass_, row_moment_;
};

}  // namespace contrastile::cpu
