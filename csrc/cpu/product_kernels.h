// Matrix products over packed panels.
//
// target (rows, cols) = a (rows, depth) * b (depth, cols). Operands are first
// copied into panels: a_panels [rows / panel_rows][depth][panel_rows], b_panels
// [cols / panel_cols][depth][panel_cols], the last one padded with zeros. The
// sweeps pack an operand once and use it for many products, which is what a
// general matrix product, called tile by tile, cannot do.
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

template <class Real>
struct ProductKernels {
  // (source, lines, depth, panels). by_lines: source is (lines, depth);
  // by_columns: it is (depth, lines).
  using Pack = void (*)(Strided, std::int64_t lines, std::int64_t depth, Real* panels);

  std::int64_t panel_rows;
  std::int64_t panel_cols;
  Pack pack_a_by_lines;
  Pack pack_b_by_lines;
  Pack pack_a_by_columns;
  Pack pack_b_by_columns;
  void (*multiply)(std::int64_t rows, std::int64_t cols, std::int64_t depth, const Real* a_panels, const Real* b_panels,
                   Real* target, std::int64_t target_stride, Accumulate);
};

template <class Real>
const ProductKernels<Real>& product_kernels();

// Depth of a product that is done at a time: a panel of b then fills half of a
// first-level cache.
inline constexpr std::int64_t depth_block = 256;

// The largest panel_rows and panel_cols of any instruction set: blocks are
// multiples of both.
inline constexpr std::int64_t most_panel_rows = 12;
inline constexpr std::int64_t most_panel_cols = 32;

}  // namespace contrastile::cpu
