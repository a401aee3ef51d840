// The tile kernels of the sweep over prefixes, compiled once per instruction
// set (CONTRASTILE_ISA names it).
//
// work   one exponential a pair and prefix in the coefficients, those of rows
//        and columns shared where they can be (shared_exponential.h)
// bound  the arithmetic of the exponential, as in vector_kernels.cpp
#include "prefix_kernels.h"

#include "elements.h"
#include "shared_exponential.h"
#include "vector_math.h"

namespace {

using contrastile::cpu::most_tile_width;
using contrastile::cpu::SoftmaxTerm;
using contrastile::cpu::Tile;

template <class Real>
void scale_onto(Tile<Real> products, const Real* row_factor, const Real* col_factor, Real* logits, Real* row_max,
                Real* col_max) {
  const Real none = -__builtin_inff();
  if (col_max)
    for (std::int64_t j = 0; j < products.width; ++j) col_max[j] = none;
  for (std::int64_t i = 0; i < products.rows; ++i) {
    const Real* from = products.values + i * products.width;
    Real* to = logits + i * products.width;
    Vec<Real> largest = splat<Real>(none);
    for (std::int64_t j = 0; j < products.width; j += Lanes<Real>::count) {
      const Vec<Real> s = load(from + j) * row_factor[i] * load(col_factor + j);
      store(to + j, s);
      largest = larger<Real>(s, largest);
      if (col_max) store(col_max + j, larger<Real>(s, load(col_max + j)));
    }
    row_max[i] = largest_lane<Real>(largest);
  }
}

// row_of(i) gives row i's coefficients as a function of logits and column.
template <class Real, class RowOf>
void weigh_by(Tile<Real> tile, const Real* row_factor, const Real* col_factor, const Real* longer, Real* row_moment,
              Real* col_moment, const RowOf& row_of) {
  for (std::int64_t j = 0; j < tile.width; ++j) col_moment[j] = 0;
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    Real* values = tile.values + i * tile.width;
    const Real* added = longer ? longer + i * tile.width : nullptr;
    const auto coefficients = row_of(i);
    Vec<Real> sum{};
    for (std::int64_t j = 0; j < tile.width; j += Lanes<Real>::count) {
      const Vec<Real> s = load(values + j);
      const Vec<Real> coefficient = coefficients(s, j);
      const Vec<Real> moment = coefficient * at_least<Real>(s, Lanes<Real>::lowest);  // a masked pair's is 0
      sum += moment;
      store(col_moment + j, load(col_moment + j) + moment);
      const Vec<Real> scaled = coefficient * row_factor[i] * load(col_factor + j);
      store(values + j, added ? scaled + load(added + j) : scaled);
    }
    row_moment[i] = sum_of_lanes<Real>(sum);
  }
}

template <class Real>
void weigh_sharing(Tile<Real> tile, Real shift, const Real* row_factor, const Real* col_factor, SoftmaxTerm<Real> row,
                   SoftmaxTerm<Real> col, const Real* longer, Real* row_moment, Real* col_moment) {
  Real col_gain[most_tile_width];
  for (std::int64_t j = 0; j < tile.width; j += Lanes<Real>::count)
    store(col_gain + j, bounded_exponential<Real>(shift - load(col.shift + j)) * load(col.gain + j));
  weigh_by(tile, row_factor, col_factor, longer, row_moment, col_moment, [&](std::int64_t i) {
    const Real row_gain = bounded_exponential<Real>(splat<Real>(shift - row.shift[i]))[0] * row.gain[i];
    return [row_gain, shift, &col_gain](Vec<Real> s, std::int64_t j) {
      return bounded_exponential<Real>(s - shift) * (row_gain + load(col_gain + j));
    };
  });
}

template <class Real>
void weigh(Tile<Real> tile, const Real* row_factor, const Real* col_factor, const Real* row_max, SoftmaxTerm<Real> row,
           SoftmaxTerm<Real> col, const Real* longer, Real* row_moment, Real* col_moment) {
  if (!col.shift)
    return weigh_by(tile, row_factor, col_factor, longer, row_moment, col_moment, [&](std::int64_t i) {
      return [gain = row.gain[i], shift = row.shift[i]](Vec<Real> s, std::int64_t) {
        return gain * bounded_exponential<Real>(s - shift);
      };
    });
  const Real shift = shift_of_tile(row_max, tile.rows);
  if (shift - smallest_of(row.shift, tile.rows) <= widest<Real> &&
      shift - smallest_of(col.shift, tile.width) <= widest<Real>)
    return weigh_sharing(tile, shift, row_factor, col_factor, row, col, longer, row_moment, col_moment);
  weigh_by(tile, row_factor, col_factor, longer, row_moment, col_moment, [&](std::int64_t i) {
    return [gain = row.gain[i], shift = row.shift[i], col](Vec<Real> s, std::int64_t j) {
      return gain * bounded_exponential<Real>(s - shift) +
             load(col.gain + j) * bounded_exponential<Real>(s - load(col.shift + j));
    };
  });
}

template <class Real>
double square(const void* row, ElementType type, std::int64_t depth) {
  return with_element<Real>(type, [&]<class Element>() {
    constexpr int chains = 16;  // to be added to at the same time
    const auto* from = static_cast<const typename Element::Stored*>(row);
    double sum[chains] = {};
    const auto add = [&](std::int64_t k, int chain) {
      const double value = Element::convert(from[k]);
      sum[chain] += value * value;
    };
    std::int64_t k = 0;
    for (; k + chains <= depth; k += chains)
#pragma GCC unroll 16
      for (int c = 0; c < chains; ++c) add(k + c, c);
    for (int c = 0; k < depth; ++k, ++c) add(k, c);
    double total = 0;
    for (int c = 0; c < chains; ++c) total += sum[c];
    return total;
  });
}

template <class Real>
void add_scaled(const void* row, ElementType type, std::int64_t depth, Real factor, Real* target) {
  with_element<Real>(type, [&]<class Element>() {
    const auto* from = static_cast<const typename Element::Stored*>(row);
    for (std::int64_t k = 0; k < depth; ++k) target[k] += factor * Element::convert(from[k]);
  });
}

template <class Real>
constexpr contrastile::cpu::PrefixKernels<Real> all_kernels() {
  return {scale_onto<Real>, weigh<Real>, square<Real>, add_scaled<Real>};
}

}  // namespace

namespace contrastile::cpu::CONTRASTILE_ISA {

extern const PrefixKernels<float> prefix_kernels_single;
extern const PrefixKernels<double> prefix_kernels_double;
const PrefixKernels<float> prefix_kernels_single = all_kernels<float>();
const PrefixKernels<double> prefix_kernels_double = all_kernels<double>();

}  // namespace contrastile::cpu::CONTRASTILE_ISA
