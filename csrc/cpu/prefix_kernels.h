// Elementwise work of the sweep over prefixes on one tile, beside that of
// vector_kernels.h, whose tiles these are. All loss terms are softmaxes here,
// and a logit has a factor for its column too: the inverse norm of a candidate.
#pragma once

#include <cstdint>

#include "embeddings.h"
#include "vector_kernels.h"

namespace contrastile::cpu {

// Coefficients exp(s - shift) * gain of one direction. Null: it is absent.
template <class Real>
struct SoftmaxTerm {
  const Real* shift;
  const Real* gain;
};

template <class Real>
struct PrefixKernels {
  // logits = row_factor * products * col_factor, and the largest of each row
  // and (unless null) of each column. logits may be where the products are.
  void (*scale_onto)(Tile<Real> products, const Real* row_factor, const Real* col_factor, Real* logits, Real* row_max,
                     Real* col_max);

  // values = row_factor * C(values) * col_factor + longer, with what longer
  // prefixes put there or null; row_moment[i] = sum_j C_ij s_ij, and
  // col_moment[j] = sum_i of the same. row_max: the largest value of each row.
  void (*weigh)(Tile<Real>, const Real* row_factor, const Real* col_factor, const Real* row_max, SoftmaxTerm<Real> row,
                SoftmaxTerm<Real> col, const Real* longer, Real* row_moment, Real* col_moment);

  // |row|^2, which is finite for every finite row of floats.
  double (*square)(const void* row, ElementType, std::int64_t depth);

  // target += factor * row, of `depth` elements.
  void (*add_scaled)(const void* row, ElementType, std::int64_t depth, Real factor, Real* target);
};

template <class Real>
const PrefixKernels<Real>& prefix_kernels();

}  // namespace contrastile::cpu
