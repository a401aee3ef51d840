// One step of InfoNCE in both directions over N pairs of bfloat16, loss and gradients, by the kernels of csrc/cuda.
#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "cuda/kernels.h"
#include "examples/embeddings.h"
#include "examples/managed_array.h"

using namespace contrastile::cuda;
using Floats = example::ManagedArray<float>;

// Sums of exponentials of each of `lines` tiles, or in one line their totals.
struct SumLines {
  Floats max, sum;
  SumLines(int lines, int length) : max(lines * length, -HUGE_VALF), sum(lines * length) {}
  Sums sums() { return {max.data(), sum.data(), nullptr, nullptr}; }
};

int main() {
  constexpr int n = 300, depth = 48;  // a multiple of 8: rows start on 16 bytes
  example::ManagedArray<std::uint16_t> x(n * depth), y(n * depth);
  example::ManagedArray<std::int64_t> positives(n);
  Floats scale(n, 14), positive(n);
  for (int i = 0; i < n * depth; ++i) {
    x[i] = example::to_bfloat16(example::anchor(i / depth, i % depth, depth));
    y[i] = example::to_bfloat16(example::candidate(i / depth, i % depth, depth));
  }
  for (int i = 0; i < n; ++i) positives[i] = i;
  const Pairs pairs{.anchors = x.data(), .candidates = y.data(), .type = ElementType::bfloat16,
                    .float32_products = Float32Products::exact, .anchor_stride = depth, .candidate_stride = depth,
                    .rows = n, .cols = n, .depth = depth, .scale = scale.data(), .positives = positives.data(),
                    .row_groups = nullptr, .col_groups = nullptr, .masks_self = false, .self_offset = 0};
  const Window all{0, 0, n, n};  // O(N) memory for the tiles' sums of each side: larger problems take several windows
  const Stream stream = nullptr;

  // Forward: log-sum-exps of the negatives, as maximum and sum, tile by tile and then together.
  const Tiles tile = tiles_of_sums();
  const int across = (n + tile.cols - 1) / tile.cols, down = (n + tile.rows - 1) / tile.rows;
  SumLines row_tiles(across, n), col_tiles(down, n), rows(1, n), cols(1, n);
  launch_positives(pairs, positive.data(), stream);
  launch_statistics(pairs, all, row_tiles.sums(), col_tiles.sums(), nullptr, nullptr, stream);
  launch_merge(row_tiles.sums(), rows.sums(), across, n, stream);
  launch_merge(col_tiles.sums(), cols.sums(), down, n, stream);
  if (!example::wait_for_device()) throw std::runtime_error("the statistics sweep failed");

  // Softmax weights, O(N): exp(s - maximum) / sum, and minus the negatives' share at the positive.
  Floats row_gain(n), col_gain(n), positive_coeff(n);
  double loss = 0;
  const auto direction = [&](SumLines& of, Floats& gain, int i) {
    const double negatives = of.sum[i], own = std::exp(double{positive[i]} - of.max[i]);
    loss += std::log1p(negatives / own) / (2 * n);
    gain[i] = static_cast<float>(1 / (2 * n * (negatives + own)));
    positive_coeff[i] -= static_cast<float>(negatives / (2 * n * (negatives + own)));
  };
  for (int i = 0; i < n; ++i) direction(rows, row_gain, i), direction(cols, col_gain, i);

  // Backward.
  Floats dx(n * depth), dy(n * depth);
  const Weights weights{rows.max.data(), row_gain.data(), cols.max.data(), col_gain.data(),
                        positive_coeff.data(), WeightFunction::exponential};
  launch_gradient(pairs, all, weights, {dx.data(), dy.data(), nullptr}, {}, {}, stream);
  if (!example::wait_for_device()) throw std::runtime_error("the gradient sweep failed");
  example::print(loss, dx, dy);
}
