// A block of threads: who runs, who waits for what, and what stops the launch.
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "banks.h"
#include "fibers.h"
#include "races.h"
#include "report.h"
#include "words.h"

namespace contrastile::host {

inline constexpr int lanes_per_warp = 32;

// A cp.async between its issue and the wait that covers it.
struct Copy {
  char* destination;
  const char* source;
  int bytes, source_bytes;
  std::uint64_t group;
  Place place;
};

struct Thread {
  enum class State { ready, waiting, exited };

  Fiber fiber;
  int index = 0;
  uint3 id{};
  State state = State::ready;
  const char* operation = "";  // that it waits at
  Place place;
  std::deque<Copy> copies;  // oldest first
  std::uint64_t open_group = 0;

  int warp() const { return index / lanes_per_warp; }
  int lane() const { return index % lanes_per_warp; }
};

// Lanes of a warp that have come to one instruction, with their operands on their stacks.
struct Meeting {
  unsigned lanes = 0, arrived = 0;
  const char* operation = "";
  Place place;
  const void* kind = nullptr;
  std::array<void*, lanes_per_warp> operands{};
};

struct Warp {
  std::vector<Meeting> meetings = std::vector<Meeting>(lanes_per_warp);
  BankLog banks;
};

struct Barrier {
  int expected = 0;
  std::vector<Thread*> arrived;
  std::vector<Thread*> waiting;
  Clock clock;
};

class Block {
 public:
  Block(std::string kernel, dim3 shape, std::size_t bytes, std::vector<Stack>& stacks)
      : kernel_(std::move(kernel)),
        shape_(shape),
        threads(shape.x * shape.y * shape.z),
        warps(threads.size() / lanes_per_warp),
        races(static_cast<int>(threads.size()), bytes),
        shared_bytes(bytes),
        stacks_(stacks),
        random_(settings.seed) {}

  // Runs `body` once a thread, from fresh shared memory; throws what the first thread to fail threw.
  void run(uint3 id, char* shared_memory, const std::function<void()>& body);

  [[noreturn]] void fail_for(const Thread& thread, const std::string& what) const {
    throw KernelFailure(kernel_ + ", block " + text(id_) + ", thread " + text(thread.id) + ": " + what);
  }
  [[noreturn]] void fail(const std::string& what) const { fail_for(*running, what); }

  // The running thread stops here until another wakes it.
  void wait(const char* operation, const Place& place) {
    running->state = Thread::State::waiting;
    running->operation = operation;
    running->place = place;
    give_way();
  }
  void wake(Thread& thread) {
    thread.state = Thread::State::ready;
    ready_.push_back(&thread);
  }

  // In random order any access may be followed by another thread's.
  void maybe_give_way() {
    if (!settings.random_threads || random_() % 8 != 0) return;
    ready_.push_back(running);
    give_way();
  }

  Warp& warp() { return warps[running->warp()]; }
  void settle_banks() {
    for (Warp& each : warps) each.banks.settle(report);
  }

  static std::string text(uint3 id) {
    return "(" + std::to_string(id.x) + ", " + std::to_string(id.y) + ", " + std::to_string(id.z) + ")";
  }

 private:
  void give_way() {
    Thread& self = *running;
    switch_fiber(self.fiber, scheduler_);
  }
  Thread& next();
  void start(Thread& thread);
  void fail_if_any_waits();
  static void thread_main();

  std::string kernel_;
  dim3 shape_;
  uint3 id_{};

 public:
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::array<Barrier, 16> barriers;
  Races races;
  char* shared = nullptr;
  std::size_t shared_bytes;
  Thread* running = nullptr;
  Report report;

 private:
  std::vector<Stack>& stacks_;
  std::mt19937_64 random_;
  std::deque<Thread*> ready_;
  Fiber scheduler_;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr failure_;
};

inline Block* block = nullptr;  // the one that runs

inline void Block::thread_main() {
  arrive_on_fiber(block->running->fiber, block->scheduler_);
  try {
    (*block->body_)();
  } catch (...) {
    block->failure_ = std::current_exception();
  }
  Thread& self = *block->running;
  self.state = Thread::State::exited;
  leave_fiber(self.fiber, block->scheduler_);
}

inline void Block::start(Thread& thread) {
  const int index = thread.index;
  const auto [x, y, z] = shape_;
  thread.id = {index % x, index / x % y, index / (x * y)};
  thread.state = Thread::State::ready;
  thread.copies.clear();
  thread.open_group = 0;
  thread.fiber.prepare(stacks_[index], &Block::thread_main);
  ready_.push_back(&thread);
}

inline Thread& Block::next() {
  if (settings.random_threads) std::swap(ready_.front(), ready_[random_() % ready_.size()]);
  Thread& chosen = *ready_.front();
  ready_.pop_front();
  return chosen;
}

inline void Block::run(uint3 id, char* shared_memory, const std::function<void()>& body) {
  block = this;
  id_ = id;
  shared = shared_memory;
  body_ = &body;
  races.restart();
  for (std::size_t i = 0; i < threads.size(); ++i) {
    threads[i].index = static_cast<int>(i);
    start(threads[i]);
  }
  while (!ready_.empty()) {
    running = &next();
    threadIdx = running->id;
    ++report.switches;
    switch_fiber(scheduler_, running->fiber);
    if (failure_) std::rethrow_exception(failure_);
  }
  fail_if_any_waits();
  settle_banks();
  for (const Thread& thread : threads) report.copies_never_waited_for += thread.copies.size();
  for (Barrier& barrier : barriers) barrier = {};
}

// Nobody is ready: either all have left, or the rest wait for someone who does not come.
inline void Block::fail_if_any_waits() {
  std::map<std::string, std::vector<int>> waiting;
  int left = 0;
  for (const Thread& thread : threads) {
    if (thread.state == Thread::State::exited)
      ++left;
    else
      waiting[std::string(thread.operation) + " at " + host::text(thread.place)].push_back(thread.index);
  }
  if (waiting.empty()) return;
  std::string what = "threads wait for others that do not come:";
  for (const auto& [where, indices] : waiting) {
    what += " " + std::to_string(indices.size()) + " in " + where + " (thread " + std::to_string(indices.front()) +
            (indices.size() > 1 ? " and others)," : "),");
  }
  fail_for(threads[waiting.begin()->second.front()], what + " " + std::to_string(left) + " have exited");
}

}  // namespace contrastile::host
