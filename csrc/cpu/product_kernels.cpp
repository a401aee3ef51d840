// Matrix products of packed panels, compiled once per instruction set
// (CONTRASTILE_ISA names it).
//
// work   2 m n k flop; a block of panel_rows x panel_cols sums stays in
// registers over k reads  a's panels from the second-level cache, b's from the
// first: 2 + panel_rows loads for
//        2 panel_rows fused multiply-adds on vectors
// bound  the multiply-add units
#include "product_kernels.h"

#include "vector_math.h"

namespace {

using contrastile::cpu::Accumulate;
using contrastile::cpu::ElementType;
using contrastile::cpu::Strided;

// Sums that stay in registers: 12 of 16 vectors, or 24 of the 32 that AVX-512
// has.
inline constexpr int panel_rows = vector_bytes == 64 ? 12 : 6;
inline constexpr int panel_vectors = 2;
template <class Real>
inline constexpr int panel_cols = panel_vectors * Lanes<Real>::count;

template <class Real>
inline void multiply_panel(std::int64_t depth, const Real* a, const Real* b, Real* target, std::int64_t stride,
                           std::int64_t rows, std::int64_t cols, Accumulate accumulate) {
  constexpr int lanes = Lanes<Real>::count;
  Vec<Real> sum[panel_rows][panel_vectors];
#pragma GCC unroll 16
  for (int i = 0; i < panel_rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < panel_vectors; ++v) sum[i][v] = Vec<Real>{};
#pragma GCC unroll 4
  for (std::int64_t k = 0; k < depth; ++k) {
    const Vec<Real> b0 = load(b);
    const Vec<Real> b1 = load(b + lanes);
#pragma GCC unroll 16
    for (int i = 0; i < panel_rows; ++i) {
      const Vec<Real> factor = splat<Real>(a[i]);
      sum[i][0] += factor * b0;
      sum[i][1] += factor * b1;
    }
    a += panel_rows;
    b += panel_cols<Real>;
  }
  if (rows == panel_rows && cols == panel_cols<Real>) {
#pragma GCC unroll 16
    for (int i = 0; i < panel_rows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < panel_vectors; ++v) {
        Real* to = target + i * stride + v * lanes;
        store(to, accumulate == Accumulate::yes ? load(to) + sum[i][v] : sum[i][v]);
      }
    return;
  }
  Real block[panel_rows][panel_cols<Real>];
#pragma GCC unroll 16
  for (int i = 0; i < panel_rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < panel_vectors; ++v) store(&block[i][v * lanes], sum[i][v]);
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < cols; ++j)
      target[i * stride + j] = accumulate == Accumulate::yes ? target[i * stride + j] + block[i][j] : block[i][j];
}

template <class Real>
void multiply(std::int64_t rows, std::int64_t cols, std::int64_t depth, const Real* a, const Real* b, Real* target,
              std::int64_t stride, Accumulate accumulate) {
  for (std::int64_t j = 0; j < cols; j += panel_cols<Real>)
    for (std::int64_t i = 0; i < rows; i += panel_rows)
      multiply_panel<Real>(depth, a + i * depth, b + j * depth, target + i * stride + j, stride,
                           rows - i < panel_rows ? rows - i : panel_rows,
                           cols - j < panel_cols<Real> ? cols - j : panel_cols<Real>, accumulate);
}

inline float float_from_bits(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// How an element in memory becomes a Real.
template <class Real>
struct Same {
  using Stored = Real;
  static Real convert(Real value) { return value; }
};

struct Bfloat16 {
  using Stored = std::uint16_t;
  static float convert(std::uint16_t bits) { return float_from_bits(std::uint32_t(bits) << 16); }
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
};

// lines x depth in memory, depth contiguous -> panels [line /
// width][depth][width], short ones padded with 0.
template <class Real, class Element, int width>
void pack_lines_of(Strided source, std::int64_t lines, std::int64_t depth, Real* panels) {
  using Stored = typename Element::Stored;
  const auto* data = static_cast<const Stored*>(source.data);
  for (std::int64_t first = 0; first < lines; first += width, panels += depth * width) {
    const std::int64_t count = lines - first < width ? lines - first : width;
    const Stored* from = data + first * source.stride;
    if (count == width) {
      // Eight columns of every line at a time: whole cache lines are read, and
      // written.
      std::int64_t k = 0;
      for (; k + 8 <= depth; k += 8)
        for (int line = 0; line < width; ++line)
#pragma GCC unroll 8
          for (int q = 0; q < 8; ++q)
            panels[(k + q) * width + line] = Element::convert(from[line * source.stride + k + q]);
      for (; k < depth; ++k)
        for (int line = 0; line < width; ++line)
          panels[k * width + line] = Element::convert(from[line * source.stride + k]);
    } else {
      for (std::int64_t k = 0; k < depth; ++k)
        for (int line = 0; line < width; ++line)
          panels[k * width + line] = line < count ? Element::convert(from[line * source.stride + k]) : Real(0);
    }
  }
}

// depth x lines in memory, lines contiguous -> the same panels.
template <class Real, class Element, int width>
void pack_columns_of(Strided source, std::int64_t lines, std::int64_t depth, Real* panels) {
  using Stored = typename Element::Stored;
  const auto* data = static_cast<const Stored*>(source.data);
  for (std::int64_t first = 0; first < lines; first += width, panels += depth * width) {
    const std::int64_t count = lines - first < width ? lines - first : width;
    for (std::int64_t k = 0; k < depth; ++k) {
      const Stored* from = data + k * source.stride + first;
      Real* to = panels + k * width;
      if (count == width) {
#pragma GCC unroll 32
        for (int line = 0; line < width; ++line) to[line] = Element::convert(from[line]);
      } else {
        for (int line = 0; line < width; ++line) to[line] = line < count ? Element::convert(from[line]) : Real(0);
      }
    }
  }
}

template <class Real, int width>
void pack_lines(Strided source, std::int64_t lines, std::int64_t depth, Real* panels) {
  if constexpr (sizeof(Real) == sizeof(float)) {
    if (source.type == ElementType::bfloat16) return pack_lines_of<Real, Bfloat16, width>(source, lines, depth, panels);
    if (source.type == ElementType::float16) return pack_lines_of<Real, Float16, width>(source, lines, depth, panels);
  }
  pack_lines_of<Real, Same<Real>, width>(source, lines, depth, panels);
}

template <class Real, int width>
void pack_columns(Strided source, std::int64_t lines, std::int64_t depth, Real* panels) {
  if constexpr (sizeof(Real) == sizeof(float)) {
    if (source.type == ElementType::bfloat16)
      return pack_columns_of<Real, Bfloat16, width>(source, lines, depth, panels);
    if (source.type == ElementType::float16) return pack_columns_of<Real, Float16, width>(source, lines, depth, panels);
  }
  pack_columns_of<Real, Same<Real>, width>(source, lines, depth, panels);
}

template <class Real>
constexpr contrastile::cpu::ProductKernels<Real> all_kernels() {
  return {panel_rows,
          panel_cols<Real>,
          pack_lines<Real, panel_rows>,
          pack_lines<Real, panel_cols<Real>>,
          pack_columns<Real, panel_rows>,
          pack_columns<Real, panel_cols<Real>>,
          multiply<Real>};
}

}  // namespace

namespace contrastile::cpu::CONTRASTILE_ISA {

extern const ProductKernels<float> product_kernels_single;
extern const ProductKernels<double> product_kernels_double;
const ProductKernels<float> product_kernels_single = all_kernels<float>();
const ProductKernels<double> product_kernels_double = all_kernels<double>();

}  // namespace contrastile::cpu::CONTRASTILE_ISA
