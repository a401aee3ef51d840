// Threads for the length of one sweep.
//
// They are made when a sweep starts and joined when it ends: a fork in between
// (data loaders) never meets a pool whose threads it lacks, and no idle thread
// spins against the framework's own.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace contrastile::cpu {

class Team {
 public:
  explicit Team(int threads) {
    for (int id = 1; id < threads; ++id) helpers_.emplace_back([this, id] { help(id); });
  }

  ~Team() {
    work_ = nullptr;
    start_phase();
    for (std::thread& helper : helpers_) helper.join();
  }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return int(helpers_.size()) + 1; }

  // work(unit, thread) for every unit in [0, units), in no order; returns when
  // all are done. Which thread takes a unit must not matter to the result. work
  // must not throw.
  void for_each(std::int64_t units, const std::function<void(std::int64_t, int)>& work) {
    if (helpers_.empty() || units <= 1) {
      for (std::int64_t unit = 0; unit < units; ++unit) work(unit, 0);
      return;
    }
    work_ = &work;
    units_ = units;
    next_unit_.store(0, std::memory_order_relaxed);
    busy_.store(int(helpers_.size()), std::memory_order_relaxed);
    start_phase();
    take_units(0);
    for (int busy; (busy = busy_.load(std::memory_order_acquire)) != 0;) busy_.wait(busy, std::memory_order_acquire);
  }

 private:
  void start_phase() {
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
  }

  void take_units(int thread) {
    for (std::int64_t unit; (unit = next_unit_.fetch_add(1, std::memory_order_relaxed)) < units_;)
      (*work_)(unit, thread);
  }

  void help(int thread) {
    for (std::uint32_t seen = 0;;) {
      phase_.wait(seen, std::memory_order_acquire);
      ++seen;
      if (!work_) return;
      take_units(thread);
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
    }
  }

  std::vector<std::thread> helpers_;
  const std::function<void(std::int64_t, int)>* work_ = nullptr;
  std::int64_t units_ = 0;
  std::atomic<std::int64_t> next_unit_{0};
  std::atomic<int> busy_{0};
  std::atomic<std::uint32_t> phase_{0};
};

}  // namespace contrastile::cpu
