// Block and named barriers, counted by thread as bar.sync and bar.arrive count them.
#pragma once

#include <string>

#include "block.h"

namespace contrastile::host {

// bar.sync and bar.arrive act for whole warps.
inline void require_whole_warps(int number, const Barrier& barrier) {
  std::vector<int> lanes(block->warps.size());
  for (const Thread* thread : barrier.arrived) ++lanes[thread->warp()];
  for (std::size_t warp = 0; warp < lanes.size(); ++warp)
    if (lanes[warp] % lanes_per_warp != 0)
      block->fail("barrier " + std::to_string(number) + " was reached by " + std::to_string(lanes[warp]) +
                  " lanes of warp " + std::to_string(warp) + ", not by all 32");
}

inline void come_to_barrier(const char* operation, int number, int threads, bool waits, const Place& place) {
  if (number < 0 || number >= static_cast<int>(block->barriers.size()))
    block->fail("barrier " + std::to_string(number) + " does not exist: there are 16");
  if (threads <= 0 || threads % lanes_per_warp != 0 || threads > static_cast<int>(block->threads.size()))
    block->fail("barrier " + std::to_string(number) + " for " + std::to_string(threads) + " threads of a block of " +
                std::to_string(block->threads.size()) + ": a multiple of 32 is needed");
  Barrier& barrier = block->barriers[number];
  Thread& self = *block->running;
  if (barrier.arrived.empty()) barrier.expected = threads;
  if (barrier.expected != threads)
    block->fail("barrier " + std::to_string(number) + " for " + std::to_string(threads) + " threads, but thread " +
                std::to_string(barrier.arrived.front()->index) + " came for " + std::to_string(barrier.expected));
  if (std::find(barrier.arrived.begin(), barrier.arrived.end(), &self) != barrier.arrived.end())
    block->fail("comes to barrier " + std::to_string(number) + " a second time before it has completed");
  barrier.arrived.push_back(&self);
  if (waits) barrier.waiting.push_back(&self);
  block->races.arrive(self.index, barrier.clock);

  if (static_cast<int>(barrier.arrived.size()) < threads) {
    if (waits) block->wait(operation, place);
    return;
  }
  require_whole_warps(number, barrier);
  for (Thread* thread : barrier.waiting) {
    block->races.depart(thread->index, barrier.clock);
    if (thread != &self) block->wake(*thread);
  }
  if (checks && threads == static_cast<int>(block->threads.size())) block->settle_banks();
  barrier = {};
}

}  // namespace contrastile::host

namespace contrastile::device {

inline void block_barrier(host::Place place = host::Place::current()) {
  using host::block;
  if (host::is_left_out(place)) return;
  const auto& waiting = block->barriers[0].waiting;
  if (!waiting.empty() && !host::same(waiting.front()->place, place))
    block->fail("divergent barrier: this thread is at " + host::text(place) + ", thread " +
                std::to_string(waiting.front()->index) + " at " + host::text(waiting.front()->place));
  host::come_to_barrier("block_barrier", 0, static_cast<int>(block->threads.size()), true, place);
}

inline void named_barrier(int number, int threads, host::Place place = host::Place::current()) {
  host::come_to_barrier("named_barrier", number, threads, true, place);
}

inline void named_barrier_arrive(int number, int threads, host::Place place = host::Place::current()) {
  host::come_to_barrier("named_barrier_arrive", number, threads, false, place);
}

}  // namespace contrastile::device
