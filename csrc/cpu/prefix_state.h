// What the sweep over prefixes keeps for each of them: vectors of N and M.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "embeddings.h"
#include "running_sum.h"
#include "softmax_weights.h"
#include "vector_kernels.h"

namespace contrastile::cpu {

// 1 / max(norm, 1e-12), the bound of F.normalize. A row at the bound has no
// gradient through its norm.
template <class Real>
inline constexpr Real largest_inverse = Real(1e12);

template <class Real>
Real inverse_norm(double square) {
  const double inverse = 1 / std::sqrt(square);
  return inverse > largest_inverse<Real> ? largest_inverse<Real> : Real(inverse);
}

template <class Real>
struct Prefix {
  Prefix(std::int64_t rows, std::int64_t cols, bool columns, const std::int64_t* positives, double gain)
      : row_inverse(rows, Real(1)),
        col_inverse(round_up(cols, tile_width_multiple), Real(1)),
        row_factor(rows),
        row_max(rows, minus_infinity<Real>),
        row_sum(rows, Real(0)),
        col_max(columns ? cols : 0, minus_infinity<Real>),
        col_sum(columns ? cols : 0, Real(0)),
        positive_logit(rows),
        row_moment(rows, 0.0),
        col_moment(cols, 0.0),
        softmax(rows, columns ? cols : 0, positives, false, gain) {}

  std::vector<Real> row_inverse, col_inverse;  // of norms; the columns' as wide as tiles
  std::vector<Real> row_factor;                // scale times the inverse norm
  std::vector<Real> row_max, row_sum, col_max, col_sum, positive_logit;
  std::vector<double> row_moment, col_moment;
  SoftmaxWeights<Real> softmax;
};

}  // namespace contrastile::cpu
