// Elements of embeddings and gradients in memory, and what the kernels compute with.
//
// Included where code is compiled once per instruction set; in an unnamed namespace for the reason in vector_math.h.
#pragma once

#include <cstdint>

#include "embeddings.h"

namespace {

using contrastile::cpu::ElementType;

inline float float_from_bits(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

// How an element in memory becomes a Real, and a Real the nearest element, ties
// to even.
template <class Real>
struct Same {
  using Stored = Real;
  static Real convert(Real value) { return value; }
  static Real narrow(Real value) { return value; }
};

struct Bfloat16 {
  using Stored = std::uint16_t;
  static float convert(std::uint16_t bits) { return float_from_bits(std::uint32_t(bits) << 16); }
  static std::uint16_t narrow(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return std::uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest);
  }
};

struct Float16 {
  using Stored = std::uint16_t;
  // Without a branch: a multiplication moves the exponent, which also
  // normalises subnormals; the exponent of inf and NaN is then forced to all
  // ones.
  static float convert(std::uint16_t bits) {
    const float scaled = float_from_bits(std::uint32_t(bits & 0x7fff) << 13) * 0x1p112f;
    std::uint32_t result;
    __builtin_memcpy(&result, &scaled, sizeof result);
    result |= (bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    return float_from_bits(result | std::uint32_t(bits & 0x8000) << 16);
  }
  // A subnormal is rounded where its last bit is: beside 0.5 in float.
  static std::uint16_t narrow(float value) {
    const std::uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
    const std::uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    const std::uint32_t subnormal = bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
    const std::uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    const std::uint32_t beyond = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return std::uint16_t((magnitude < 0x47800000 ? finite : beyond) | (bits >> 16 & 0x8000));
  }
};

// work.operator()<Element>() for the element type of the embeddings.
template <class Real, class Work>
auto with_element(ElementType type, const Work& work) {
  if constexpr (sizeof(Real) == sizeof(float)) {
    if (type == ElementType::bfloat16) return work.template operator()<Bfloat16>();
    if (type == ElementType::float16) return work.template operator()<Float16>();
  }
  return work.template operator()<Same<Real>>();
}

}  // namespace
