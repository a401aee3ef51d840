// Which pairs of a tile are not negatives: positives, equal groups, logits above
// a ceiling, a sample and itself.
#pragma once

#include <algorithm>
#include <cstdint>

#include "running_sum.h"
#include "sweeps.h"
#include "vector_kernels.h"

namespace contrastile::cpu {

// work(i, j) for the positives among the tile's rows (positives of which begin
// at `positives`) and the columns [col, col + cols), both counted from the
// tile's own corner.
template <class Work>
void for_each_positive(const std::int64_t* positives, std::int64_t rows, std::int64_t col, std::int64_t cols,
                       const Work& work) {
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t j = positives[i] - col;
    if (j >= 0 && j < cols) work(i, j);
  }
}

// Sets what is no negative to -inf in a tile of unscaled products whose corner
// is (row, col). record(i, j, logit) is told of the positives.
template <class Real, class Record>
void mask(Tile<Real> dots, const PairProblem<Real>& problem, std::int64_t row, std::int64_t col, std::int64_t cols,
          const Record& record) {
  if (problem.positives) {
    for_each_positive(problem.positives + row, dots.rows, col, cols, [&](std::int64_t i, std::int64_t j) {
      Real& dot = dots.values[i * dots.width + j];
      record(i, j, dot * problem.scale[row + i]);
      dot = minus_infinity<Real>;
    });
  }
  if (problem.row_ceiling)
    vector_kernels<Real>().mask_above(dots, problem.scale + row, problem.row_ceiling + row, cols);
  if (problem.row_groups)
    vector_kernels<Real>().mask_equal_groups(dots, problem.row_groups + row, problem.col_groups + col, cols);
  if (problem.self_offset) {
    const std::int64_t first = row + *problem.self_offset - col;  // column of the first row's own sample
    for (std::int64_t i = std::max<std::int64_t>(0, -first); i < std::min(dots.rows, cols - first); ++i)
      dots.values[i * dots.width + first + i] = minus_infinity<Real>;
  }
}

}  // namespace contrastile::cpu
