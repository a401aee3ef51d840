// One aligned allocation, handed out in pieces and freed at the end of a sweep.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "embeddings.h"

namespace contrastile::cpu {

template <class Real>
class Workspace {
 public:
  explicit Workspace(std::int64_t elements) {
    // Huge pages: a 64 MiB buffer otherwise costs 16,384 page faults in every call. Small buffers come
    // from the heap, which hands out the same pages again.
    constexpr std::int64_t huge_page = std::int64_t(1) << 21;
    constexpr std::int64_t large = 8 * huge_page;
    const std::int64_t bytes = elements * std::int64_t(sizeof(Real));
    const std::int64_t alignment = bytes >= large ? huge_page : 64;
    memory_.reset(static_cast<Real*>(std::aligned_alloc(alignment, round_up(bytes, alignment))));
    if (!memory_) throw std::bad_alloc();
#if defined(__linux__)
    if (bytes >= large) madvise(memory_.get(), bytes, MADV_HUGEPAGE);
#endif
    next_ = memory_.get();
  }

  // Pieces start on a cache line.
  Real* take(std::int64_t elements) {
    Real* piece = next_;
    next_ += round_up(elements, 64 / sizeof(Real));
    return piece;
  }

 private:
  struct Free {
    void operator()(Real* memory) const { std::free(memory); }
  };
  std::unique_ptr<Real, Free> memory_;
  Real* next_;
};

}  // namespace contrastile::cpu
