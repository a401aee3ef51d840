// Both sweeps over tiles of S = scale * X Y^T.
//
//     statistics   one product, 2 N M D flop (half for one triangle)
//     gradient     one more product each for dX and dY; S is computed again unless it is still in the
//                  workspace, which holds the last window of the statistics sweep
//     memory       one workspace, O(N + M) vectors; dX and dY are the only N x D accumulators
//     bound        the matrix products; measured in bench/
//
// A window of logits (plan.h) lies in the workspace tile column by tile column, each row-major of its
// own width. A thread takes a tile column: it forms the logits, turns them into coefficients in place,
// and adds C^T X to the rows of dY that nobody else touches. dX needs all columns, so it follows when
// the whole window holds coefficients, by blocks of rows. Every sum thus has one owner and one order:
// results do not depend on the number of threads.
#include "sweeps.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "blas.h"
#include "plan.h"
#include "running_sum.h"
#include "team.h"
#include "vector_kernels.h"
#include "workspace.h"

namespace contrastile::cpu {

namespace {

bool widens(const EmbeddingView& view) {
  return view.type == ElementType::float16 || view.type == ElementType::bfloat16;
}

template <class Real>
class Sweep {
 public:
  Sweep(const PairProblem<Real>& problem, const Execution& execution)
      : problem_(problem),
        rows_(problem.anchors.rows),
        cols_(problem.candidates.rows),
        depth_(problem.anchors.depth),
        triangle_(problem.self_similarity),
        widens_(widens(problem.anchors)),
        plan_(make_plan({rows_, cols_, depth_, triangle_, widens_, execution.threads,
                         execution.workspace_bytes / std::int64_t(sizeof(Real))})),
        windows_(windows_of(plan_, rows_, cols_, triangle_)),
        team_(int(std::min<std::int64_t>(execution.threads, std::max(plan_.tiles_per_chunk(), plan_.grad_units())))),
        workspace_(workspace_elements(plan_, depth_, widens_, team_.threads())),
        row_max_(rows_, minus_infinity<Real>),
        row_sum_(rows_, Real(0)),
        col_max_(cols_, minus_infinity<Real>),
        col_sum_(cols_, Real(0)),
        positive_logit_(rows_, minus_infinity<Real>),
        row_mass_(rows_, 0.0),
        col_mass_(cols_, 0.0),
        row_moment_(rows_, 0.0) {
    const std::int64_t partials = plan_.strip_rows * plan_.tiles_per_chunk();
    scores_ = workspace_.take(plan_.strip_rows * round_up(plan_.chunk_cols, tile_width_multiple));
    partial_max_ = workspace_.take(partials);
    partial_sum_ = workspace_.take(partials);
    partial_mass_ = workspace_.take(partials);
    partial_moment_ = workspace_.take(partials);
    if (widens_) wide_anchors_ = workspace_.take(plan_.strip_rows * depth_);
    for (int thread = 0; thread < team_.threads(); ++thread) {
      Scratch scratch;
      for (Real** vector : {&scratch.col_max, &scratch.col_sum, &scratch.col_shift, &scratch.col_gain,
                            &scratch.col_mass})
        *vector = workspace_.take(plan_.col_block);
      if (widens_) scratch.wide_candidates = workspace_.take(plan_.col_block * plan_.depth_block);
      scratch_.push_back(scratch);
    }
  }

  void statistics(bool columns, std::int64_t* row_rank) {
    if (row_rank && plan_.chunk_cols < cols_) {   // a positive may lie in a later window
      for (const Window& window : windows_) {
        open(window);
        for_each_tile([&](std::int64_t tile, std::int64_t block, int thread) { score(tile, block, thread, false, false); });
      }
    }
    for (const Window& window : windows_) {
      open(window);
      for_each_tile([&](std::int64_t tile, std::int64_t block, int thread) { score(tile, block, thread, true, columns); });
      merge_row_statistics();
      if (row_rank) count_ranks(row_rank);
    }
    fold_triangle();
  }

  void gradient(const GivenWeights<Real>& weights, const PairGrads<Real>& grads, bool row_stats, bool col_stats) {
    for (const Window& window : windows_) {
      open(window);
      score_and_weigh(weights, grads, row_stats, col_stats);
    }
    if (row_stats) fold_triangle();
  }

  void softmax_gradient(bool columns, const PairGrads<Real>& grads) {
    std::vector<Real> shift(rows_), gain(rows_), coeff(rows_, Real(0)), col_shift, col_gain;
    GivenWeights<Real> weights{shift.data(), gain.data(), nullptr, nullptr, problem_.positives ? coeff.data() : nullptr,
                               WeightFunction::softmax};
    const auto normalise_row = [&](std::int64_t i) {
      const auto [row_shift, row_gain, row_coeff] = softmax_row(row_max_[i], row_sum_[i], positive_logit_[i]);
      shift[i] = row_shift;
      gain[i] = row_gain;
      coeff[i] = row_coeff;
    };

    if (!columns && !triangle_ && plan_.chunk_cols == cols_) {   // a row's normaliser is known within its strip
      for (const Window& window : windows_) {
        open(window);
        for_each_tile([&](std::int64_t tile, std::int64_t block, int thread) { score(tile, block, thread, true, false); });
        merge_row_statistics();
        for (std::int64_t i = window.row_begin; i < window.row_end; ++i) normalise_row(i);
        weigh_scored(weights, grads);
      }
      return;
    }

    statistics(columns && !triangle_, nullptr);
    for (std::int64_t i = 0; i < rows_; ++i) normalise_row(i);
    if (triangle_) {
      weights.col_shift = shift.data();
      weights.col_gain = gain.data();
      if (problem_.positives) {
        const std::vector<Real> one_end = coeff;
        for (std::int64_t i = 0; i < rows_; ++i) coeff[i] += one_end[problem_.positives[i]];
      }
    } else if (columns) {
      col_shift.resize(cols_);
      col_gain.resize(cols_);
      std::vector<Real> col_positive(cols_, minus_infinity<Real>);
      if (problem_.positives)
        for (std::int64_t i = 0; i < rows_; ++i) col_positive[problem_.positives[i]] = positive_logit_[i];
      std::vector<Real> col_coeff(cols_);
      for (std::int64_t j = 0; j < cols_; ++j) {
        const auto [one_shift, one_gain, one_coeff] = softmax_row(col_max_[j], col_sum_[j], col_positive[j]);
        col_shift[j] = one_shift;
        col_gain[j] = one_gain;
        col_coeff[j] = one_coeff;
      }
      if (problem_.positives)
        for (std::int64_t i = 0; i < rows_; ++i) coeff[i] += col_coeff[problem_.positives[i]];
      weights.col_shift = col_shift.data();
      weights.col_gain = col_gain.data();
    }

    // Backwards, because the last window's logits are still in the workspace.
    weigh_scored(weights, grads);
    for (std::size_t k = windows_.size() - 1; k-- > 0;) {
      open(windows_[k]);
      score_and_weigh(weights, grads, false, false);
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
  }

 private:
  struct Scratch {   // of one thread
    Real *col_max, *col_sum, *col_shift, *col_gain, *col_mass;
    Real* wide_candidates = nullptr;
  };

  // ---- geometry of the open window -----------------------------------------------------------------

  std::int64_t tile_count() const { return ceil_div(window_.cols(), plan_.col_block); }
  std::int64_t block_count() const { return ceil_div(window_.rows(), plan_.row_block); }
  std::int64_t tile_begin(std::int64_t tile) const { return window_.col_begin + tile * plan_.col_block; }
  std::int64_t tile_cols(std::int64_t tile) const { return std::min(plan_.col_block, window_.col_end - tile_begin(tile)); }
  std::int64_t block_begin(std::int64_t block) const { return window_.row_begin + block * plan_.row_block; }
  std::int64_t block_rows(std::int64_t block) const { return std::min(plan_.row_block, window_.row_end - block_begin(block)); }

  // One triangle: row blocks below a tile column's own are another tile's mirror image.
  std::int64_t diagonal_block(std::int64_t tile) const {
    return tile + (window_.col_begin - window_.row_begin) / plan_.col_block;
  }
  std::int64_t blocks_of(std::int64_t tile) const {
    return triangle_ ? std::min(diagonal_block(tile) + 1, block_count()) : block_count();
  }
  std::int64_t first_tile_of(std::int64_t block) const {
    return triangle_ ? std::max<std::int64_t>(block - diagonal_block(0), 0) : 0;
  }
  bool on_diagonal(std::int64_t tile, std::int64_t block) const { return triangle_ && diagonal_block(tile) == block; }

  // Logits of rows [first_row, first_row + rows) of the window within one tile column.
  Tile<Real> tile_at(std::int64_t tile, std::int64_t first_row, std::int64_t rows) const {
    const std::int64_t width = round_up(tile_cols(tile), tile_width_multiple);
    return {scores_ + tile * plan_.col_block * window_.rows() + first_row * width, rows, width};
  }
  Tile<Real> tile_at(std::int64_t tile, std::int64_t block) const {
    return tile_at(tile, block * plan_.row_block, block_rows(block));
  }
  std::int64_t partial_index(std::int64_t tile, std::int64_t block) const {
    return tile * window_.rows() + block * plan_.row_block;
  }

  // ---- phases --------------------------------------------------------------------------------------

  void open(const Window& window) {
    window_ = window;
    if (!widens_) return;
    constexpr std::int64_t rows_per_unit = 64;
    team_.for_each(ceil_div(window.rows(), rows_per_unit), [&](std::int64_t unit, int) {
      const std::int64_t first = unit * rows_per_unit;
      const std::int64_t rows = std::min(rows_per_unit, window.rows() - first);
      const EmbeddingView& x = problem_.anchors;
      kernels_.widen(static_cast<const std::uint16_t*>(x.data) + (window.row_begin + first) * x.row_stride,
                     x.row_stride, x.type, wide_anchors_ + first * depth_, depth_, rows, depth_);
    });
  }

  template <class Work>
  void for_each_tile(const Work& work) {
    team_.for_each(tile_count(), [&](std::int64_t tile, int thread) {
      for (std::int64_t block = 0; block < blocks_of(tile); ++block) work(tile, block, thread);
    });
  }

  void score_and_weigh(const GivenWeights<Real>& weights, const PairGrads<Real>& grads, bool row_stats, bool col_stats) {
    team_.for_each(tile_count(), [&](std::int64_t tile, int thread) {
      load_col_weights(tile, weights, thread);
      for (std::int64_t block = 0; block < blocks_of(tile); ++block) {
        score(tile, block, thread, row_stats, col_stats);
        weigh(tile, block, weights, thread);
      }
      add_candidate_gradient(tile, grads);
    });
    if (row_stats) merge_row_statistics();
    finish_window(grads);
  }

  void weigh_scored(const GivenWeights<Real>& weights, const PairGrads<Real>& grads) {
    team_.for_each(tile_count(), [&](std::int64_t tile, int thread) {
      load_col_weights(tile, weights, thread);
      for (std::int64_t block = 0; block < blocks_of(tile); ++block) weigh(tile, block, weights, thread);
      add_candidate_gradient(tile, grads);
    });
    finish_window(grads);
  }

  void finish_window(const PairGrads<Real>& grads) {
    team_.for_each(block_count(), [&](std::int64_t block, int) { add_row_sums(block); });
    if (!grads.dx) return;
    team_.for_each(ceil_div(window_.rows(), plan_.grad_rows),
                   [&](std::int64_t unit, int thread) { add_anchor_gradient(unit, grads.dx, thread); });
  }

  // ---- one tile ------------------------------------------------------------------------------------

  void score(std::int64_t tile, std::int64_t block, int thread, bool row_stats, bool col_stats) {
    const Tile<Real> logits = tile_at(tile, block);
    const Scratch& scratch = scratch_[thread];
    const std::int64_t row = block_begin(block), col = tile_begin(tile), cols = tile_cols(tile);
    form_dots(logits, block, col, cols, scratch);
    mask(logits, tile, block);

    const std::int64_t partial = partial_index(tile, block);
    const bool col_running = triangle_ ? row_stats && !on_diagonal(tile, block) : col_stats;
    kernels_.scale_and_maxima(logits, problem_.scale + row, partial_max_ + partial,
                              col_running ? scratch.col_max : nullptr);
    if (!row_stats) return;
    kernels_.exp_sums(logits, partial_max_ + partial, partial_sum_ + partial, scratch.col_max,
                      col_running ? scratch.col_sum : nullptr);
    if (!col_running) return;
    for (std::int64_t j = 0; j < cols; ++j)
      merge_running_sum(col_max_[col + j], col_sum_[col + j], scratch.col_max[j], scratch.col_sum[j]);
  }

  void form_dots(Tile<Real> dots, std::int64_t block, std::int64_t col, std::int64_t cols, const Scratch& scratch) {
    for (std::int64_t k = 0; k < depth_; k += plan_.depth_block) {
      // Only widening needs blocks of depth, to bound its scratch.
      const std::int64_t depth = widens_ ? std::min(plan_.depth_block, depth_ - k) : depth_;
      multiply<Real>(dots.rows, cols, depth, anchors(block_begin(block), k),
                     transposed(candidates(col, k, cols, depth, scratch)), k == 0 ? Accumulate::no : Accumulate::yes,
                     dots.values, dots.width);
      if (!widens_) break;
    }
    for (std::int64_t i = 0; i < dots.rows; ++i)
      std::fill(dots.values + i * dots.width + cols, dots.values + (i + 1) * dots.width, minus_infinity<Real>);
  }

  void mask(Tile<Real> dots, std::int64_t tile, std::int64_t block) {
    const std::int64_t row = block_begin(block), col = tile_begin(tile), cols = tile_cols(tile);
    if (problem_.positives) {
      for_each_positive(row, dots.rows, col, cols, [&](std::int64_t i, std::int64_t j) {
        Real& dot = dots.values[i * dots.width + j];
        positive_logit_[row + i] = dot * problem_.scale[row + i];
        if (triangle_) positive_logit_[col + j] = positive_logit_[row + i];
        dot = minus_infinity<Real>;
      });
    }
    if (problem_.row_groups)
      kernels_.mask_equal_groups(dots, problem_.row_groups + row, problem_.col_groups + col, cols);
    if (problem_.self_offset) {
      const std::int64_t first = row + *problem_.self_offset - col;   // the sample of the tile's first row
      for (std::int64_t i = std::max<std::int64_t>(0, -first); i < std::min(dots.rows, cols - first); ++i)
        dots.values[i * dots.width + first + i] = minus_infinity<Real>;
    }
  }

  template <class Work>
  void for_each_positive(std::int64_t row, std::int64_t rows, std::int64_t col, std::int64_t cols, const Work& work) {
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t j = problem_.positives[row + i] - col;
      if (j >= 0 && j < cols) work(i, j);
    }
  }

  void load_col_weights(std::int64_t tile, const GivenWeights<Real>& weights, int thread) {
    if (!weights.col_shift) return;
    const Scratch& scratch = scratch_[thread];
    const std::int64_t col = tile_begin(tile), cols = tile_cols(tile);
    std::copy_n(weights.col_shift + col, cols, scratch.col_shift);
    std::copy_n(weights.col_gain + col, cols, scratch.col_gain);
    std::fill(scratch.col_shift + cols, scratch.col_shift + plan_.col_block, Real(0));
    std::fill(scratch.col_gain + cols, scratch.col_gain + plan_.col_block, Real(0));
  }

  void weigh(std::int64_t tile, std::int64_t block, const GivenWeights<Real>& weights, int thread) {
    const Tile<Real> logits = tile_at(tile, block);
    const Scratch& scratch = scratch_[thread];
    const std::int64_t row = block_begin(block), col = tile_begin(tile), cols = tile_cols(tile);
    const std::int64_t partial = partial_index(tile, block);
    WeightTerm<Real> row_term{}, col_term{};
    if (weights.row_shift) row_term = {weights.row_shift + row, weights.row_gain + row, partial_mass_ + partial};
    if (weights.col_shift) {
      std::fill_n(scratch.col_mass, plan_.col_block, Real(0));
      col_term = {scratch.col_shift, scratch.col_gain, scratch.col_mass};
    }
    kernels_.weigh(logits, problem_.scale + row, row_term, col_term, weights.function, partial_moment_ + partial);
    if (!weights.row_shift) std::fill_n(partial_mass_ + partial, logits.rows, Real(0));
    // On the diagonal of one triangle the mirror image is in the same tile, and rows have counted it.
    if (weights.col_shift && !on_diagonal(tile, block))
      for (std::int64_t j = 0; j < cols; ++j) col_mass_[col + j] += scratch.col_mass[j];
    if (weights.positive_coeff) {
      for_each_positive(row, logits.rows, col, cols, [&](std::int64_t i, std::int64_t j) {
        const Real coefficient = weights.positive_coeff[row + i];
        logits.values[i * logits.width + j] = coefficient * problem_.scale[row + i];
        partial_moment_[partial + i] += coefficient * positive_logit_[row + i];
      });
    }
  }

  // dY += (scale C)^T X over the window's rows; of one triangle, over the rows above the diagonal tile.
  void add_candidate_gradient(std::int64_t tile, const PairGrads<Real>& grads) {
    Real* target = triangle_ ? grads.dx : grads.dy;
    const std::int64_t rows = triangle_ ? std::min(diagonal_block(tile) * plan_.row_block, window_.rows()) : window_.rows();
    if (!target || rows == 0) return;
    const Tile<Real> coefficients = tile_at(tile, 0, rows);
    multiply<Real>(tile_cols(tile), depth_, rows, transposed({coefficients.values, coefficients.width}),
                   anchors(window_.row_begin, 0), Accumulate::yes, target + tile_begin(tile) * depth_, depth_);
  }

  // dX += scale C Y for one block of rows, tile after tile.
  void add_anchor_gradient(std::int64_t unit, Real* dx, int thread) {
    const std::int64_t first = unit * plan_.grad_rows;
    const std::int64_t rows = std::min(plan_.grad_rows, window_.rows() - first);
    Real* target = dx + (window_.row_begin + first) * depth_;
    for (std::int64_t tile = first_tile_of(first / plan_.row_block); tile < tile_count(); ++tile) {
      const Tile<Real> coefficients = tile_at(tile, first, rows);
      const std::int64_t cols = tile_cols(tile);
      for (std::int64_t k = 0; k < depth_; k += plan_.depth_block) {
        const std::int64_t depth = widens_ ? std::min(plan_.depth_block, depth_ - k) : depth_;
        multiply<Real>(rows, depth, cols, {coefficients.values, coefficients.width},
                       candidates(tile_begin(tile), k, cols, depth, scratch_[thread]), Accumulate::yes, target + k,
                       depth_);
        if (!widens_) break;
      }
    }
  }

  // One triangle: what rows have not seen to their left was counted as columns.
  void fold_triangle() {
    if (!triangle_) return;
    for (std::int64_t i = 0; i < rows_; ++i) merge_running_sum(row_max_[i], row_sum_[i], col_max_[i], col_sum_[i]);
  }

  // ---- sums over a window's tile columns, in their order -------------------------------------------

  void merge_row_statistics() {
    team_.for_each(block_count(), [&](std::int64_t block, int) {
      const std::int64_t row = block_begin(block);
      for (std::int64_t tile = first_tile_of(block); tile < tile_count(); ++tile) {
        const std::int64_t partial = partial_index(tile, block);
        for (std::int64_t i = 0; i < block_rows(block); ++i)
          merge_running_sum(row_max_[row + i], row_sum_[row + i], partial_max_[partial + i], partial_sum_[partial + i]);
      }
    });
  }

  void add_row_sums(std::int64_t block) {
    const std::int64_t row = block_begin(block);
    for (std::int64_t tile = first_tile_of(block); tile < tile_count(); ++tile) {
      const std::int64_t partial = partial_index(tile, block);
      // C of one triangle stands for both s_ij and s_ji: a diagonal tile holds every pair twice.
      const double share = on_diagonal(tile, block) ? 0.5 : 1.0;
      for (std::int64_t i = 0; i < block_rows(block); ++i) {
        row_mass_[row + i] += partial_mass_[partial + i];
        row_moment_[row + i] += share * partial_moment_[partial + i];
      }
    }
  }

  void count_ranks(std::int64_t* row_rank) {
    team_.for_each(block_count(), [&](std::int64_t block, int) {
      const std::int64_t row = block_begin(block);
      for (std::int64_t tile = 0; tile < tile_count(); ++tile)
        kernels_.count_above(tile_at(tile, block), tile_cols(tile), positive_logit_.data() + row, row_rank + row);
    });
  }

  // ---- operands ------------------------------------------------------------------------------------

  // Anchors from `row` (of the open window) and depth `k` on.
  Operand<Real> anchors(std::int64_t row, std::int64_t k) const {
    if (widens_) return {wide_anchors_ + (row - window_.row_begin) * depth_ + k, depth_};
    const EmbeddingView& x = problem_.anchors;
    return {static_cast<const Real*>(x.data) + row * x.row_stride + k, x.row_stride};
  }

  // A (cols, depth) block of candidates; 16-bit ones are widened into the thread's scratch.
  Operand<Real> candidates(std::int64_t col, std::int64_t k, std::int64_t cols, std::int64_t depth,
                           const Scratch& scratch) const {
    const EmbeddingView& y = problem_.candidates;
    if (!widens_) return {static_cast<const Real*>(y.data) + col * y.row_stride + k, y.row_stride};
    kernels_.widen(static_cast<const std::uint16_t*>(y.data) + col * y.row_stride + k, y.row_stride, y.type,
                   scratch.wide_candidates, depth, cols, depth);
    return {scratch.wide_candidates, depth};
  }

  static Operand<Real> transposed(Operand<Real> operand) {
    operand.transpose = Transpose::yes;
    return operand;
  }

  const PairProblem<Real> problem_;
  const std::int64_t rows_, cols_, depth_;
  const bool triangle_, widens_;
  const Plan plan_;
  const std::vector<Window> windows_;
  const VectorKernels<Real>& kernels_ = vector_kernels<Real>();
  Team team_;
  Workspace<Real> workspace_;
  Window window_{};

  Real *scores_, *partial_max_, *partial_sum_, *partial_mass_, *partial_moment_;
  Real* wide_anchors_ = nullptr;
  std::vector<Scratch> scratch_;

  std::vector<Real> row_max_, row_sum_, col_max_, col_sum_, positive_logit_;
  std::vector<double> row_mass_, col_mass_, row_moment_;
};

}  // namespace

template <class Real>
void pair_stats(const PairProblem<Real>& problem, const PairStats<Real>& stats, const Execution& execution) {
  Sweep<Real> sweep(problem, execution);
  if (stats.row_rank) std::fill_n(stats.row_rank, problem.anchors.rows, 0);
  sweep.statistics(stats.col_max != nullptr, stats.row_rank);
  sweep.store_stats(stats);
}

template <class Real>
void pair_grad_given(const PairProblem<Real>& problem, const GivenWeights<Real>& weights, const PairGrads<Real>& grads,
                     const PairStats<Real>& stats, const Execution& execution) {
  Sweep<Real> sweep(problem, execution);
  sweep.gradient(weights, grads, stats.row_max != nullptr, stats.col_max != nullptr);
  sweep.store_stats(stats);
  sweep.store_sums(grads);
}

template <class Real>
void pair_grad_softmax(const PairProblem<Real>& problem, const PairGrads<Real>& grads, const PairStats<Real>& stats,
                       const Execution& execution) {
  Sweep<Real> sweep(problem, execution);
  sweep.softmax_gradient(stats.col_max != nullptr, grads);
  sweep.store_stats(stats);
  sweep.store_sums(grads);
}

#define CONTRASTILE_INSTANTIATE(Real)                                                                              \
  template void pair_stats(const PairProblem<Real>&, const PairStats<Real>&, const Execution&);                    \
  template void pair_grad_given(const PairProblem<Real>&, const GivenWeights<Real>&, const PairGrads<Real>&,       \
                                const PairStats<Real>&, const Execution&);                                         \
  template void pair_grad_softmax(const PairProblem<Real>&, const PairGrads<Real>&, const PairStats<Real>&,        \
                                  const Execution&);

CONTRASTILE_INSTANTIATE(float)
CONTRASTILE_INSTANTIATE(double)

}  // namespace contrastile::cpu
