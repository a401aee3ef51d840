// Matrix products of packed panels, compiled once per instruction set
// (CONTRASTILE_ISA names it).
//
// work   2 m n k flop; a block of panel_rows x panel_cols sums stays in
//        registers over k
// reads  2 + panel_rows loads for 2 panel_rows fused multiply-adds on vectors; a
//        panel of a stays in the first-level cache while it meets every panel of
//        b, which come from the second
// bound  the multiply-add units
#include "product_kernels.h"

#include "elements.h"
#include "vector_math.h"

namespace {

using contrastile::cpu::Accumulate;
using contrastile::cpu::Layout;
using contrastile::cpu::LeftOperand;
using contrastile::cpu::Strided;

// Sums that stay in registers: 12 of 16 vectors, or 24 of the 32 that AVX-512
// has.
inline constexpr int panel_rows = vector_bytes == 64 ? 12 : 6;
inline constexpr int panel_vectors = 2;
template <class Real>
inline constexpr int panel_cols = panel_vectors * Lanes<Real>::count;

// Advances through the depth of `rows` rows of the left operand.
template <class Real, Layout layout, int rows>
class LeftPanel {
 public:
  LeftPanel(LeftOperand<Real> a, std::int64_t row, std::int64_t depth) : stride_(a.stride) {
    if constexpr (layout == Layout::by_lines) {
#pragma GCC unroll 4
      for (int g = 0; g < groups; ++g) at_[g] = a.data + (row + g * group) * a.stride;
    } else if constexpr (layout == Layout::by_columns) {
      at_[0] = a.data + row;
    } else {
      at_[0] = a.data + row * depth;
      stride_ = panel_rows;
    }
  }

  Real operator[](int i) const {
    if constexpr (layout == Layout::by_lines) return at_[i / group][i % group * stride_];
    return at_[0][i];
  }

  void advance() {
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) at_[g] += layout == Layout::by_lines ? 1 : stride_;
  }

 private:
  // A pointer for every few lines: their addresses then take one stride and its multiples.
  static constexpr int group = layout != Layout::by_lines ? rows : rows % 4 ? 2 : 4;
  static constexpr int groups = rows / group;
  const Real* at_[groups];
  std::int64_t stride_;
};

// kept: rows of the target, of the block's, that are there; likewise cols.
template <class Real, Layout layout, int block_rows>
inline void multiply_panel(LeftPanel<Real, layout, block_rows> a, std::int64_t depth, const Real* b, Real* target,
                           std::int64_t stride, std::int64_t kept, std::int64_t cols, Accumulate accumulate) {
  constexpr int lanes = Lanes<Real>::count;
  Vec<Real> sum[block_rows][panel_vectors];
#pragma GCC unroll 16
  for (int i = 0; i < block_rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < panel_vectors; ++v) sum[i][v] = Vec<Real>{};
#pragma GCC unroll 16
  for (int i = 0; i < block_rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < panel_vectors; ++v) __builtin_prefetch(target + (i < kept ? i : 0) * stride + v * lanes, 1);
#pragma GCC unroll 4
  for (std::int64_t k = 0; k < depth; ++k) {
    const Vec<Real> b0 = load(b);
    const Vec<Real> b1 = load(b + lanes);
#pragma GCC unroll 16
    for (int i = 0; i < block_rows; ++i) {
      const Vec<Real> factor = splat<Real>(a[i]);
      sum[i][0] += factor * b0;
      sum[i][1] += factor * b1;
    }
    a.advance();
    b += panel_cols<Real>;
  }
  if (kept == block_rows && cols == panel_cols<Real>) {
#pragma GCC unroll 16
    for (int i = 0; i < block_rows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < panel_vectors; ++v) {
        Real* to = target + i * stride + v * lanes;
        store(to, accumulate == Accumulate::yes ? load(to) + sum[i][v] : sum[i][v]);
      }
    return;
  }
  Real block[block_rows][panel_cols<Real>];
#pragma GCC unroll 16
  for (int i = 0; i < block_rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < panel_vectors; ++v) store(&block[i][v * lanes], sum[i][v]);
  for (std::int64_t i = 0; i < kept; ++i)
    for (std::int64_t j = 0; j < cols; ++j)
      target[i * stride + j] = accumulate == Accumulate::yes ? target[i * stride + j] + block[i][j] : block[i][j];
}

// Coefficients were written one phase before the product for dX, and may have left every cache since.
template <class Real>
inline void prefetch_lines(LeftOperand<Real> a, std::int64_t begin, std::int64_t rows, std::int64_t depth) {
  constexpr int cache_line = 64 / sizeof(Real);
  const std::int64_t end = rows - begin < panel_rows ? rows : begin + panel_rows;
  for (std::int64_t i = begin; i < end; ++i)
    for (std::int64_t k = 0; k < depth; k += cache_line) __builtin_prefetch(a.data + i * a.stride + k);
}

template <class Real, Layout layout>
void multiply_as(std::int64_t rows, std::int64_t cols, std::int64_t depth, LeftOperand<Real> a, const Real* b,
                 Real* target, std::int64_t stride, Accumulate accumulate) {
  constexpr int third = panel_rows / 3;
  for (std::int64_t i = 0; i < rows; i += panel_rows) {
    if constexpr (layout == Layout::by_lines) prefetch_lines(a, i + panel_rows, rows, depth);
    const auto multiply_rows = [&]<int block_rows>() {
      const std::int64_t kept = rows - i < block_rows ? rows - i : block_rows;
      for (std::int64_t j = 0; j < cols; j += panel_cols<Real>)
        multiply_panel<Real, layout, block_rows>({a, i, depth}, depth, b + j * depth, target + i * stride + j, stride,
                                                 kept, cols - j < panel_cols<Real> ? cols - j : panel_cols<Real>,
                                                 accumulate);
    };
    // Few rows at the end take no longer than they must.
    if (rows - i > 2 * third)
      multiply_rows.template operator()<panel_rows>();
    else if (rows - i > third)
      multiply_rows.template operator()<2 * third>();
    else
      multiply_rows.template operator()<third>();
  }
}

template <class Real>
void multiply(std::int64_t rows, std::int64_t cols, std::int64_t depth, LeftOperand<Real> a, const Real* b,
              Real* target, std::int64_t stride, Accumulate accumulate) {
  switch (a.layout) {
    case Layout::packed:
      return multiply_as<Real, Layout::packed>(rows, cols, depth, a, b, target, stride, accumulate);
    case Layout::by_lines:
      return multiply_as<Real, Layout::by_lines>(rows, cols, depth, a, b, target, stride, accumulate);
    case Layout::by_columns:
      return multiply_as<Real, Layout::by_columns>(rows, cols, depth, a, b, target, stride, accumulate);
  }
}

template <class Real>
struct QuadOf {
  typedef Real type __attribute__((vector_size(4 * sizeof(Real))));
};
template <class Real>
using Quad = typename QuadOf<Real>::type;

// Four columns of four or two lines, transposed in registers.
template <class Real, class Element, int lines>
inline void transpose_quad(const typename Element::Stored* from, std::int64_t stride, Real* to,
                           std::int64_t to_stride) {
  static_assert(lines == 4 || lines == 2);
  Quad<Real> line[lines];
#pragma GCC unroll 4
  for (int i = 0; i < lines; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) line[i][k] = Element::convert(from[i * stride + k]);
  const Quad<Real> low = {line[0][0], line[1][0], line[0][1], line[1][1]};
  const Quad<Real> high = {line[0][2], line[1][2], line[0][3], line[1][3]};
  if constexpr (lines == 2) {
    __builtin_memcpy(to, &low, sizeof low / 2);
    __builtin_memcpy(to + to_stride, reinterpret_cast<const Real*>(&low) + 2, sizeof low / 2);
    __builtin_memcpy(to + 2 * to_stride, &high, sizeof high / 2);
    __builtin_memcpy(to + 3 * to_stride, reinterpret_cast<const Real*>(&high) + 2, sizeof high / 2);
  } else {
    const Quad<Real> next_low = {line[2][0], line[3][0], line[2][1], line[3][1]};
    const Quad<Real> next_high = {line[2][2], line[3][2], line[2][3], line[3][3]};
    const Quad<Real> columns[4] = {{low[0], low[1], next_low[0], next_low[1]},
                                   {low[2], low[3], next_low[2], next_low[3]},
                                   {high[0], high[1], next_high[0], next_high[1]},
                                   {high[2], high[3], next_high[2], next_high[3]}};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) __builtin_memcpy(to + k * to_stride, &columns[k], sizeof columns[k]);
  }
}

// lines x depth in memory, depth contiguous -> panels [line /
// width][depth][width], short ones padded with 0.
template <class Real, class Element, int width>
void pack_lines_of(Strided source, std::int64_t lines, std::int64_t depth, Real* panels) {
  using Stored = typename Element::Stored;
  const auto* data = static_cast<const Stored*>(source.data);
  constexpr int columns = 16;  // of every line at a time: a cache line of it
  for (std::int64_t first = 0; first < lines; first += width, panels += depth * width) {
    const std::int64_t count = lines - first < width ? lines - first : width;
    const Stored* from = data + first * source.stride;
    std::int64_t k = 0;
    for (; count == width && k + columns <= depth; k += columns) {
      constexpr int by_four = width / 4 * 4;
      for (int line = 0; line < by_four; line += 4)
        for (std::int64_t q = k; q < k + columns; q += 4)
          transpose_quad<Real, Element, 4>(from + line * source.stride + q, source.stride, panels + q * width + line,
                                           width);
      if constexpr (by_four < width)
        for (std::int64_t q = k; q < k + columns; q += 4)
          transpose_quad<Real, Element, width - by_four>(from + by_four * source.stride + q, source.stride,
                                                         panels + q * width + by_four, width);
    }
    for (; k < depth; ++k)
      for (int line = 0; line < width; ++line)
        panels[k * width + line] = line < count ? Element::convert(from[line * source.stride + k]) : Real(0);
  }
}

// depth x lines in memory, lines contiguous -> the same panels. A few rows at a
// time: read whole, as the processor foresees, they are too few for their
// places in the panels, which are a large power of two apart, to contend for
// the first-level cache.
template <class Real, class Element, int width>
void pack_columns_of(Strided source, std::int64_t lines, std::int64_t depth, Real* panels) {
  using Stored = typename Element::Stored;
  const auto* data = static_cast<const Stored*>(source.data);
  const std::int64_t whole = lines / width * width;
  constexpr std::int64_t rows = 8;
  for (std::int64_t begin = 0; begin < depth; begin += rows) {
    const std::int64_t end = depth - begin < rows ? depth : begin + rows;
    for (std::int64_t first = 0; first < whole; first += width)
      for (std::int64_t k = begin; k < end; ++k) {
        const Stored* from = data + k * source.stride + first;
        Real* to = panels + first * depth + k * width;
#pragma GCC unroll 32
        for (int line = 0; line < width; ++line) to[line] = Element::convert(from[line]);
      }
    for (std::int64_t k = begin; k < end && whole < lines; ++k)
      for (int line = 0; line < width; ++line)
        panels[whole * depth + k * width + line] =
            whole + line < lines ? Element::convert(data[k * source.stride + whole + line]) : Real(0);
  }
}

template <class Real, class Element>
Real dot_of(const void* a, const void* b, std::int64_t depth) {
  constexpr int chains = 4 * Lanes<Real>::count;
  const auto* left = static_cast<const typename Element::Stored*>(a);
  const auto* right = static_cast<const typename Element::Stored*>(b);
  Real sum[chains] = {};
  std::int64_t k = 0;
  for (; k + chains <= depth; k += chains)
#pragma GCC unroll 64
    for (int c = 0; c < chains; ++c) sum[c] += Element::convert(left[k + c]) * Element::convert(right[k + c]);
  for (int c = 0; k < depth; ++k, ++c) sum[c] += Element::convert(left[k]) * Element::convert(right[k]);
  for (int half = chains / 2; half > 0; half /= 2)
    for (int c = 0; c < half; ++c) sum[c] += sum[c + half];
  return sum[0];
}

template <class Real>
Real dot(const void* a, const void* b, std::int64_t depth, ElementType type) {
  return with_element<Real>(type, [&]<class Element>() { return dot_of<Real, Element>(a, b, depth); });
}

template <class Real, int width>
void pack_lines(Strided source, std::int64_t lines, std::int64_t depth, Real* panels) {
  with_element<Real>(source.type,
                     [&]<class Element>() { pack_lines_of<Real, Element, width>(source, lines, depth, panels); });
}

template <class Real, int width>
void pack_columns(Strided source, std::int64_t lines, std::int64_t depth, Real* panels) {
  with_element<Real>(source.type,
                     [&]<class Element>() { pack_columns_of<Real, Element, width>(source, lines, depth, panels); });
}

template <class Real>
constexpr contrastile::cpu::ProductKernels<Real> all_kernels() {
  return {panel_rows,
          panel_cols<Real>,
          pack_lines<Real, panel_rows>,
          pack_lines<Real, panel_cols<Real>>,
          pack_columns<Real, panel_cols<Real>>,
          multiply<Real>,
          dot<Real>};
}

}  // namespace

namespace contrastile::cpu::CONTRASTILE_ISA {

extern const ProductKernels<float> product_kernels_single;
extern const ProductKernels<double> product_kernels_double;
const ProductKernels<float> product_kernels_single = all_kernels<float>();
const ProductKernels<double> product_kernels_double = all_kernels<double>();

}  // namespace contrastile::cpu::CONTRASTILE_ISA
