// The tiles in use, and which of them serves a problem.
#pragma once

#include <algorithm>

#include "arguments.h"
#include "exchange.h"
#include "multiply.h"
#include "product.h"
#include "tile.h"

namespace contrastile::cuda {

// float32 has twice the warps: its products hold more registers.
template <class Product>
using SumsTile = Tile<Product, 128, 64, sizeof(typename Product::Element) == 2 ? 2 : 4, 2, 2>;

template <class Tile>
constexpr int shared_bytes = std::max(Tile::stages * stage_bytes<Tile>, int{sizeof(Exchange<Tile>)});

// Calls `function` with the tile of the sums kernels that fits the embeddings' type.
template <class Function>
void with_sums_tile(const Pairs& pairs, Function function) {
  switch (pairs.type) {
    case ElementType::bfloat16: return function(SumsTile<Multiply16Bit<device::bf16>>{});
    case ElementType::float16: return function(SumsTile<Multiply16Bit<device::f16>>{});
    case ElementType::float32: break;
  }
  switch (pairs.float32_products) {
    case Float32Products::tf32: return function(SumsTile<MultiplyTf32<Float32Products::tf32>>{});
    case Float32Products::tf32x3: return function(SumsTile<MultiplyTf32<Float32Products::tf32x3>>{});
    case Float32Products::exact: return function(SumsTile<MultiplyExactly>{});
  }
}

template <class Tile>
int tiles_of(const Window& window) {
  return ceil_div(window.rows, Tile::block_rows) * ceil_div(window.cols, Tile::block_cols);
}

}  // namespace contrastile::cuda
