#include "sweeps.h"

#include <algorithm>

#include "tile_sweep.h"

namespace contrastile::cpu {

template <class Real>
void positive_logits(const PairProblem<Real>& problem, Real* logits, const Execution& execution) {
  constexpr std::int64_t rows_per_unit = 64;
  const EmbeddingView &x = problem.anchors, &y = problem.candidates;
  const std::int64_t units = ceil_div(x.rows, rows_per_unit);
  Team(int(std::min<std::int64_t>(execution.threads, units))).for_each(units, [&](std::int64_t unit, int) {
    const std::int64_t end = std::min((unit + 1) * rows_per_unit, x.rows);
    for (std::int64_t i = unit * rows_per_unit; i < end; ++i)
      logits[i] = problem.scale[i] *
                  product_kernels<Real>().dot(x.at(i, 0), y.at(problem.positives[i], 0), x.depth, x.type);
  });
}

template <class Real>
void pair_stats(const PairProblem<Real>& problem, const PairStats<Real>& stats, const Execution& execution) {
  TileSweep<Real> sweep(problem, execution, stats.row_rank != nullptr);
  if (stats.row_rank) std::fill_n(stats.row_rank, problem.anchors.rows, 0);
  sweep.statistics(stats.col_max != nullptr, stats.row_rank);
  sweep.store_stats(stats);
}

template <class Real>
void pair_grad_given(const PairProblem<Real>& problem, const GivenWeights<Real>& weights, const PairGrads<Real>& grads,
                     const PairStats<Real>& stats, const Execution& execution) {
  TileSweep<Real> sweep(problem, execution, false);
  sweep.gradient(weights, grads, stats.row_max != nullptr, stats.col_max != nullptr);
  sweep.store_stats(stats);
  sweep.store_sums(grads);
}

template <class Real>
void pair_grad_softmax(const PairProblem<Real>& problem, double gain, const PairGrads<Real>& grads,
                       const PairStats<Real>& stats, const Execution& execution) {
  const bool columns = stats.col_max && !problem.self_similarity;
  TileSweep<Real> sweep(problem, execution, !columns);
  sweep.softmax_gradient(columns, gain, grads);
  sweep.store_stats(stats);
  sweep.store_sums(grads);
}

#define CONTRASTILE_INSTANTIATE(Real)                                                                               \
  template void positive_logits(const PairProblem<Real>&, Real*, const Execution&);                                 \
  template void pair_stats(const PairProblem<Real>&, const PairStats<Real>&, const Execution&);                     \
  template void pair_grad_given(const PairProblem<Real>&, const GivenWeights<Real>&, const PairGrads<Real>&,        \
                                const PairStats<Real>&, const Execution&);                                          \
  template void pair_grad_softmax(const PairProblem<Real>&, double, const PairGrads<Real>&, const PairStats<Real>&, \
                                  const Execution&);

CONTRASTILE_INSTANTIATE(float)
CONTRASTILE_INSTANTIATE(double)

}  // namespace contrastile::cpu
