// Number formats and approximate functions as the PTX ISA defines them.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <type_traits>

namespace contrastile::host {

inline constexpr float smallest_normal = std::numeric_limits<float>::min();

inline float flush_subnormal(float x) { return std::fabs(x) < smallest_normal ? std::copysign(0.0f, x) : x; }

inline float from_bf16(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

// Round to nearest, ties to even; any NaN becomes 0x7fff.
inline std::uint16_t to_bf16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_f16(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000) << 16;
  const std::uint32_t magnitude = bits & 0x7fff;
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  constexpr float exponent_shift = 0x1p112f;  // the biases are 127 and 15; exact for subnormals too
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude << 13) * exponent_shift));
}

// Round to nearest, ties to even; beyond 65504 infinity; any NaN becomes 0x7fff.
inline std::uint16_t to_f16(float value) {
  if (std::isnan(value)) return 0x7fff;
  const auto sign = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) {  // subnormal: adding 0.5 leaves multiples of 2^-24 in the low bits, rounded
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(magnitude + 0.5f) & 0x7ff));
  }
  const auto bits = std::bit_cast<std::uint32_t>(magnitude);
  return static_cast<std::uint16_t>(sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10)));
}

// Round to 10 fraction bits, ties away from zero; the low bits of a tf32 are zero here.
inline std::uint32_t round_to_tf32(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return 0x7fffffff;
  return std::isinf(value) ? bits : (bits + 0x1000) & ~0x1fffu;
}

// What the matrix instruction sees of a register that holds a tf32: its low 13 bits are not read.
inline float read_tf32(std::uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); }

// Moves a result by one unit in the last place up, down or not at all, as its input decides, so that nothing
// comes to rely on an approximation being exact.
inline float perturb(float exact, float input) {
  if (!std::isfinite(exact) || exact == 0.0f) return exact;
  const std::uint32_t hash = (std::bit_cast<std::uint32_t>(input) * 2654435761u) >> 30;
  const auto bits = std::bit_cast<std::uint32_t>(exact);
  return std::bit_cast<float>(hash == 1 ? bits + 1 : hash == 2 ? bits - 1 : bits);
}

inline float approximate_exp2(float x) {
  x = flush_subnormal(x);
  const float exact = flush_subnormal(std::exp2(x));
  return x == std::floor(x) ? exact : flush_subnormal(perturb(exact, x));
}

inline float approximate_log2(float x) {
  x = flush_subnormal(x);
  return x == 1.0f ? 0.0f : flush_subnormal(perturb(std::log2(x), x));
}

inline float approximate_rcp(float x) {
  x = flush_subnormal(x);
  return flush_subnormal(perturb(1.0f / x, x));
}

}  // namespace contrastile::host

namespace contrastile::device {

inline float exp2_approx(float x) { return host::approximate_exp2(x); }
inline float log2_approx(float x) { return host::approximate_log2(x); }
inline float rcp_approx(float x) { return host::approximate_rcp(x); }

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return host::from_bf16(value.bits); }
inline float to_float(f16 value) { return host::from_f16(value.bits); }

template <typename Element>
Element from_float(float value) {
  if constexpr (std::is_same_v<Element, float>)
    return value;
  else if constexpr (std::is_same_v<Element, bf16>)
    return {host::to_bf16(value)};
  else
    return {host::to_f16(value)};
}

template <typename Element>
std::uint32_t pack(float low, float high) {
  return static_cast<std::uint32_t>(from_float<Element>(low).bits) |
         static_cast<std::uint32_t>(from_float<Element>(high).bits) << 16;
}

inline std::uint32_t to_tf32(float value) { return host::round_to_tf32(value); }

}  // namespace contrastile::device
