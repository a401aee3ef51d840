// Coefficients of a tile's pairs from their logits, and the sums met on the way.
//
// Both terms and all sums come from one exponential, exp(s - a) = exp(s - middle) * exp(middle - a), with the middle of
// all of the tile's row and column shifts. That is exact while these lie within 80 of each other, no sum underflows and
// no pair is capped; the sums themselves tell. Otherwise the tile takes one exponential for each term and sum. The cap
// needs no comparison by pair either: where a row's exponentials add up to 1 at most, none is above 1.
#pragma once

#include "arguments.h"
#include "negatives.h"

namespace contrastile::cuda {

constexpr float widest_spread = 80;  // of shifts: factors within exp(40) either way
constexpr float largest_mass = 0x1p100f;

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

template <class Tile>
struct TileSums {
  RowValues<Tile> row_max, row_sum, row_mass;
  ColValues<Tile> col_max, col_sum, col_mass;
};

template <class Tile>
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
    set_positives(coefficients);
    multiply_by_factor(coefficients);
    return coefficients;
  }

 private:
  __device__ int row_at(int r) const { return origin.row + place.row(r); }
  __device__ int col_at(int c) const { return origin.col + place.col(c); }

  __device__ Term row_term(int r) const { return term_at(weights.row_shift, weights.row_gain, row_at(r), pairs.rows); }
  __device__ Term col_term(int c) const { return term_at(weights.col_shift, weights.col_gain, col_at(c), pairs.cols); }

  __device__ bool wants_sums() const {
    const Sums &rows = arguments.row_sums, &cols = arguments.col_sums;
    return weights.cap || rows.max || rows.mass || cols.max || cols.mass;
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
    const float largest = weights.cap ? 1 : largest_mass;
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
      if (weights.row_shift) sums.row_mass.of[r] += weigh(logit - row_term(r).shift, weights.cap).mass;
      if (weights.col_shift) sums.col_mass.of[c] += weigh(logit - col_term(c).shift, weights.cap).mass;
    });
    combine_rows_and_cols<Add>(sums.row_mass, sums.col_mass, place, exchange);
    if (arguments.row_sums.max || arguments.col_sums.max)
      sums_by_own_maxima(negatives, place, exchange, sums.row_max, sums.row_sum, sums.col_max, sums.col_sum);
  }
  __device__ void weigh_by_own_shifts(Values<Tile>& values) const {
    values.for_each([&](int r, int c, float& value) {
      const float logit = value;
      value = 0;
      if (weights.row_shift) value += weigh(logit - row_term(r).shift, weights.cap).weight * row_term(r).gain;
      if (weights.col_shift) value += weigh(logit - col_term(c).shift, weights.cap).weight * col_term(c).gain;
    });
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
