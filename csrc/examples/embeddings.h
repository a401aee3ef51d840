// What the examples train on: pairs of rows that point nearly the same way, of norm 1 or so; and what they print.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <span>

namespace example {

inline float anchor(int row, int feature, int depth) {
  return static_cast<float>(std::sin(12.9898 * row + 78.233 * feature) * std::sqrt(2.0 / depth));
}
inline float candidate(int row, int feature, int depth) {
  return static_cast<float>(std::sin(12.9898 * row + 78.233 * feature + 0.5 * std::cos(7.0 * row * feature)) *
                            std::sqrt(2.0 / depth));
}

// To the nearest, ties to even.
inline std::uint16_t to_bfloat16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline double norm(std::span<const float> values) {
  double sum = 0;
  for (const float value : values) sum += double{value} * value;
  return std::sqrt(sum);
}

inline void print(double loss, std::span<const float> dx, std::span<const float> dy) {
  std::printf("loss %.9g, norm of dX %.9g, of dY %.9g\n", loss, norm(dx), norm(dy));
}

}  // namespace example
