// One aligned allocation, handed out in pieces and given back at the end of a
// sweep.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "embeddings.h"

namespace contrastile::cpu {

// Memory for one sweep, of which one buffer is kept for the next: the system
// clears every page that it hands out, which takes it some 10 ms for 64 MiB
// and, for a few hundred rows, as long as a product. Large buffers are in huge
// pages, and while one is kept the system may put its pages to other use.
class Buffer {
 public:
  explicit Buffer(std::int64_t bytes) : block_(take_kept(bytes)) {
    if (block_.memory) return;
    const std::int64_t alignment = bytes >= large ? huge_page : page;
    block_.bytes = round_up(bytes, alignment);
    block_.memory = std::aligned_alloc(alignment, block_.bytes);
    if (!block_.memory) throw std::bad_alloc();
#if defined(__linux__)
    if (bytes >= large) madvise(block_.memory, block_.bytes, MADV_HUGEPAGE);
#endif
  }

  ~Buffer() {
#if defined(MADV_FREE)
    if (block_.bytes >= large) madvise(block_.memory, block_.bytes, MADV_FREE);
#endif
    keep(block_);
    std::free(block_.memory);
  }

  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* memory() const { return block_.memory; }

  static void release_kept() {
    Block released{};
    keep(released);
    std::free(released.memory);
  }

 private:
  static constexpr std::int64_t page = 4096;
  static constexpr std::int64_t huge_page = std::int64_t(1) << 21;
  static constexpr std::int64_t large = 2 * huge_page;

  struct Block {
    void* memory;
    std::int64_t bytes;
  };

  // Never waits: who finds the lock taken, by another thread or at a fork, does
  // without.
  static Block take_kept(std::int64_t bytes) {
    const std::unique_lock lock(kept_lock, std::try_to_lock);
    return lock && kept.bytes >= bytes ? std::exchange(kept, Block{}) : Block{};
  }

  // Leaves in `block` what is to be freed.
  static void keep(Block& block) {
    const std::unique_lock lock(kept_lock, std::try_to_lock);
    if (lock) std::swap(kept, block);
  }

  static inline std::mutex kept_lock;
  static inline Block kept{};

  Block block_;
};

template <class Real>
class Workspace {
 public:
  explicit Workspace(std::int64_t elements)
      : buffer_(elements * std::int64_t(sizeof(Real))), next_(static_cast<Real*>(buffer_.memory())) {}

  // Pieces start on a cache line.
  Real* take(std::int64_t elements) {
    Real* piece = next_;
    next_ += round_up(elements, 64 / sizeof(Real));
    return piece;
  }

 private:
  Buffer buffer_;
  Real* next_;
};

}  // namespace contrastile::cpu
