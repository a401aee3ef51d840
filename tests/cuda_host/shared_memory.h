// Loads and stores, of shared memory with its bounds, races and banks, of global memory with its alignment.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "block.h"

namespace contrastile::host {

inline constexpr int poison = 0xff;  // a NaN in bf16, f16 and fp32

inline void require_aligned(const void* address, std::size_t bytes, const char* memory, const Place& place) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0)
    block->fail("misaligned access to " + std::string(memory) + " memory at " + text(place) + ": " +
                std::to_string(bytes) + " bytes, " +
                std::to_string(reinterpret_cast<std::uintptr_t>(address) % bytes) + " past a multiple");
}

// Where an aligned access of `bytes` lies in the block's shared memory.
inline std::size_t shared_offset(const void* address, std::size_t bytes, const Place& place) {
  const auto start = reinterpret_cast<std::uintptr_t>(block->shared);
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  if (at < start || at + bytes > start + block->shared_bytes)
    block->fail("access outside shared memory at " + text(place) + ": " + std::to_string(bytes) + " bytes at offset " +
                std::to_string(static_cast<std::int64_t>(at - start)) + " of " + std::to_string(block->shared_bytes));
  require_aligned(address, bytes, "shared", place);
  return at - start;
}

inline void fail_on(const std::optional<Races::Conflict>& conflict, int thread, const char* access,
                    const Place& place) {
  if (!conflict) return;
  block->fail_for(block->threads[thread], "race: " + std::string(access) + " at " + text(place) + " of shared memory at offset " +
              std::to_string(conflict->offset) + " conflicts with a " +
              (conflict->in_flight ? "cp.async in flight" : conflict->other_wrote ? "write" : "read") + " by thread " +
              std::to_string(conflict->other) + (conflict->in_flight ? "" : " with no barrier between"));
}

inline void note_read(int thread, std::size_t offset, std::size_t bytes, const char* access, const Place& place) {
  if constexpr (checks)
    fail_on(block->races.read(thread, offset, bytes, block->report.unwritten_bytes_read), thread, access, place);
}

inline void note_write(int thread, std::size_t offset, std::size_t bytes, const char* access, const Place& place) {
  if constexpr (checks) fail_on(block->races.write(thread, offset, bytes), thread, access, place);
}

inline void note_banks(std::size_t offset, std::size_t bytes, bool store, const Place& place) {
  if constexpr (checks)
    block->warp().banks.record(block->running->lane(), static_cast<std::uint32_t>(offset), static_cast<int>(bytes),
                               store, place);
}

template <typename T>
constexpr void require_one_access() {
  static_assert(std::is_trivially_copyable_v<T>);
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
}

// Threads run one at a time, so plain additions are atomic; the returned value is what was there before.
template <typename T>
T add_atomically(T* address, T value, const Place& place) {
  require_aligned(address, sizeof(T), "global", place);
  block->maybe_give_way();
  const T before = *address;
  *address = before + value;
  return before;
}
}  // namespace contrastile::host

namespace contrastile::device {

inline int thread_id() { return host::block->running->index; }
inline int lane_id() { return host::block->running->lane(); }
inline int warp_id() { return host::block->running->warp(); }

template <typename T>
T* dynamic_shared(int offset = 0, host::Place place = host::Place::current()) {
  char* address = host::block->shared + offset;
  if (offset < 0 || static_cast<std::size_t>(offset) > host::block->shared_bytes)
    host::block->fail("dynamic_shared at " + host::text(place) + ": offset " + std::to_string(offset) + " of " +
                      std::to_string(host::block->shared_bytes) + " bytes");
  host::require_aligned(address, alignof(T), "shared", place);
  return reinterpret_cast<T*>(address);
}

template <typename T>
T load_shared(const T* address, host::Place place = host::Place::current()) {
  host::require_one_access<T>();
  const std::size_t offset = host::shared_offset(address, sizeof(T), place);
  host::block->maybe_give_way();
  host::note_read(host::block->running->index, offset, sizeof(T), "load_shared", place);
  host::note_banks(offset, sizeof(T), false, place);
  return *address;
}

template <typename T>
void store_shared(T* address, std::type_identity_t<T> value, host::Place place = host::Place::current()) {
  host::require_one_access<T>();
  const std::size_t offset = host::shared_offset(address, sizeof(T), place);
  host::block->maybe_give_way();
  host::note_write(host::block->running->index, offset, sizeof(T), "store_shared", place);
  host::note_banks(offset, sizeof(T), true, place);
  *address = value;
}

template <typename T>
T load_global(const T* address, host::Place place = host::Place::current()) {
  host::require_one_access<T>();
  host::require_aligned(address, sizeof(T), "global", place);
  return *address;
}

template <typename T>
void store_global(T* address, std::type_identity_t<T> value, host::Place place = host::Place::current()) {
  host::require_one_access<T>();
  host::require_aligned(address, sizeof(T), "global", place);
  *address = value;
}

inline float atomic_add(float* address, float value, host::Place place = host::Place::current()) {
  return host::add_atomically(address, value, place);
}
inline unsigned atomic_add(unsigned* address, unsigned value, host::Place place = host::Place::current()) {
  return host::add_atomically(address, value, place);
}
inline unsigned long long atomic_add(unsigned long long* address, unsigned long long value,
                                     host::Place place = host::Place::current()) {
  return host::add_atomically(address, value, place);
}
inline void thread_fence() { host::block->maybe_give_way(); }

}  // namespace contrastile::device
