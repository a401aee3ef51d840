// The losses of one row by itself: its value, and the gradient of gain times
// its value in every input.
//
// Rows are in their own element type; so are gradients, null where not wanted.
// python/contrastile/backends/rows.py has the definitions.
#pragma once

#include <cstdint>

#include "embeddings.h"

namespace contrastile::cpu {

inline constexpr int most_row_inputs = 4;

enum class DotProducts { squares, difference };

// One row of every input, and its place in every gradient.
struct RowOperands {
  const void* inputs[most_row_inputs];
  void* gradients[most_row_inputs];
};

template <class Real>
struct RowKernels {
  // Reals that a thread needs as scratch, for rows of this many features.
  std::int64_t (*scratch)(std::int64_t depth);

  // Inputs a, v, t: |a - m / |m||^2 with m = time v + (1 - time) t.
  Real (*bridge)(const RowOperands&, std::int64_t depth, ElementType, Real time, Real gain, Real* scratch);

  // Inputs x1, y1, x2, y2: <x1, y1>^2 + <x2, y2>^2, or (<x1, y1> - <x2, y2>)^2.
  Real (*dot_products)(const RowOperands&, std::int64_t depth, ElementType, DotProducts, Real gain, Real* scratch);
};

template <class Real>
const RowKernels<Real>& row_kernels();

}  // namespace contrastile::cpu
