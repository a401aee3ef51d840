// Fused gradient sweep: dX and dY of a window of pairs, whose logits and coefficients never leave the chip. 16 bits.
//
//   reads   the owned side once, the other once per owned block, mostly from the L2 cache
//   writes  the owned side's gradient once; the other's, 4 D bytes for every column and owned block, by atomic addition
//   work    the product of the logits and one for each gradient that a launch computes
//   takes   registers and shared memory of each chip: docs/cuda.md
//   bound   matrix pipe, as long as a block's gradient fits into registers: D <= 128
//
// A block owns rows of one side, holds their gradient in registers and walks the other side, whose rows come one tile
// ahead. Coefficients pass through shared memory, from where they are an operand of both gradients. The other side's
// gradient ends in other blocks' hands: atomic additions, in an order that differs from run to run. Where results are
// to repeat bit for bit, a second launch owns candidates instead, at the cost of one product more.
#include "checks.h"
#include "coefficients.h"
#include "instances.h"
#include "kernels.h"
#include "launch.h"
#include "product.h"

namespace contrastile::cuda {
namespace {

constexpr int panel_features = 64;  // of 16 bits

template <class Tile_, int Depth_, bool OwnsCandidates, bool Both>
struct Walk {
  using Tile = Tile_;
  static constexpr int depth = Depth_;  // at most so many features
  static constexpr bool owns_candidates = OwnsCandidates;
  static constexpr bool both = Both;  // gradients; of the owned side alone otherwise
  static constexpr int panels = depth / panel_features;
  static constexpr int side = Tile::block_rows;  // pairs of a tile, either way
  static constexpr int side_bytes = panels * side * panel_bytes;
  static constexpr int coefficients_at = 3 * side_bytes;  // the owned side, and the walked one twice
  static constexpr int exchange_at = coefficients_at + side * panel_bytes;
  static constexpr int shared_bytes = exchange_at + int{sizeof(Exchange<Tile>)};
  static_assert(Tile::block_cols == side && side == panel_features, "coefficients fill a panel");
  static_assert(!(owns_candidates && both));
};

// Part of a gradient that a thread holds: rows 8 apart, pairs of features.
template <class Tile, int Features>
struct Gradient {
  static constexpr int warp_rows = Tile::block_rows / Tile::warps_down;
  float at[warp_rows / 8][Features / 4];
};

// total += C E, or C^T E, for 16-bit C in a panel and E in panels of 64 features.
template <bool Transposed, class Tile, int Features>
__device__ void add_gradient(Gradient<Tile, Features>& total, const Place<Tile>& place, const char* coefficients,
                             const char* embeddings, int first_feature) {
  using Product = typename Tile::Product;
  constexpr int warp_rows = Gradient<Tile, Features>::warp_rows;
#pragma unroll
  for (int step = 0; step < Tile::block_cols / 16; ++step) {
    std::uint32_t rows[warp_rows / 16][4];
#pragma unroll
    for (int m = 0; m < warp_rows / 16; ++m) {
      const int row = place.down * warp_rows + m * 16;
      if constexpr (Transposed)
        load_left_transposed(rows[m], coefficients, step, row / 8);
      else
        load_left(rows[m], coefficients, row, step);
    }
#pragma unroll
    for (int n = 0; n < Features / 16; ++n) {
      const int feature = first_feature + n * 16;
      const char* panel = embeddings + feature / panel_features * Tile::block_rows * panel_bytes;
      std::uint32_t cols[4];
      load_right_transposed(cols, panel, step, feature % panel_features / 8);
#pragma unroll
      for (int m = 0; m < warp_rows / 16; ++m) {
        Product::add(total.at, m, n * 2, rows[m], cols);
        Product::add(total.at, m, n * 2 + 1, rows[m], cols + 2);
      }
    }
  }
}

template <class Tile, int Features, class Function>
__device__ void for_each_pair_of_features(const Gradient<Tile, Features>& gradient, const Place<Tile>& place,
                                          int first_feature, int depth, Function function) {
  const int lane = device::lane_id();
#pragma unroll
  for (int r = 0; r < Gradient<Tile, Features>::warp_rows / 8; ++r)
#pragma unroll
    for (int f = 0; f < Features / 8; ++f) {
      const int feature = first_feature + f * 8 + lane % 4 * 2;
      if (feature < depth)
        function(place.down * Gradient<Tile, Features>::warp_rows + r * 8 + lane / 4, feature, gradient.at[r][2 * f],
                 gradient.at[r][2 * f + 1]);
    }
}

template <class Walk, Family family>
__global__ void __launch_bounds__(Walk::Tile::threads, 1)
    gradient_kernel(const __grid_constant__ CoefficientArguments arguments,
                    const __grid_constant__ Gradients gradients) {
  using Tile = typename Walk::Tile;
  using Element = typename Tile::Element;
  const Pairs& pairs = arguments.pairs;
  const Window& window = arguments.window;
  const Place<Tile> place;
  char* shared = device::dynamic_shared<char>();
  char* coefficients = shared + Walk::coefficients_at;
  auto* exchange = reinterpret_cast<Exchange<Tile>*>(shared + Walk::exchange_at);

  const Embeddings anchors = anchors_of<Element>(pairs), candidates = candidates_of<Element>(pairs);
  const auto& owned_side = Walk::owns_candidates ? candidates : anchors;
  const auto& walked_side = Walk::owns_candidates ? anchors : candidates;
  const int block = block_id();
  const int first_owned = (Walk::owns_candidates ? window.first_col : window.first_row) + block * Walk::side;
  const int first_walked = Walk::owns_candidates ? window.first_row : window.first_col;
  const int steps = ceil_div(Walk::owns_candidates ? window.rows : window.cols, Walk::side);

  const auto copy = [&](char* to, const Embeddings& side, int first) {
    for (int panel = 0; panel < Walk::panels; ++panel)
      copy_panel<Walk::side, Tile::threads>(to + panel * Walk::side * panel_bytes, side, panel * panel_bytes,
                                            [&](int row) { return first + row; });
  };
  const auto walked_at = [&](int step) { return shared + Walk::side_bytes * (1 + step % 2); };
  const auto copy_walked = [&](int step) {
    if (step < steps) copy(walked_at(step), walked_side, first_walked + step * Walk::side);
    device::commit_group();
  };

  constexpr int warp_features = Walk::depth / Tile::warps_across;
  const int first_feature = place.across * warp_features, depth = pairs.depth;
  Gradient<Tile, warp_features> owned{};
  copy(shared, owned_side, first_owned);
  copy_walked(0);
  for (int step = 0; step < steps; ++step) {
    copy_walked(step + 1);
    device::wait_group<1>();
    device::block_barrier();
    const char* walked = walked_at(step);
    const char* x = Walk::owns_candidates ? walked : shared;
    const char* y = Walk::owns_candidates ? shared : walked;
    const Origin origin =
        Walk::owns_candidates ? origin_of<Tile>(window, step, block) : origin_of<Tile>(window, block, step);
    const auto logits = [&] {
      Values<Tile> values{};
      for (int panel = 0; panel < Walk::panels; ++panel)
        add_panels(values, place, x + panel * Walk::side * panel_bytes, y + panel * Walk::side * panel_bytes);
      multiply_by_scale(values, pairs, origin, place);
      return values;
    };
    store_panel(coefficients, Coefficients<Tile, family>{arguments, origin, place, exchange}.of(logits), place);
    device::block_barrier();

    add_gradient<Walk::owns_candidates>(owned, place, coefficients, walked, first_feature);
    if constexpr (Walk::both) {
      constexpr int features = warp_features < 32 ? warp_features : 32;  // at a time, for want of registers
      for (int feature = first_feature; feature < first_feature + warp_features; feature += features) {
        Gradient<Tile, features> other{};
        add_gradient<true>(other, place, coefficients, shared, feature);
        for_each_pair_of_features(other, place, feature, depth, [&](int col, int f, float first, float second) {
          if (origin.col + col >= pairs.cols) return;
          float* at = gradients.candidates + std::int64_t{origin.col + col} * depth + f;
          device::atomic_add(at, first);
          device::atomic_add(at + 1, second);
        });
      }
    }
    device::block_barrier();  // all are done with the coefficients, and with the tile that the next copy replaces
  }
  float* gradient = Walk::owns_candidates ? gradients.candidates : gradients.anchors;
  for_each_pair_of_features(owned, place, first_feature, depth, [&](int row, int f, float first, float second) {
    if (first_owned + row >= owned_side.rows) return;
    float* at = gradient + std::int64_t{first_owned + row} * depth + f;
    at[0] += first;
    at[1] += second;
  });
}

template <class Product, int Depth>
using FusedTile = Tile<Product, 64, 64, Depth <= 64 ? 2 : 4, 2, 2>;

template <class Function>
void with_fused_product(const Pairs& pairs, Function function) {
  switch (pairs.type) {
    case ElementType::bfloat16: return function(Multiply16Bit<device::bf16>{});
    case ElementType::float16: return function(Multiply16Bit<device::f16>{});
    case ElementType::float32: refuse("gradient", pairs, "expected elements of 16 bits");
  }
}

}  // namespace

void launch_gradient(const Pairs& pairs, const Window& window, const Weights& weights, const Gradients& gradients,
                     const Sums& row_sums, const Sums& col_sums, Stream stream) {
  check_launch("gradient", pairs, window, tiles_of_gradient());
  if (!gradients.anchors && !gradients.candidates) refuse("gradient", pairs, "expected a gradient to add to");
  if (is_empty(window)) return;
  const bool owns_candidates = !gradients.anchors;
  const CoefficientArguments arguments{pairs, window, weights, gradients.factor, row_sums, col_sums};
  const auto start = [&]<class Walk, Family family>(Walk, FamilyOf<family>) {
    const int blocks = ceil_div(owns_candidates ? window.cols : window.rows, Walk::side);
    launch<gradient_kernel<Walk, family>>("gradient", blocks, Walk::Tile::threads, Walk::shared_bytes, stream,
                                          arguments, gradients);
  };
  const auto of_depth = [&]<class Product, int Depth>(Product, std::integral_constant<int, Depth>, auto family) {
    using Shape = FusedTile<Product, Depth>;
    if (owns_candidates) return start(Walk<Shape, Depth, true, false>{}, family);
    if (!gradients.candidates) return start(Walk<Shape, Depth, false, false>{}, family);
    return start(Walk<Shape, Depth, false, true>{}, family);
  };
  constexpr std::integral_constant<int, 64> few;
  constexpr std::integral_constant<int, most_fused_features> most;
  with_fused_product(pairs, [&](auto product) {
    // Of sigmoids one form serves all depths: another for few features would spare products with zeros alone.
    if (pairs.depth <= most && weights.function == WeightFunction::sigmoid)
      return of_depth(product, most, FamilyOf<Family::sigmoids>{});
    if (pairs.depth <= few) return of_depth(product, few, FamilyOf<Family::exponentials>{});
    if (pairs.depth <= most) return of_depth(product, most, FamilyOf<Family::exponentials>{});
    refuse("gradient", pairs, "expected at most " + std::to_string(most_fused_features) + " features");
  });
}

Tiles tiles_of_gradient() {
  using Any = FusedTile<Multiply16Bit<device::bf16>, most_fused_features>;
  return {Any::block_rows, Any::block_cols};
}

}  // namespace contrastile::cuda
