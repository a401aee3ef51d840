// Threads for the length of one sweep.
//
// With OpenMP they are the framework's own pool, where both link the same
// runtime: a second pool would run beside threads that still spin from the
// operation before. Without it, and in a process forked from one that had a
// pool (a data loader's worker: its copy of the pool has no threads), they are
// made when a sweep starts and joined when it ends.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace contrastile::cpu {

// Whether this process is a fork of the one that loaded this code.
bool is_forked();

// Threads of its own, asleep between phases.
class OwnThreads {
 public:
  explicit OwnThreads(int threads) {
    for (int id = 1; id < threads; ++id) helpers_.emplace_back([this, id] { help(id); });
  }

  ~OwnThreads() {
    work_ = nullptr;
    start_phase();
    for (std::thread& helper : helpers_) helper.join();
  }

  OwnThreads(const OwnThreads&) = delete;
  OwnThreads& operator=(const OwnThreads&) = delete;

  void run(const std::function<void(int)>& work) {
    work_ = &work;
    busy_.store(int(helpers_.size()), std::memory_order_relaxed);
    start_phase();
    work(0);
    for (int busy; (busy = busy_.load(std::memory_order_acquire)) != 0;) busy_.wait(busy, std::memory_order_acquire);
  }

 private:
  void start_phase() {
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
  }

  void help(int thread) {
    for (std::uint32_t seen = 0;;) {
      phase_.wait(seen, std::memory_order_acquire);
      ++seen;
      if (!work_) return;
      (*work_)(thread);
      if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_one();
    }
  }

  std::vector<std::thread> helpers_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<int> busy_{0};
  std::atomic<std::uint32_t> phase_{0};
};

class Team {
 public:
  explicit Team(int threads) : threads_(threads) {
#if defined(_OPENMP)
    if (!is_forked()) return;
#endif
    if (threads > 1) own_ = std::make_unique<OwnThreads>(threads);
  }

  int threads() const { return threads_; }

  // work(unit, thread) for every unit in [0, units), in no order; returns when
  // all are done. Which thread takes a unit must not matter to the result. work
  // must not throw.
  void for_each(std::int64_t units, const std::function<void(std::int64_t, int)>& work) {
    if (threads_ == 1 || units <= 1) {
      for (std::int64_t unit = 0; unit < units; ++unit) work(unit, 0);
      return;
    }
    std::atomic<std::int64_t> next_unit{0};
    const auto take_units = [&](int thread) {
      for (std::int64_t unit; (unit = next_unit.fetch_add(1, std::memory_order_relaxed)) < units;) work(unit, thread);
    };
    if (own_) return own_->run(take_units);
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads_)
    take_units(omp_get_thread_num());
#endif
  }

 private:
  const int threads_;
  std::unique_ptr<OwnThreads> own_;  // null: one thread, or OpenMP's
};

}  // namespace contrastile::cpu
