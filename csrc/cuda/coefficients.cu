// First half of the gradient sweep: coefficients C of a window of pairs, and the sums met on the way.
//
//   reads   X and Y once per tile column and tile row, mostly from the L2 cache in the grouped order of tiles
//   writes  scale_i * C_ij, 2 bytes a pair (4 for float32), into a strip that two matrix products then read;
//           16 bytes at most of sums for a tile's side and direction
//   work    one product, 2 N M D flop; one exponential a pair, of sigmoids a reciprocal and a polynomial more
//   takes   registers and shared memory of each chip: docs/cuda.md
//   bound   matrix pipe for D > 128; multiply-adds for exact products of float32
#include "coefficients.h"

#include "checks.h"
#include "instances.h"
#include "kernels.h"
#include "launch.h"
#include "product.h"

namespace contrastile::cuda {
namespace {

template <class Tile>
__device__ bool has_wanted_row(const bool* rows, const Pairs& pairs, const Origin& origin, Exchange<Tile>* exchange) {
  bool wanted = false;
  for (int row = device::thread_id(); row < Tile::block_rows; row += Tile::threads)
    wanted = wanted || (origin.row + row < pairs.rows && rows[origin.row + row]);
  return !all_of_block(!wanted, exchange);
}

// 16-bit coefficients go through shared memory, so that 16 bytes of a row are written at a time. What is past the last
// column is 0, and the strip has room for it.
template <class Tile>
__device__ void store_16_bit(const Strip& strip, const Values<Tile>& coefficients, const Window& window,
                             const Origin& origin, const Place<Tile>& place, char* panel) {
  using Element = typename Tile::Element;
  constexpr int together = chunk_bytes / sizeof(Element);
  auto* first = static_cast<Element*>(strip.coefficients) + origin.row_in_window * strip.stride + origin.col_in_window;
  store_panel(panel, coefficients, place);
  device::block_barrier();
  for (int i = device::thread_id(); i < Tile::block_rows * panel_chunks; i += Tile::threads) {
    const int row = i / panel_chunks, chunk = i % panel_chunks, col = chunk * together;
    if (origin.row_in_window + row >= window.rows || origin.col_in_window + col >= window.cols) continue;
    const auto* from = reinterpret_cast<const device::Vector16*>(panel + place_in_panel(row, chunk));
    device::store_global(reinterpret_cast<device::Vector16*>(first + row * strip.stride + col),
                         device::load_shared(from));
  }
}

template <class Tile>
__device__ void store_float32(const Strip& strip, const Values<Tile>& coefficients, const Window& window,
                              const Origin& origin, const Place<Tile>& place) {
#pragma unroll
  for (int r = 0; r < Tile::thread_rows; ++r)
#pragma unroll
    for (int c = 0; c < Tile::thread_cols; c += 2) {
      const int row = origin.row_in_window + place.row(r), col = origin.col_in_window + place.col(c);
      auto* to = static_cast<float*>(strip.coefficients) + row * strip.stride + col;
      if (row < window.rows && col < window.cols)
        device::store_global(reinterpret_cast<device::Vector8*>(to),
                             {{bits_of(coefficients.at[r][c]), bits_of(coefficients.at[r][c + 1])}});
    }
}

template <class Tile, Family family>
__global__ void __launch_bounds__(Tile::threads, 1)
    coefficients_kernel(const __grid_constant__ CoefficientArguments arguments, const __grid_constant__ Strip strip) {
  const Place<Tile> place;
  const Origin origin = origin_of_block<Tile>(arguments.window);
  char* shared = device::dynamic_shared<char>();
  auto* exchange = reinterpret_cast<Exchange<Tile>*>(shared);
  if (strip.rows && !has_wanted_row(strip.rows, arguments.pairs, origin, exchange)) return;

  const auto logits = [&] {
    Values<Tile> values = tile_products(arguments.pairs, shared, place, origin.row, origin.col);
    multiply_by_scale(values, arguments.pairs, origin, place);
    return values;
  };
  const auto coefficients = Coefficients<Tile, family>{arguments, origin, place, exchange}.of(logits);
  if (!strip.coefficients) return;
  if constexpr (sizeof(typename Tile::Element) == 2) {
    if (!strip.is_float32) return store_16_bit(strip, coefficients, arguments.window, origin, place, shared);
  }
  store_float32(strip, coefficients, arguments.window, origin, place);
}

}  // namespace

void launch_coefficients(const Pairs& pairs, const Window& window, const Weights& weights, const Strip& strip,
                         const Sums& row_sums, const Sums& col_sums, Stream stream) {
  check_launch("coefficients", pairs, window, tiles_of_sums());
  if (is_empty(window)) return;
  const CoefficientArguments arguments{pairs, window, weights, strip.factor, row_sums, col_sums};
  with_sums_tile(pairs, [&]<class Tile>(Tile) {
    with_family(weights, [&]<Family family>(FamilyOf<family>) {
      launch<coefficients_kernel<Tile, family>>("coefficients", tiles_of<Tile>(window), Tile::threads,
                                                shared_bytes<Tile>, stream, arguments, strip);
    });
  });
}

Tiles tiles_of_sums() {
  using Any = SumsTile<MultiplyExactly>;
  return {Any::block_rows, Any::block_cols};
}

}  // namespace contrastile::cuda
