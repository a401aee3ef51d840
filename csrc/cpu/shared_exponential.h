// When rows and columns of a tile can share one exponential a pair.
//
// They share exp(s - m) with the tile's largest logit m: exp(s - a) =
// exp(s - m) exp(m - a), the last factor once a row or column. That is exact
// while m is at most `widest` above every a.
//
// Included by the kernels only, once per instruction set; in an unnamed
// namespace for the reason in vector_math.h.
#pragma once

#include <cstdint>

namespace {

// exp(s - m) is a normal number for every s that matters beside a value as low as m - widest.
template <class Real>
inline constexpr Real widest = 40;

// The tile's largest logit, or 0 if it has none.
template <class Real>
inline Real shift_of_tile(const Real* row_max, std::int64_t rows) {
  const Real none = -__builtin_inff();
  Real largest = none;
  for (std::int64_t i = 0; i < rows; ++i) largest = row_max[i] > largest ? row_max[i] : largest;
  return largest == none ? Real(0) : largest;
}

template <class Real>
inline Real smallest_of(const Real* values, std::int64_t count) {
  Real smallest = __builtin_inff();
  for (std::int64_t i = 0; i < count; ++i) smallest = values[i] < smallest ? values[i] : smallest;
  return smallest;
}

}  // namespace
