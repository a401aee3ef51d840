// The tile kernels, compiled once per instruction set (CONTRASTILE_ISA names
// it).
//
// work   one exponential a pair in the statistics and one in the coefficients,
//        against 2 D to 6 D flop of products
// bound  the arithmetic of the exponential; tiles are sized to stay in the
//        second-level cache
//
// Where rows and columns both need exponentials, they share one
// (shared_exponential.h); a tile in which they cannot takes one for each.
#include "vector_kernels.h"

#include <chrono>

#include "shared_exponential.h"
#include "vector_math.h"

namespace {

using contrastile::cpu::most_tile_width;
using contrastile::cpu::Tile;
using contrastile::cpu::WeightFunction;
using contrastile::cpu::WeightTerm;

template <class Real>
void scale_and_maxima(Tile<Real> tile, const Real* row_scale, Real* row_max, Real* col_max) {
  constexpr int lanes = Lanes<Real>::count;
  const Real none = -__builtin_inff();
  if (col_max)
    for (std::int64_t j = 0; j < tile.width; ++j) col_max[j] = none;
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    Real* row = tile.values + i * tile.width;
    Vec<Real> largest = splat<Real>(none);
    for (std::int64_t j = 0; j < tile.width; j += lanes) {
      const Vec<Real> s = load(row + j) * row_scale[i];
      store(row + j, s);
      largest = larger<Real>(s, largest);
      if (col_max) store(col_max + j, larger<Real>(s, load(col_max + j)));
    }
    row_max[i] = largest_lane<Real>(largest);
  }
}

// The same over maxima, leaving out those of no elements.
template <class Real>
inline Real smallest_maximum(const Real* maxima, std::int64_t count) {
  const Real none = -__builtin_inff();
  Real smallest = __builtin_inff();
  for (std::int64_t i = 0; i < count; ++i)
    smallest = maxima[i] < smallest && maxima[i] != none ? maxima[i] : smallest;
  return smallest;
}

template <class Real>
inline Vec<Real> finite_shift(Vec<Real> maximum) {
  return maximum == splat<Real>(-__builtin_inff()) ? Vec<Real>{} : maximum;
}

template <class Real>
void exp_sums_sharing(Tile<Real> tile, Real shift, const Real* row_max, Real* row_sum, const Real* col_max,
                      Real* col_sum) {
  constexpr int lanes = Lanes<Real>::count;
  for (std::int64_t j = 0; j < tile.width; ++j) col_sum[j] = 0;
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    const Real* row = tile.values + i * tile.width;
    Vec<Real> sum{};
    for (std::int64_t j = 0; j < tile.width; j += lanes) {
      const Vec<Real> exponential = bounded_exponential<Real>(load(row + j) - shift);
      sum += exponential;
      store(col_sum + j, load(col_sum + j) + exponential);
    }
    row_sum[i] = sum_of_lanes<Real>(sum) * bounded_exponential<Real>(shift - finite_shift<Real>(splat<Real>(row_max[i])))[0];
  }
  for (std::int64_t j = 0; j < tile.width; j += lanes)
    store(col_sum + j, load(col_sum + j) * bounded_exponential<Real>(shift - finite_shift<Real>(load(col_max + j))));
}

template <class Real>
void exp_sums(Tile<Real> tile, const Real* row_max, Real* row_sum, const Real* col_max, Real* col_sum) {
  constexpr int lanes = Lanes<Real>::count;
  const Real none = -__builtin_inff();
  if (col_sum) {
    const Real shift = shift_of_tile(row_max, tile.rows);
    if (shift - smallest_maximum(row_max, tile.rows) <= widest<Real> &&
        shift - smallest_maximum(col_max, tile.width) <= widest<Real>)
      return exp_sums_sharing(tile, shift, row_max, row_sum, col_max, col_sum);
    for (std::int64_t j = 0; j < tile.width; ++j) col_sum[j] = 0;
  }
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    const Real* row = tile.values + i * tile.width;
    const Real shift = row_max[i] == none ? Real(0) : row_max[i];
    Vec<Real> sum{};
    for (std::int64_t j = 0; j < tile.width; j += lanes) {
      const Vec<Real> s = load(row + j);
      sum += bounded_exponential<Real>(s - shift);
      if (col_sum) {
        store(col_sum + j, load(col_sum + j) + bounded_exponential<Real>(s - finite_shift<Real>(load(col_max + j))));
      }
    }
    row_sum[i] = sum_of_lanes<Real>(sum);
  }
}

template <class Real, WeightFunction function>
inline Vec<Real> weight_of(Vec<Real> t, Vec<Real>& mass) {
  Vec<Real> weight;
  if constexpr (function == WeightFunction::capped) {
    weight = bounded_exponential<Real>(at_most<Real>(t, 0));
    mass += at_least<Real>(t, 0);
  } else if constexpr (function == WeightFunction::sigmoid) {
    const SigmoidAndSoftplus<Real> both(t);
    mass += both.softplus;
    return both.sigmoid;
  } else if constexpr (function == WeightFunction::softmax) {
    weight = bounded_exponential<Real>(t);
  } else {
    weight = exponential<Real>(t);
  }
  mass += weight;
  return weight;
}

template <class Real, bool has_row, bool has_col, WeightFunction function>
void weigh_as(Tile<Real> tile, const Real* row_scale, WeightTerm<Real> row, WeightTerm<Real> col, Real* row_moment) {
  using L = Lanes<Real>;
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    Real* values = tile.values + i * tile.width;
    const Real row_shift = has_row ? row.shift[i] : Real(0);
    const Real row_gain = has_row ? row.gain[i] : Real(0);
    Vec<Real> mass{};
    Vec<Real> weight{};
    Vec<Real> moment{};
    for (std::int64_t j = 0; j < tile.width; j += L::count) {
      const Vec<Real> s = load(values + j);
      Vec<Real> coefficient{};
      if constexpr (has_row) {
        const Vec<Real> f = weight_of<Real, function>(s - row_shift, mass);
        if constexpr (function == WeightFunction::sigmoid) weight += f;
        coefficient = row_gain * f;
      }
      if constexpr (has_col) {
        Vec<Real> col_mass = load(col.mass + j);
        coefficient += load(col.gain + j) * weight_of<Real, function>(s - load(col.shift + j), col_mass);
        store(col.mass + j, col_mass);
      }
      moment += coefficient * at_least<Real>(s, L::lowest);  // a masked pair: 0 * lowest, not 0 * -inf
      store(values + j, coefficient * row_scale[i]);
    }
    if constexpr (has_row) row.mass[i] = sum_of_lanes<Real>(mass);
    if constexpr (has_row && function == WeightFunction::sigmoid) {
      if (row.weight) row.weight[i] = sum_of_lanes<Real>(weight);
    }
    row_moment[i] = sum_of_lanes<Real>(moment);
  }
}

// Both directions from exp(s - shift), shift at most `widest` above every other shift and, where a cap is set, none.
template <class Real>
void weigh_sharing(Tile<Real> tile, Real shift, const Real* row_scale, WeightTerm<Real> row, WeightTerm<Real> col,
                   Real* row_moment) {
  using L = Lanes<Real>;
  Real col_factor[most_tile_width], col_gain[most_tile_width];
  for (std::int64_t j = 0; j < tile.width; j += L::count) {
    const Vec<Real> factor = bounded_exponential<Real>(shift - load(col.shift + j));
    store(col_factor + j, factor);
    store(col_gain + j, factor * load(col.gain + j));
  }
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    Real* values = tile.values + i * tile.width;
    const Real row_factor = bounded_exponential<Real>(splat<Real>(shift - row.shift[i]))[0];
    const Real row_gain = row_factor * row.gain[i];
    Vec<Real> mass{};
    Vec<Real> moment{};
    for (std::int64_t j = 0; j < tile.width; j += L::count) {
      const Vec<Real> s = load(values + j);
      const Vec<Real> exponential = bounded_exponential<Real>(s - shift);
      const Vec<Real> coefficient = exponential * (row_gain + load(col_gain + j));
      mass += exponential;
      store(col.mass + j, load(col.mass + j) + exponential);
      moment += coefficient * at_least<Real>(s, L::lowest);
      store(values + j, coefficient * row_scale[i]);
    }
    row.mass[i] = sum_of_lanes<Real>(mass) * row_factor;
    row_moment[i] = sum_of_lanes<Real>(moment);
  }
  for (std::int64_t j = 0; j < tile.width; j += L::count)
    store(col.mass + j, load(col.mass + j) * load(col_factor + j));
}

template <class Real, WeightFunction function>
void weigh_with(Tile<Real> tile, const Real* row_scale, const Real* row_max, WeightTerm<Real> row,
                WeightTerm<Real> col, Real* row_moment) {
  if (row.shift && col.shift) {
    if constexpr (function != WeightFunction::sigmoid) {
      const Real shift = shift_of_tile(row_max, tile.rows);
      const Real row_spread = shift - smallest_of(row.shift, tile.rows);
      const Real col_spread = shift - smallest_of(col.shift, tile.width);
      constexpr Real most = function == WeightFunction::capped ? Real(0) : widest<Real>;
      if (row_spread <= most && col_spread <= most)
        return weigh_sharing(tile, shift, row_scale, row, col, row_moment);
    }
    weigh_as<Real, true, true, function>(tile, row_scale, row, col, row_moment);
  } else if (row.shift) {
    weigh_as<Real, true, false, function>(tile, row_scale, row, col, row_moment);
  } else {
    weigh_as<Real, false, true, function>(tile, row_scale, row, col, row_moment);
  }
}

template <class Real>
void weigh(Tile<Real> tile, const Real* row_scale, const Real* row_max, WeightTerm<Real> row, WeightTerm<Real> col,
           WeightFunction function, Real* row_moment) {
  switch (function) {
    case WeightFunction::exponential:
      return weigh_with<Real, WeightFunction::exponential>(tile, row_scale, row_max, row, col, row_moment);
    case WeightFunction::capped:
      return weigh_with<Real, WeightFunction::capped>(tile, row_scale, row_max, row, col, row_moment);
    case WeightFunction::sigmoid:
      return weigh_with<Real, WeightFunction::sigmoid>(tile, row_scale, row_max, row, col, row_moment);
    case WeightFunction::softmax:
      return weigh_with<Real, WeightFunction::softmax>(tile, row_scale, row_max, row, col, row_moment);
  }
}

template <class Real>
void mask_equal_groups(Tile<Real> tile, const std::int64_t* row_groups, const std::int64_t* col_groups,
                       std::int64_t cols) {
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    Real* values = tile.values + i * tile.width;
    const std::int64_t group = row_groups[i];
    for (std::int64_t j = 0; j < cols; ++j) values[j] = col_groups[j] == group ? -__builtin_inff() : values[j];
  }
}

template <class Real>
void mask_above(Tile<Real> tile, const Real* row_scale, const Real* row_ceiling, std::int64_t cols) {
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    Real* values = tile.values + i * tile.width;
    const Real scale = row_scale[i], ceiling = row_ceiling[i];
    for (std::int64_t j = 0; j < cols; ++j)
      values[j] = values[j] * scale > ceiling ? -__builtin_inff() : values[j];  // a NaN stays
  }
}

template <class Real>
void count_above(Tile<Real> tile, std::int64_t cols, const Real* threshold, std::int64_t* count) {
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    const Real* values = tile.values + i * tile.width;
    std::int64_t above = 0;
    for (std::int64_t j = 0; j < cols; ++j) above += !(values[j] <= threshold[i]);
    count[i] += above;
  }
}

// Fused multiply-adds on registers alone for about `seconds`: flop/s of one
// thread.
double fma_rate(double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int chains = 12;  // enough independent sums to hide the latency of two units
  constexpr int rounds = 4096;
  Vec<float> sum[chains];
  // Not constants: of a chain that starts at its fixed point, 1, the compiler would leave nothing.
  for (int c = 0; c < chains; ++c) sum[c] = splat<float>(float(seconds) + float(c));
  const Vec<float> factor = splat<float>(0.999f);
  const Vec<float> addend = splat<float>(1e-3f);
  std::int64_t flops = 0;
  const auto start = Clock::now();
  double elapsed = 0;
  do {
    for (int r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
      for (int c = 0; c < chains; ++c) sum[c] = sum[c] * factor + addend;
    }
    flops += std::int64_t(rounds) * chains * Lanes<float>::count * 2;
    elapsed = std::chrono::duration<double>(Clock::now() - start).count();
  } while (elapsed < seconds);
  Vec<float> total{};
  for (int c = 0; c < chains; ++c) total += sum[c];
  volatile float kept = sum_of_lanes<float>(total);
  (void)kept;
  return double(flops) / elapsed;
}

template <class Real>
constexpr contrastile::cpu::VectorKernels<Real> all_kernels() {
  return {scale_and_maxima<Real>,  exp_sums<Real>,   weigh<Real>,
          mask_equal_groups<Real>, mask_above<Real>, count_above<Real>};
}

}  // namespace

namespace contrastile::cpu::CONTRASTILE_ISA {

extern const VectorKernels<float> vector_kernels_single;
extern const VectorKernels<double> vector_kernels_double;
const VectorKernels<float> vector_kernels_single = all_kernels<float>();
const VectorKernels<double> vector_kernels_double = all_kernels<double>();

double fma_rate(double seconds) { return ::fma_rate(seconds); }

}  // namespace contrastile::cpu::CONTRASTILE_ISA
