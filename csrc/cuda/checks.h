// What a caller may get wrong, told before a launch: a device would report it under the name of a later call, or not.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "arguments.h"

namespace contrastile::cuda {

constexpr int row_alignment = 16;  // bytes

[[noreturn]] inline void refuse(const char* kernel, const Pairs& pairs, const std::string& why) {
  const auto shape = [&](int rows) { return "(" + std::to_string(rows) + ", " + std::to_string(pairs.depth) + ")"; };
  throw std::invalid_argument(std::string("CUDA kernel ") + kernel + " of anchors " + shape(pairs.rows) +
                              " and candidates " + shape(pairs.cols) + ": " + why);
}

inline void check_embeddings(const char* kernel, const Pairs& pairs) {
  const std::int64_t size = pairs.type == ElementType::float32 ? 4 : 2;
  const auto is_aligned = [&](const void* data, std::int64_t stride) {
    return reinterpret_cast<std::uintptr_t>(data) % row_alignment == 0 && stride * size % row_alignment == 0;
  };
  if (!is_aligned(pairs.anchors, pairs.anchor_stride) || !is_aligned(pairs.candidates, pairs.candidate_stride) ||
      pairs.depth * size % row_alignment != 0)
    refuse(kernel, pairs, "expected rows that start on 16 bytes and are multiples of that");
}

// `kind` is "rows" or "columns".
inline void check_side(const char* kernel, const Pairs& pairs, const char* kind, int first, int count, int all,
                       int tile) {
  const auto side = [&] {
    return std::string("a window of ") + kind + " from " + std::to_string(first) + " on, " + std::to_string(count);
  };
  if (first < 0 || count < 0 || count > all - first)
    refuse(kernel, pairs, side() + ": expected one within the " + std::to_string(all) + " that there are");
  if (count % tile != 0 && first + count != all)
    refuse(kernel, pairs, side() + ": expected a multiple of " + std::to_string(tile) + ", or an end with the problem");
}

// Of a launch by window, whose lines of sums are indexed by 32 bits.
inline void check_launch(const char* kernel, const Pairs& pairs, const Window& window, const Tiles& tile) {
  check_embeddings(kernel, pairs);
  check_side(kernel, pairs, "rows", window.first_row, window.rows, pairs.rows, tile.rows);
  check_side(kernel, pairs, "columns", window.first_col, window.cols, pairs.cols, tile.cols);
  const std::int64_t rows = window.rows, cols = window.cols;
  const std::int64_t by_column = (rows + tile.rows - 1) / tile.rows * cols;
  const std::int64_t by_row = (cols + tile.cols - 1) / tile.cols * rows;
  if (std::max(by_column, by_row) > std::numeric_limits<std::int32_t>::max())
    refuse(kernel, pairs, "a window of " + std::to_string(rows) + " x " + std::to_string(cols) +
                              " pairs: expected one whose tiles leave fewer than 2^31 sums");
}

inline bool is_empty(const Window& window) { return window.rows == 0 || window.cols == 0; }

}  // namespace contrastile::cuda
