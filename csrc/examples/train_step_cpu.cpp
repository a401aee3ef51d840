// One step of InfoNCE in both directions over N pairs, loss and gradients, by the sweeps of csrc/cpu.
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "cpu/sweeps.h"
#include "examples/embeddings.h"

using namespace contrastile::cpu;
using Floats = std::vector<float>;

int main() {
  constexpr int n = 300, depth = 48;
  Floats x(n * depth), y(n * depth), scale(n, 14);
  for (int i = 0; i < n * depth; ++i) {
    x[i] = example::anchor(i / depth, i % depth, depth);
    y[i] = example::candidate(i / depth, i % depth, depth);
  }
  std::vector<std::int64_t> positives(n);
  std::iota(positives.begin(), positives.end(), 0);
  const PairProblem<float> problem{.anchors = {x.data(), n, depth, depth, ElementType::float32},
                                   .candidates = {y.data(), n, depth, depth, ElementType::float32},
                                   .scale = scale.data(),
                                   .positives = positives.data(),
                                   .row_groups = nullptr,
                                   .col_groups = nullptr,
                                   .row_ceiling = nullptr,
                                   .self_offset = std::nullopt,
                                   .self_similarity = false};
  const Execution execution{.threads = 2, .workspace_bytes = 64 << 20};

  // Forward: log-sum-exps of the negatives, as maximum and sum.
  Floats row_max(n), row_sum(n), col_max(n), col_sum(n), positive(n);
  const PairStats<float> stats{row_max.data(), row_sum.data(), col_max.data(), col_sum.data(),
                               positive.data(), nullptr};
  pair_stats(problem, stats, execution);
  double loss = 0;
  for (int i = 0; i < n; ++i) {
    loss += std::log1p(std::exp(row_max[i] - positive[i]) * double{row_sum[i]});
    loss += std::log1p(std::exp(col_max[i] - positive[i]) * double{col_sum[i]});
  }

  // Backward: each of the 2 N terms counts 1 / (2 N).
  Floats dx(n * depth), dy(n * depth);
  pair_grad_softmax(problem, 1.0 / (2 * n), PairGrads<float>{dx.data(), dy.data(), nullptr, nullptr, nullptr, nullptr}, stats,
                    execution);
  example::print(loss / (2 * n), dx, dy);
}
