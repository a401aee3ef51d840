// Matrix products over packed panels.
//
// target (rows, cols) = a (rows, depth) * b (depth, cols). b is first copied
// into panels [cols / panel_cols][depth][panel_cols], the last one padded with
// zeros; a may be packed likewise, [rows / panel_rows][depth][panel_rows], or
// lie in memory as it is. The sweeps pack an operand once and use it for many
// products, and coefficients not at all, which is what a general matrix
// product, called tile by tile, cannot do.
#pragma once

#include <cstdint>

#include "embeddings.h"

namespace contrastile::cpu {

// A matrix in memory: unit stride within a line, `stride` elements between
// lines.
struct Strided {
  const void* data;
  std::int64_t stride;
  ElementType type;
};

enum class Accumulate { no, yes };

// Where the left operand's element (i, k) is. Fewer than panel_rows rows past
// the last are read too, whatever they hold.
enum class Layout {
  packed,      // in panels of panel_rows
  by_lines,    // data[i * stride + k]
  by_columns,  // data[k * stride + i]
};

template <class Real>
struct LeftOperand {
  const Real* data;
  std::int64_t stride;
  Layout layout;
};

template <class Real>
struct ProductKernels {
  // (source, lines, depth, panels). by_lines: source is (lines, depth);
  // by_columns: it is (depth, lines).
  using Pack = void (*)(Strided, std::int64_t lines, std::int64_t depth, Real* panels);

  std::int64_t panel_rows;
  std::int64_t panel_cols;
  Pack pack_a_by_lines;
  Pack pack_b_by_lines;
  Pack pack_b_by_columns;
  void (*multiply)(std::int64_t rows, std::int64_t cols, std::int64_t depth, LeftOperand<Real> a, const Real* b_panels,
                   Real* target, std::int64_t target_stride, Accumulate);
  // Of two rows of the same element type.
  Real (*dot)(const void* a, const void* b, std::int64_t depth, ElementType);
};

template <class Real>
const ProductKernels<Real>& product_kernels();

// Depth of the product for S that is done at a time: a tile's candidates then
// fill half of a second-level cache of 1 MiB.
inline constexpr std::int64_t depth_block = 512;

// The largest panel_rows and panel_cols of any instruction set: blocks are
// multiples of both.
inline constexpr std::int64_t most_panel_rows = 12;
inline constexpr std::int64_t most_panel_cols = 32;

}  // namespace contrastile::cpu
