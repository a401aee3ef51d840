// What a sweep reads: embeddings in their own element type, viewed with shapes
// and strides.
#pragma once

#include <cstdint>

namespace contrastile::cpu {

enum class ElementType { float16, bfloat16, float32, float64 };

// Row-major (rows, depth): unit stride within a row, row_stride elements between rows.
struct EmbeddingView {
  const void* data;
  std::int64_t rows;
  std::int64_t depth;
  std::int64_t row_stride;
  ElementType type;

  std::int64_t element_bytes() const {
    if (type == ElementType::float64) return 8;
    return type == ElementType::float32 ? 4 : 2;
  }

  const void* at(std::int64_t row, std::int64_t k) const {
    return static_cast<const char*>(data) + (row * row_stride + k) * element_bytes();
  }
};

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

constexpr std::int64_t ceil_div(std::int64_t value, std::int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace contrastile::cpu
