// Elementwise work on one tile of logits, vectorised and chosen at run time for
// the processor.
//
// A tile is row-major, `rows` x `width`, with width a multiple of
// tile_width_multiple; columns beyond the matrix hold -inf, as masked pairs do,
// so that they vanish from every maximum and every sum and no loop needs a
// tail. Vectors over a tile's columns are padded to `width` likewise.
#pragma once

#include <cstdint>

#include "embeddings.h"

namespace contrastile::cpu {

inline constexpr std::int64_t tile_width_multiple = 32;
inline constexpr std::int64_t most_tile_width = 288;

template <class Real>
struct Tile {
  Real* values;
  std::int64_t rows;
  std::int64_t width;
};

// f of a coefficient gain * f(s - shift), and its primitive phi, whose sum is
// the mass.
enum class WeightFunction {
  exponential,  // f = phi = exp
  capped,       // f = min(exp, 1), phi(t) = exp(t) below 0 and 1 + t above
  sigmoid,      // f(t) = 1 / (1 + exp(-t)), phi(t) = log(1 + exp(t))
  softmax,      // exp where the shift is a maximum, so that t <= 0 up to rounding
};

// One direction's share of the coefficient, see python/contrastile/pairs.py.
// Both pointers null: the direction is absent.
template <class Real>
struct WeightTerm {
  const Real* shift;
  const Real* gain;
  Real* mass;    // rows: overwritten with the tile's sums; columns: added to
  Real* weight;  // rows of sigmoids alone, likewise the sums of f; or null
};

template <class Real>
struct VectorKernels {
  // values *= row_scale, then the largest value of each row and (unless null)
  // of each column.
  void (*scale_and_maxima)(Tile<Real>, const Real* row_scale, Real* row_max, Real* col_max);

  // row_sum[i] = sum_j exp(s_ij - row_max[i]); col_sum likewise unless null. A
  // maximum of -inf counts as 0.
  void (*exp_sums)(Tile<Real>, const Real* row_max, Real* row_sum, const Real* col_max, Real* col_sum);

  // values = row_scale * C(values), row_moment[i] = sum_j C_ij s_ij. row_max:
  // the largest value of each row.
  void (*weigh)(Tile<Real>, const Real* row_scale, const Real* row_max, WeightTerm<Real> row, WeightTerm<Real> col,
                WeightFunction, Real* row_moment);

  // values = -inf where the group ids agree.
  void (*mask_equal_groups)(Tile<Real>, const std::int64_t* row_groups, const std::int64_t* col_groups,
                            std::int64_t cols);

  // values = -inf where row_scale * values is above row_ceiling.
  void (*mask_above)(Tile<Real>, const Real* row_scale, const Real* row_ceiling, std::int64_t cols);

  // count[i] += how many of row i's first `cols` values are not at most
  // threshold[i]: a NaN counts.
  void (*count_above)(Tile<Real>, std::int64_t cols, const Real* threshold, std::int64_t* count);
};

template <class Real>
const VectorKernels<Real>& vector_kernels();

}  // namespace contrastile::cpu
