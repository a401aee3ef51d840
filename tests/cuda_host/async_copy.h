// cp.async: the destination is poison from the issue to the wait that covers the copy, and only then is it written.
#pragma once

#include <cstring>
#include <string>

#include "shared_memory.h"

namespace contrastile::host {

inline void issue(void* shared, const void* global, int bytes, int source_bytes, const Place& place) {
  const std::size_t offset = shared_offset(shared, bytes, place);
  require_aligned(global, bytes, "global", place);
  if (source_bytes < 0 || source_bytes > bytes)
    block->fail("cp_async at " + text(place) + ": " + std::to_string(source_bytes) + " source bytes of " +
                std::to_string(bytes));
  block->maybe_give_way();
  Thread& self = *block->running;
  note_write(self.index, offset, bytes, "cp_async", place);
  block->races.take_off(offset, bytes);
  std::memset(shared, poison, bytes);
  self.copies.push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes, source_bytes,
                         self.open_group, place});
}

// Lands this thread's copies of the groups before `group`.
inline void land_before(std::uint64_t group) {
  block->maybe_give_way();
  Thread& self = *block->running;
  while (!self.copies.empty() && self.copies.front().group < group) {
    const Copy copy = self.copies.front();
    self.copies.pop_front();
    const std::size_t offset = copy.destination - block->shared;
    block->races.land(offset, copy.bytes);
    note_write(self.index, offset, copy.bytes, "cp_async landing", copy.place);
    std::memcpy(copy.destination, copy.source, copy.source_bytes);
    std::memset(copy.destination + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  }
}

}  // namespace contrastile::host

namespace contrastile::device {

template <int Bytes>
void cp_async(void* shared, const void* global, int source_bytes = Bytes, host::Place place = host::Place::current()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  host::issue(shared, global, Bytes, source_bytes, place);
}

inline void commit_group() { ++host::block->running->open_group; }

template <int Pending>
void wait_group(host::Place place = host::Place::current()) {
  static_assert(Pending >= 0);
  if (host::is_left_out(place)) return;
  const std::uint64_t open = host::block->running->open_group;
  host::land_before(open > Pending ? open - Pending : 0);
}

inline void wait_all(host::Place place = host::Place::current()) {
  commit_group();
  wait_group<0>(place);
}

}  // namespace contrastile::device
