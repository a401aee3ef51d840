// Coefficients of a tile's pairs from their logits, and the sums met on the way.
//
// Both terms and all sums come from one exponential, exp(s - a) = exp(s - middle) * exp(middle - a), with the middle of
// all of the tile's row and column shifts. That is exact while these lie within 80 of each other, no stored sum
// underflows, no mass overflows and no pair is capped; the sums themselves tell. Otherwise the tile takes one
// exponential for each term and sum. Without sums, weights below exp(-47) may become 0. The cap needs no comparison by
// pair either: where a row's exponentials add up to 1 at most, none is above 1.
//
// Sigmoids of rows and columns have nothing in common: each term takes an exponential, a reciprocal and a polynomial,
// at any magnitude. They have kernels of their own, for in one with exponentials these would have to share registers.
#pragma once

#include <type_traits>

#include "arguments.h"
#include "negatives.h"

namespace contrastile::cuda {

constexpr float widest_spread = 80;  // of shifts: factors within exp(40) either way
constexpr float largest_mass = 0x1p100f;

// Of weight functions: kernels of one look at the cap as they run.
enum class Family { exponentials, sigmoids };

template <Family family>
using FamilyOf = std::integral_constant<Family, family>;

template <class Function>
void with_family(const Weights& weights, Function function) {
  if (weights.function == WeightFunction::sigmoid) return function(FamilyOf<Family::sigmoids>{});
  return function(FamilyOf<Family::exponentials>{});
}

struct CoefficientArguments {
  Pairs pairs;
  Window window;
  Weights weights;
  const float* factor;  // (1,) that all coefficients are multiplied with
  Sums row_sums, col_sums;
};

struct Spread {
  float lowest = infinity, highest = -infinity;
  __device__ void add(float shift) {
    lowest = fminf(lowest, shift);
    highest = fmaxf(highest, shift);
  }
};

// Shift and gain of one row or column; absent where its direction is, and in padding.
struct Term {
  float shift = 0, gain = 0;
  bool is_there = false;

  __device__ float factor(float middle) const { return is_there ? exponential(middle - shift) : 0; }
};
__device__ inline Term term_at(const float* shifts, const float* gains, int index, int length) {
  if (!shifts || index >= length) return {};
  return {shifts[index], gains[index], true};
}

// f(s - shift), and phi, whose derivative it is. A NaN stays one.
struct Weighed {
  float weight, mass;
};
__device__ inline Weighed weigh(float above, bool cap) {
  if (cap && above > 0) return {1, 1 + above};
  const float weight = exponential(above);
  return {weight, weight};
}

// log(1 + t) for t from 0 to 1, within 2 units in the last place: t times a Chebyshev fit of log(1 + t) / t.
__device__ inline float log1p_of_fraction(float t) {
  constexpr float fit[] = {-0.0031760570f, 0.0195425265f,  -0.0563736109f, 0.1054362357f,  -0.1526966691f,
                           0.1966327429f,  -0.2495161593f, 0.3332971036f,  -0.4999989271f, 1.0f};
  float value = fit[0];
#pragma unroll
  for (int k = 1; k < 10; ++k) value = value * t + fit[k];
  return value * t;
}

// Sigmoid and softplus from one exponential of -|t|, each to its last digits however small. A NaN stays one.
__device__ inline Weighed weigh_by_sigmoid(float t) {
  const float below = exponential(-fabsf(t)), above_zero = device::rcp_approx(1 + below);
  return {t > 0 ? above_zero : below * above_zero, fmaxf(t, 0) + log1p_of_fraction(below)};
}

template <class Tile>
struct TileSums {
  RowValues<Tile> row_max, row_sum, row_mass;
  ColValues<Tile> col_max, col_sum, col_mass;
};

template <class Tile, Family family>
struct Coefficients {
  const CoefficientArguments& arguments;
  const Origin& origin;
  const Place<Tile>& place;
  Exchange<Tile>* exchange;
  const Pairs& pairs = arguments.pairs;
  const Weights& weights = arguments.weights;

  // factor * scale_i * C_ij, 0 in padding. Stores the sums. `logits` computes those of all pairs; the few tiles where
  // the first exponentials do not do compute them again, rather than hold them in registers.
  template <class Logits>
  __device__ Values<Tile> of(Logits logits) const {
    Values<Tile> coefficients = negatives_of(logits);
    if constexpr (family == Family::sigmoids)
      weigh_by_sigmoids(coefficients);
    else
      weigh_by_exponentials(coefficients, logits);
    set_positives(coefficients);
    multiply_by_factor(coefficients);
    return coefficients;
  }

 private:
  __device__ int row_at(int r) const { return origin.row + place.row(r); }
  __device__ int col_at(int c) const { return origin.col + place.col(c); }

  __device__ Term row_term(int r) const { return term_at(weights.row_shift, weights.row_gain, row_at(r), pairs.rows); }
  __device__ Term col_term(int c) const { return term_at(weights.col_shift, weights.col_gain, col_at(c), pairs.cols); }

  __device__ bool is_capped() const { return weights.function == WeightFunction::capped; }

  template <class Logits>
  __device__ void weigh_by_exponentials(Values<Tile>& coefficients, Logits logits) const {
    Spread spread;
#pragma unroll
    for (int r = 0; r < Tile::thread_rows; ++r)
      if (weights.row_shift && row_at(r) < pairs.rows) spread.add(weights.row_shift[row_at(r)]);
#pragma unroll
    for (int c = 0; c < Tile::thread_cols; ++c)
      if (weights.col_shift && col_at(c) < pairs.cols) spread.add(weights.col_shift[col_at(c)]);
    const float lowest = combine_block<Smaller>(spread.lowest, exchange);
    const float highest = combine_block<Larger>(spread.highest, exchange);
    const float middle = 0.5f * (lowest + highest);

    float row_factor[Tile::thread_rows], col_factor[Tile::thread_cols];
#pragma unroll
    for (int r = 0; r < Tile::thread_rows; ++r) row_factor[r] = row_term(r).factor(middle);
#pragma unroll
    for (int c = 0; c < Tile::thread_cols; ++c) col_factor[c] = col_term(c).factor(middle);
    coefficients.for_each([&](int, int, float& value) { value = exponential(value - middle); });

    bool exact = highest - lowest <= widest_spread;
    TileSums<Tile> sums;
    if (wants_sums()) {
      add_up(coefficients, middle, row_factor, col_factor, sums);
      exact = all_of_block(exact && sums_tell(sums), exchange);
    }
    if (exact) {
#pragma unroll
      for (int r = 0; r < Tile::thread_rows; ++r) row_factor[r] *= row_term(r).gain;
#pragma unroll
      for (int c = 0; c < Tile::thread_cols; ++c) col_factor[c] *= col_term(c).gain;
      coefficients.for_each([&](int r, int c, float& value) { value *= row_factor[r] + col_factor[c]; });
    } else {
      coefficients = negatives_of(logits);
      if (wants_sums()) add_up_by_own_shifts(coefficients, sums);
      weigh_by_own_shifts(coefficients);
    }
    if (wants_sums()) store_sums(sums);
  }

  __device__ bool wants_sums() const {
    const Sums &rows = arguments.row_sums, &cols = arguments.col_sums;
    return is_capped() || rows.max || rows.mass || cols.max || cols.mass;
  }

  __device__ void add_up(const Values<Tile>& exponentials, float middle, const float (&row_factor)[Tile::thread_rows],
                         const float (&col_factor)[Tile::thread_cols], TileSums<Tile>& sums) const {
    fill(sums.row_max, middle);
    fill(sums.col_max, middle);
    fill(sums.row_sum, 0);
    fill(sums.col_sum, 0);
    exponentials.for_each([&](int r, int c, float value) {
      sums.row_sum.of[r] += value;
      sums.col_sum.of[c] += value;
    });
    combine_rows_and_cols<Add>(sums.row_sum, sums.col_sum, place, exchange);
#pragma unroll
    for (int r = 0; r < Tile::thread_rows; ++r) sums.row_mass.of[r] = sums.row_sum.of[r] * row_factor[r];
#pragma unroll
    for (int c = 0; c < Tile::thread_cols; ++c) sums.col_mass.of[c] = sums.col_sum.of[c] * col_factor[c];
  }

  __device__ bool sums_tell(const TileSums<Tile>& sums) const {
    bool exact = true;
    if (arguments.row_sums.max) exact = exact && are_exact(sums.row_sum, pairs, origin, place);
    if (arguments.col_sums.max) exact = exact && are_exact(sums.col_sum, pairs, origin, place);
    const float largest = is_capped() ? 1 : largest_mass;
#pragma unroll
    for (int r = 0; r < Tile::thread_rows; ++r)
      exact = exact && (row_at(r) >= pairs.rows || sums.row_mass.of[r] <= largest);
#pragma unroll
    for (int c = 0; c < Tile::thread_cols; ++c)
      exact = exact && (col_at(c) >= pairs.cols || sums.col_mass.of[c] <= largest);
    return exact;
  }

  // At any magnitude, with one exponential for each term.
  __device__ void add_up_by_own_shifts(const Values<Tile>& negatives, TileSums<Tile>& sums) const {
    fill(sums.row_mass, 0);
    fill(sums.col_mass, 0);
    negatives.for_each([&](int r, int c, float logit) {
      if (weights.row_shift) sums.row_mass.of[r] += weigh(logit - row_term(r).shift, is_capped()).mass;
      if (weights.col_shift) sums.col_mass.of[c] += weigh(logit - col_term(c).shift, is_capped()).mass;
    });
    combine_rows_and_cols<Add>(sums.row_mass, sums.col_mass, place, exchange);
    if (arguments.row_sums.max || arguments.col_sums.max)
      sums_by_own_maxima(negatives, place, exchange, sums.row_max, sums.row_sum, sums.col_max, sums.col_sum);
  }
  __device__ void weigh_by_own_shifts(Values<Tile>& values) const {
    values.for_each([&](int r, int c, float& value) {
      const float logit = value;
      value = 0;
      if (weights.row_shift) value += weigh(logit - row_term(r).shift, is_capped()).weight * row_term(r).gain;
      if (weights.col_shift) value += weigh(logit - col_term(c).shift, is_capped()).weight * col_term(c).gain;
    });
  }

  // A row at a time, so that the logits of no other wait for the second term.
  __device__ void weigh_by_sigmoids(Values<Tile>& values) const {
    const Sums &rows = arguments.row_sums, &cols = arguments.col_sums;
    TileSums<Tile> sums;
    RowValues<Tile> row_weight;
    if (rows.max || cols.max)
      sums_by_own_maxima(values, place, exchange, sums.row_max, sums.row_sum, sums.col_max, sums.col_sum);
    fill(sums.row_mass, 0);
    fill(sums.col_mass, 0);
    fill(row_weight, 0);
#pragma unroll
    for (int r = 0; r < Tile::thread_rows; ++r) {
      float(&of_row)[Tile::thread_cols] = values.at[r];
      float logits[Tile::thread_cols];
#pragma unroll
      for (int c = 0; c < Tile::thread_cols; ++c) {
        logits[c] = of_row[c];
        of_row[c] = 0;
      }
      if (weights.row_shift) {
        const Term term = row_term(r);
#pragma unroll
        for (int c = 0; c < Tile::thread_cols; ++c) {
          const Weighed found = weigh_by_sigmoid(logits[c] - term.shift);
          row_weight.of[r] += found.weight;
          sums.row_mass.of[r] += found.mass;
          of_row[c] = found.weight * term.gain;
        }
      }
      if (weights.col_shift) {
#pragma unroll
        for (int c = 0; c < Tile::thread_cols; ++c) {
          const Weighed found = weigh_by_sigmoid(logits[c] - col_term(c).shift);
          sums.col_mass.of[c] += found.mass;
          of_row[c] += found.weight * col_term(c).gain;
        }
      }
    }
    if (rows.mass || cols.mass) combine_rows_and_cols<Add>(sums.row_mass, sums.col_mass, place, exchange);
    store_sums(sums);
    if (rows.weight) {
      combine_rows<Add>(row_weight, place, exchange);
      store(rows.weight, row_weight, arguments.window, origin, place);
    }
  }

  template <class Logits>
  __device__ Values<Tile> negatives_of(Logits logits) const {
    Values<Tile> negatives = logits();
    keep_negatives(negatives, pairs, origin, place);
    return negatives;
  }

  __device__ void store_sums(const TileSums<Tile>& sums) const {
    store(arguments.row_sums.max, sums.row_max, arguments.window, origin, place);
    store(arguments.row_sums.sum, sums.row_sum, arguments.window, origin, place);
    store(arguments.row_sums.mass, sums.row_mass, arguments.window, origin, place);
    store(arguments.col_sums.max, sums.col_max, arguments.window, origin, place);
    store(arguments.col_sums.sum, sums.col_sum, arguments.window, origin, place);
    store(arguments.col_sums.mass, sums.col_mass, arguments.window, origin, place);
  }

  __device__ void set_positives(Values<Tile>& coefficients) const {
    if (!pairs.positives) return;
#pragma unroll
    for (int r = 0; r < Tile::thread_rows; ++r) {
      if (row_at(r) >= pairs.rows) continue;
      const int positive = pairs.positives[row_at(r)] - origin.col;
      if (positive < 0 || positive >= Tile::block_cols) continue;
#pragma unroll
      for (int c = 0; c < Tile::thread_cols; ++c)
        if (place.col(c) == positive) coefficients.at[r][c] = weights.positive_coeff[row_at(r)];
    }
  }

  __device__ void multiply_by_factor(Values<Tile>& coefficients) const {
    const float factor = arguments.factor ? *arguments.factor : 1;
#pragma unroll
    for (int r = 0; r < Tile::thread_rows; ++r) {
      const float scale = row_at(r) < pairs.rows ? pairs.scale[row_at(r)] * factor : 0;
#pragma unroll
      for (int c = 0; c < Tile::thread_cols; ++c) coefficients.at[r][c] *= scale;
    }
  }
};

}  // namespace contrastile::cuda
