// The pass over rows: every row by itself, by all threads.
#pragma once

#include <cstdint>
#include <vector>

#include "embeddings.h"
#include "row_kernels.h"

namespace contrastile::cpu {

struct RowInput {
  EmbeddingView rows;  // (N, D), one shape and type for all inputs
  void* gradient;      // (N, D), contiguous, the inputs' type, overwritten; null: not wanted
};

// Inputs a, v, t; values (N,) overwritten; time, gain (N,).
template <class Real>
void bridge_rows(const std::vector<RowInput>&, const Real* time, const Real* gain, Real* values, int threads);

// Inputs x1, y1, x2, y2.
template <class Real>
void dot_product_rows(const std::vector<RowInput>&, DotProducts, const Real* gain, Real* values, int threads);

}  // namespace contrastile::cpu
