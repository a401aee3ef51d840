// Random embeddings in their own element type, in buffers of exactly the size they need.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/embeddings.h"
#include "dense_truth.h"

namespace contrastile::test {

using cpu::ElementType;
using cpu::EmbeddingView;

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  double uniform(double low, double high) { return std::uniform_real_distribution<>(low, high)(engine_); }
  std::int64_t below(std::int64_t bound) { return std::uniform_int_distribution<std::int64_t>(0, bound - 1)(engine_); }
  bool chance(double probability) { return uniform(0, 1) < probability; }
  template <class T>
  T one_of(std::initializer_list<T> choices) {
    return choices.begin()[below(std::int64_t(choices.size()))];
  }
  Ids permutation(std::int64_t size, std::int64_t of) {
    Ids ids(of);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), engine_);
    ids.resize(size);
    return ids;
  }

 private:
  std::mt19937 engine_;
};

template <class Real>
struct Embeddings {
  std::vector<Real> reals;  // one of the two is used
  std::vector<std::uint16_t> halves;
  EmbeddingView view;
};

constexpr std::uint16_t nan_half = 0x7fff;  // in both 16-bit types

inline double value_of_half(std::uint16_t bits, ElementType type) {
  const bool brain = type == ElementType::bfloat16;
  const int mantissa_bits = brain ? 7 : 10, bias = brain ? 127 : 15;
  const int exponent = (bits & 0x7fff) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                         : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Random values of at most 1 in magnitude, written to `values` as well. Gaps between rows are multiples of `unit`.
template <class Real>
Embeddings<Real> random_embeddings(Random& random, std::int64_t rows, std::int64_t depth, ElementType type,
                                   Vector& values, std::int64_t unit = 1) {
  const std::int64_t stride = depth + unit * random.one_of<std::int64_t>({0, 0, 1, 7});
  const std::int64_t elements = (rows - 1) * stride + depth;
  Embeddings<Real> out;
  values.resize(rows * depth);
  const bool half = type == ElementType::float16 || type == ElementType::bfloat16;
  if (half)
    out.halves.assign(elements, nan_half);
  else
    out.reals.assign(elements, std::numeric_limits<Real>::quiet_NaN());
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t k = 0; k < depth; ++k) {
      double& value = values[i * depth + k];
      if (half) {
        const std::uint16_t largest = type == ElementType::bfloat16 ? 0x3f80 : 0x3c00;  // 1.0
        const std::uint16_t smallest = random.chance(0.05) ? 0 : type == ElementType::bfloat16 ? 0x3d00 : 0x2000;
        const std::uint16_t bits =
            std::uint16_t(smallest + random.below(largest - smallest)) | (random.chance(.5) << 15);
        out.halves[i * stride + k] = bits;
        value = value_of_half(bits, type);
      } else {
        value = out.reals[i * stride + k] = Real(random.uniform(-1, 1));
      }
    }
  const void* data = half ? static_cast<const void*>(out.halves.data()) : out.reals.data();
  out.view = {data, rows, depth, stride, type};
  return out;
}

}  // namespace contrastile::test
