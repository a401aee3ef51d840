#include "prefix_sweep.h"

#include <algorithm>
#include <memory>

#include "masks.h"
#include "operands.h"
#include "plan.h"
#include "prefix_kernels.h"
#include "prefix_state.h"
#include "running_sum.h"
#include "team.h"
#include "tile_grid.h"
#include "vector_kernels.h"
#include "workspace.h"

namespace contrastile::cpu {

namespace {

constexpr std::int64_t rows_per_unit = 64;

template <class Real>
class PrefixSweep {
 public:
  PrefixSweep(const PrefixProblem<Real>& problem, const PrefixResults<Real>& results, const Execution& execution)
      : problem_(problem),
        results_(results),
        rows_(problem.anchors.rows),
        cols_(problem.candidates.rows),
        depth_(problem.anchors.depth),
        last_(problem.ends.size() - 1),
        padded_depth_(Operands<Real>::padded_depth(problem.ends)),
        plan_(make_plan({rows_, cols_, padded_depth_, false, !problem.columns, execution.threads,
                         execution.workspace_bytes / std::int64_t(sizeof(Real)), std::int64_t(last_ + 1)})),
        grid_(plan_, false),
        windows_(windows_of(plan_, rows_, cols_, false)),
        team_(int(std::min<std::int64_t>(execution.threads,
                                         std::max(plan_.tiles_per_chunk(), plan_.grad_units(padded_depth_))))),
        workspace_(workspace_elements(plan_, padded_depth_, team_.threads())),
        operands_(problem.anchors, problem.candidates, problem.ends, plan_, workspace_, team_.threads()),
        positive_product_(rows_) {
    scores_ = workspace_.take(score_elements(plan_));
    partials_ = plan_.strip_rows * plan_.tiles_per_chunk();
    for (Real** partial : {&partial_max_, &partial_sum_, &partial_moment_})
      *partial = workspace_.take(std::int64_t(last_ + 1) * partials_);
    for (int thread = 0; thread < team_.threads(); ++thread) {
      Scratch scratch;
      for (Real** vector : {&scratch.col_max, &scratch.col_sum, &scratch.col_moment})
        *vector = workspace_.take(plan_.col_block);
      for (Real** vectors : {&scratch.col_shift, &scratch.col_gain})
        *vectors = workspace_.take(std::int64_t(last_ + 1) * plan_.col_block);
      scratch_.push_back(scratch);
    }
    for (const double gain : problem.gains)
      prefixes_.push_back(std::make_unique<Prefix<Real>>(rows_, cols_, problem.columns, problem.positives, gain));
    measure();
  }

  void run() {
    const bool gradient = results_.dx || results_.dy || results_.row_moment;
    const bool in_one_sweep = gradient && !problem_.columns && plan_.chunk_cols == cols_;
    backwards_ = !in_one_sweep;
    for (const Window& window : windows_) {
      open(window);
      score_window(true);
      merge_row_statistics();
      if (!in_one_sweep) continue;
      normalise_rows(window.row_begin, window.row_end);  // a row's normaliser is known within its strip
      weigh_window();
    }
    if (gradient && !in_one_sweep) {
      normalise_rows(0, rows_);
      if (problem_.columns)
        for (const auto& prefix : prefixes_)
          prefix->softmax.normalise_columns(prefix->col_max, prefix->col_sum, prefix->positive_logit);
      // Backwards, because the last window's logits are still in the workspace.
      weigh_window();
      for (std::size_t w = windows_.size() - 1; w-- > 0;) {
        open(windows_[w]);
        score_window(false);
        weigh_window();
      }
    }
    if (problem_.normalize) {
      take_radial_part(problem_.anchors, results_.dx, &Prefix<Real>::row_inverse, &Prefix<Real>::row_moment);
      take_radial_part(problem_.candidates, results_.dy, &Prefix<Real>::col_inverse, &Prefix<Real>::col_moment);
    }
    store();
  }

 private:
  struct Scratch {  // of one thread
    Real *col_max, *col_sum, *col_moment;
    Real *col_shift, *col_gain;  // of every prefix
  };

  std::int64_t begin_of(std::size_t k) const { return k == 0 ? 0 : problem_.ends[k - 1]; }

  // ---- norms
  // --------------------------------------------------------------------------------------

  void measure() {
    if (problem_.normalize) {
      find_inverse_norms(problem_.anchors, &Prefix<Real>::row_inverse);
      find_inverse_norms(problem_.candidates, &Prefix<Real>::col_inverse);
    }
    for (const auto& prefix : prefixes_)
      for (std::int64_t i = 0; i < rows_; ++i) prefix->row_factor[i] = problem_.scale[i] * prefix->row_inverse[i];
  }

  void find_inverse_norms(const EmbeddingView& view, std::vector<Real> Prefix<Real>::* inverse) {
    for_each_row(view.rows, [&](std::int64_t row) {
      double square = 0;
      for (std::size_t k = 0; k <= last_; ++k) {
        square += prefix_kernels_.square(view.at(row, begin_of(k)), view.type, problem_.ends[k] - begin_of(k));
        ((*prefixes_[k]).*inverse)[row] = inverse_norm<Real>(square);
      }
    });
  }

  void take_radial_part(const EmbeddingView& view, Real* gradient, std::vector<Real> Prefix<Real>::* inverse,
                        std::vector<double> Prefix<Real>::* moment) {
    if (!gradient) return;
    for_each_row(view.rows, [&](std::int64_t row) {
      double factor = 0;
      for (std::size_t k = last_ + 1; k-- > 0;) {
        const double a = ((*prefixes_[k]).*inverse)[row];
        if (a < largest_inverse<Real>) factor += ((*prefixes_[k]).*moment)[row] * a * a;
        prefix_kernels_.add_scaled(view.at(row, begin_of(k)), view.type, problem_.ends[k] - begin_of(k), Real(-factor),
                                   gradient + row * depth_ + begin_of(k));
      }
    });
  }

  template <class Work>
  void for_each_row(std::int64_t rows, const Work& work) {
    team_.for_each(ceil_div(rows, rows_per_unit), [&](std::int64_t unit, int) {
      const std::int64_t end = std::min((unit + 1) * rows_per_unit, rows);
      for (std::int64_t row = unit * rows_per_unit; row < end; ++row) work(row);
    });
  }

  // ---- phases
  // --------------------------------------------------------------------------------------

  void open(const Window& window) {
    grid_.open(window, scores_);
    operands_.open(window, results_.dy != nullptr, team_);
  }

  void score_window(bool statistics) {
    team_.for_each(grid_.tile_count(), [&](std::int64_t tile, int thread) {
      operands_.products(
          grid_.tile_begin(tile), grid_.tile_cols(tile), grid_.block_count(), thread,
          [&](std::int64_t block) { return logits_of(last_, tile, block); },
          [&](std::int64_t block, std::size_t k) { finish_logits(k, tile, block, thread, statistics); });
    });
  }

  void normalise_rows(std::int64_t begin, std::int64_t end) {
    for (const auto& prefix : prefixes_)
      prefix->softmax.normalise_rows(begin, end, prefix->row_max, prefix->row_sum, prefix->positive_logit);
  }

  void weigh_window() {
    team_.for_each(grid_.tile_count(), [&](std::int64_t tile, int thread) {
      load_col_weights(tile, thread);
      for (std::int64_t block = 0; block < grid_.block_count(); ++block)
        for (std::size_t k = last_ + 1; k-- > 0;) weigh(k, tile, block, thread);
    });
    add_row_moments();
    if (results_.dx)
      team_.for_each(plan_.grad_units(padded_depth_),
                     [&](std::int64_t unit, int thread) { add_anchor_gradient(unit, thread); });
  }

  // Whoever comes first to a part of dX or dY writes it, the others add.
  Accumulate onto_anchors(std::int64_t tile) const {
    const Window& window = grid_.window();
    const bool first = tile == 0 && (backwards_ ? window.col_end == cols_ : window.col_begin == 0);
    return first ? Accumulate::no : Accumulate::yes;
  }

  Accumulate onto_candidates(std::int64_t block) const {
    const Window& window = grid_.window();
    const bool first = block == 0 && (backwards_ ? window.row_end == rows_ : window.row_begin == 0);
    return first ? Accumulate::no : Accumulate::yes;
  }

  // ---- one tile
  // ------------------------------------------------------------------------------------

  // Prefix k's logits, rows counted from the window's first.
  Tile<Real> logits_of(std::size_t k, std::int64_t tile, std::int64_t first_row, std::int64_t rows) const {
    Tile<Real> logits = grid_.tile_at(tile, first_row, rows);
    logits.values += std::int64_t(k) * plane_elements(plan_);
    return logits;
  }

  Tile<Real> logits_of(std::size_t k, std::int64_t tile, std::int64_t block) const {
    return logits_of(k, tile, block * plan_.row_block, grid_.block_rows(block));
  }

  std::int64_t partial_index(std::size_t k, std::int64_t tile, std::int64_t block) const {
    return std::int64_t(k) * partials_ + grid_.partial_index(tile, block);
  }

  // Products grow in the place of the longest prefix's logits; the others' are
  // copied from there as soon as their features are in.
  void finish_logits(std::size_t k, std::int64_t tile, std::int64_t block, int thread, bool statistics) {
    const Tile<Real> products = logits_of(last_, tile, block), logits = logits_of(k, tile, block);
    const std::int64_t row = grid_.block_begin(block), col = grid_.tile_begin(tile), cols = grid_.tile_cols(tile);
    Prefix<Real>& prefix = *prefixes_[k];
    for (std::int64_t i = 0; k == 0 && i < products.rows; ++i)
      std::fill(products.values + i * products.width + cols, products.values + (i + 1) * products.width,
                minus_infinity<Real>);
    const std::int64_t* positives = problem_.positives + row;
    for_each_positive(positives, products.rows, col, cols, [&](std::int64_t i, std::int64_t j) {
      Real& product = products.values[i * products.width + j];
      prefix.positive_logit[row + i] = product * prefix.row_factor[row + i] * prefix.col_inverse[col + j];
      positive_product_[row + i] = product;
      product = minus_infinity<Real>;
    });

    const Scratch& scratch = scratch_[thread];
    const std::int64_t partial = partial_index(k, tile, block);
    const bool columns = statistics && problem_.columns;
    prefix_kernels_.scale_onto(products, prefix.row_factor.data() + row, prefix.col_inverse.data() + col, logits.values,
                               partial_max_ + partial, columns ? scratch.col_max : nullptr);
    if (statistics)
      kernels_.exp_sums(logits, partial_max_ + partial, partial_sum_ + partial, scratch.col_max,
                        columns ? scratch.col_sum : nullptr);
    if (columns)
      for (std::int64_t j = 0; j < cols; ++j)
        merge_running_sum(prefix.col_max[col + j], prefix.col_sum[col + j], scratch.col_max[j], scratch.col_sum[j]);
    if (k == last_) return;
    for_each_positive(positives, products.rows, col, cols, [&](std::int64_t i, std::int64_t j) {
      products.values[i * products.width + j] = positive_product_[row + i];
    });
  }

  void load_col_weights(std::int64_t tile, int thread) {
    if (!problem_.columns) return;
    const std::int64_t col = grid_.tile_begin(tile), cols = grid_.tile_cols(tile);
    for (std::size_t k = 0; k <= last_; ++k) {
      const GivenWeights<Real> weights = prefixes_[k]->softmax.weights();
      Real* shift = scratch_[thread].col_shift + std::int64_t(k) * plan_.col_block;
      Real* gain = scratch_[thread].col_gain + std::int64_t(k) * plan_.col_block;
      std::copy_n(weights.col_shift + col, cols, shift);
      std::copy_n(weights.col_gain + col, cols, gain);
      std::fill(shift + cols, shift + plan_.col_block, -minus_infinity<Real>);
      std::fill(gain + cols, gain + plan_.col_block, Real(0));
    }
  }

  // F_k of a tile in the place of its logits, and what it adds to dY; after
  // that of the next longer prefix.
  void weigh(std::size_t k, std::int64_t tile, std::int64_t block, int thread) {
    const Tile<Real> logits = logits_of(k, tile, block);
    const std::int64_t row = grid_.block_begin(block), col = grid_.tile_begin(tile), cols = grid_.tile_cols(tile);
    Prefix<Real>& prefix = *prefixes_[k];
    const Real* row_factor = prefix.row_factor.data() + row;
    const Real* col_factor = prefix.col_inverse.data() + col;
    const GivenWeights<Real> weights = prefix.softmax.weights();
    const Scratch& scratch = scratch_[thread];
    const std::int64_t partial = partial_index(k, tile, block), offset = std::int64_t(k) * plan_.col_block;
    SoftmaxTerm<Real> by_col{};
    if (problem_.columns) by_col = {scratch.col_shift + offset, scratch.col_gain + offset};
    prefix_kernels_.weigh(logits, row_factor, col_factor, partial_max_ + partial,
                          {weights.row_shift + row, weights.row_gain + row}, by_col,
                          k == last_ ? nullptr : logits_of(k + 1, tile, block).values, partial_moment_ + partial,
                          scratch.col_moment);
    for_each_positive(problem_.positives + row, logits.rows, col, cols, [&](std::int64_t i, std::int64_t j) {
      const Real coefficient = weights.positive_coeff[row + i];
      const Real moment = coefficient * prefix.positive_logit[row + i];
      logits.values[i * logits.width + j] += coefficient * row_factor[i] * col_factor[j];
      partial_moment_[partial + i] += moment;
      scratch.col_moment[j] += moment;
    });
    for (std::int64_t j = 0; j < cols; ++j) prefix.col_moment[col + j] += scratch.col_moment[j];
    if (results_.dy)
      operands_.add_candidate_gradient(logits, cols, block, k, results_.dy + col * depth_, onto_candidates(block));
  }

  // dX += F_k Y for one unit of rows and features, segment after segment.
  void add_anchor_gradient(std::int64_t unit, int thread) {
    const std::int64_t feature_parts = ceil_div(padded_depth_, plan_.grad_features);
    const std::int64_t first = unit / feature_parts * plan_.grad_rows;
    const std::int64_t rows = std::min(first + plan_.grad_rows, grid_.window().rows()) - first;
    const std::int64_t feature = unit % feature_parts * plan_.grad_features;
    if (rows <= 0) return;  // of a shorter last window
    Real* target = results_.dx + (grid_.window().row_begin + first) * depth_;
    for (std::size_t k = 0; k <= last_; ++k) {
      const std::int64_t begin = std::max(feature, begin_of(k));
      const std::int64_t end = std::min(feature + plan_.grad_features, problem_.ends[k]);
      for (std::int64_t tile = 0; begin < end && tile < grid_.tile_count(); ++tile)
        operands_.add_anchor_gradient(logits_of(k, tile, first, rows), grid_.tile_begin(tile), grid_.tile_cols(tile),
                                      begin, end, thread, target, onto_anchors(tile));
    }
  }

  // ---- sums over a window's tile columns, in their order
  // -------------------------------------------

  // work(prefix, row, partial) for the rows of every block, tile after tile.
  template <class Work>
  void for_each_partial(const Work& work) {
    const std::int64_t blocks = grid_.block_count();
    team_.for_each(blocks * std::int64_t(last_ + 1), [&](std::int64_t unit, int) {
      const std::int64_t k = unit / blocks, block = unit % blocks;
      for (std::int64_t tile = 0; tile < grid_.tile_count(); ++tile)
        for (std::int64_t i = 0; i < grid_.block_rows(block); ++i)
          work(*prefixes_[k], grid_.block_begin(block) + i, partial_index(k, tile, block) + i);
    });
  }

  void merge_row_statistics() {
    for_each_partial([&](Prefix<Real>& prefix, std::int64_t row, std::int64_t partial) {
      merge_running_sum(prefix.row_max[row], prefix.row_sum[row], partial_max_[partial], partial_sum_[partial]);
    });
  }

  void add_row_moments() {
    for_each_partial([&](Prefix<Real>& prefix, std::int64_t row, std::int64_t partial) {
      prefix.row_moment[row] += partial_moment_[partial];
    });
  }

  void store() const {
    for (std::size_t k = 0; k <= last_; ++k) {
      const Prefix<Real>& prefix = *prefixes_[k];
      const auto copy = [&](const std::vector<Real>& from, Real* to) {
        if (to) std::copy(from.begin(), from.end(), to + k * from.size());
      };
      copy(prefix.row_max, results_.row_max);
      copy(prefix.row_sum, results_.row_sum);
      copy(prefix.col_max, results_.col_max);
      copy(prefix.col_sum, results_.col_sum);
      copy(prefix.positive_logit, results_.positive_logit);
    }
    for (std::int64_t i = 0; results_.row_moment && i < rows_; ++i) {
      double moment = 0;
      for (const auto& prefix : prefixes_) moment += prefix->row_moment[i];
      results_.row_moment[i] = Real(moment);
    }
  }

  const PrefixProblem<Real>& problem_;
  const PrefixResults<Real>& results_;
  const std::int64_t rows_, cols_, depth_;
  const std::size_t last_;  // the longest prefix
  const std::int64_t padded_depth_;
  bool backwards_ = false;
  const Plan plan_;
  TileGrid<Real> grid_;
  const std::vector<Window> windows_;
  const VectorKernels<Real>& kernels_ = vector_kernels<Real>();
  const PrefixKernels<Real>& prefix_kernels_ = prefix_kernels<Real>();
  Team team_;
  Workspace<Real> workspace_;
  Operands<Real> operands_;

  Real *scores_, *partial_max_, *partial_sum_, *partial_moment_;
  std::int64_t partials_;  // of one prefix
  std::vector<Scratch> scratch_;
  std::vector<std::unique_ptr<Prefix<Real>>> prefixes_;
  std::vector<Real> positive_product_;  // of the rows, while it is masked
};

}  // namespace

template <class Real>
void prefix_softmax(const PrefixProblem<Real>& problem, const PrefixResults<Real>& results,
                    const Execution& execution) {
  PrefixSweep<Real>(problem, results, execution).run();
}

template void prefix_softmax(const PrefixProblem<float>&, const PrefixResults<float>&, const Execution&);
template void prefix_softmax(const PrefixProblem<double>&, const PrefixResults<double>&, const Execution&);

}  // namespace contrastile::cpu
