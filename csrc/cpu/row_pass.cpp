#include "row_pass.h"

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "team.h"

namespace contrastile::cpu {

namespace {

// Fresh memory for gradients is handed out by the system page by page as it is first written, which takes longer than
// the pass itself; huge pages are few.
void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t huge_page = std::uintptr_t(1) << 21;
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t first = (begin + huge_page - 1) / huge_page * huge_page;
  const std::uintptr_t end = (begin + std::uintptr_t(bytes)) / huge_page * huge_page;
  if (memory && first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// values[row] = kernel(operands of the row, scratch), for every row.
template <class Real, class Kernel>
void for_each_row(const std::vector<RowInput>& inputs, Real* values, int threads, const Kernel& kernel) {
  constexpr std::int64_t rows_per_unit = 64;
  const EmbeddingView& first = inputs.front().rows;
  const std::int64_t units = ceil_div(first.rows, rows_per_unit);
  Team team(int(std::min<std::int64_t>(threads, units)));
  const std::int64_t size = row_kernels<Real>().scratch(first.depth);
  std::vector<Real> scratch(size * team.threads());
  for (const auto& [view, gradient] : inputs)
    prefer_huge_pages(gradient, view.rows * view.depth * view.element_bytes());
  team.for_each(units, [&](std::int64_t unit, int thread) {
    const std::int64_t end = std::min((unit + 1) * rows_per_unit, first.rows);
    for (std::int64_t row = unit * rows_per_unit; row < end; ++row) {
      RowOperands operands{};
      for (std::size_t i = 0; i < inputs.size(); ++i) {
        const auto& [view, gradient] = inputs[i];
        operands.inputs[i] = view.at(row, 0);
        if (gradient) operands.gradients[i] = static_cast<char*>(gradient) + row * view.depth * view.element_bytes();
      }
      values[row] = kernel(operands, row, scratch.data() + thread * size);
    }
  });
}

}  // namespace

template <class Real>
void bridge_rows(const std::vector<RowInput>& inputs, const Real* time, const Real* gain, Real* values, int threads) {
  const EmbeddingView& rows = inputs.front().rows;
  for_each_row(inputs, values, threads, [&](const RowOperands& operands, std::int64_t row, Real* scratch) {
    return row_kernels<Real>().bridge(operands, rows.depth, rows.type, time[row], gain[row], scratch);
  });
}

template <class Real>
void dot_product_rows(const std::vector<RowInput>& inputs, DotProducts kind, const Real* gain, Real* values,
                      int threads) {
  const EmbeddingView& rows = inputs.front().rows;
  for_each_row(inputs, values, threads, [&](const RowOperands& operands, std::int64_t row, Real* scratch) {
    return row_kernels<Real>().dot_products(operands, rows.depth, rows.type, kind, gain[row], scratch);
  });
}

#define CONTRASTILE_INSTANTIATE(Real)                                                                 \
  template void bridge_rows(const std::vector<RowInput>&, const Real*, const Real*, Real*, int);      \
  template void dot_product_rows(const std::vector<RowInput>&, DotProducts, const Real*, Real*, int);

CONTRASTILE_INSTANTIATE(float)
CONTRASTILE_INSTANTIATE(double)

}  // namespace contrastile::cpu
