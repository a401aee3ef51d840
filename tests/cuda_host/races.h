// Which accesses to shared memory are ordered. Each thread has a vector clock; a barrier joins those of the threads
// that meet there. Each byte remembers its last write and the reads since; an access that conflicts with one it is
// not ordered after is a race, whatever the interleaving that happened to run.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "report.h"

namespace contrastile::host {

using Clock = std::vector<std::uint32_t>;

inline void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (std::size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

class Races {
 public:
  struct Conflict {
    int other;  // the other thread
    bool other_wrote;
    bool in_flight;  // the other access is a cp.async that nobody has waited for
    std::size_t offset;
  };

  Races(int threads, std::size_t bytes) : clocks_(checks ? threads : 0), words_(checks ? (bytes + 3) / 4 : 0) {}

  void restart() {
    for (std::size_t t = 0; t < clocks_.size(); ++t) {
      clocks_[t].assign(clocks_.size(), 0);
      clocks_[t][t] = 1;
    }
    for (Word& word : words_) word = {};
  }

  // A barrier is an `arrive` of each of its threads and a `depart` of those that waited.
  void arrive(int thread, Clock& barrier) {
    if constexpr (!checks) return;
    join(barrier, clocks_[thread]);
    ++clocks_[thread][thread];
  }
  void depart(int thread, const Clock& barrier) {
    if constexpr (checks) join(clocks_[thread], barrier);
  }

  std::optional<Conflict> read(int thread, std::size_t offset, std::size_t bytes, std::uint64_t& unwritten) {
    return access(thread, offset, bytes, false, unwritten);
  }
  std::optional<Conflict> write(int thread, std::size_t offset, std::size_t bytes) {
    std::uint64_t unused = 0;
    return access(thread, offset, bytes, true, unused);
  }

  void take_off(std::size_t offset, std::size_t bytes) {
    for_words(offset, bytes, [](Word& word, std::uint8_t mask, std::size_t) { word.in_flight |= mask; });
  }
  void land(std::size_t offset, std::size_t bytes) {
    for_words(offset, bytes, [](Word& word, std::uint8_t mask, std::size_t) { word.in_flight &= ~mask; });
  }

 private:
  struct Access {
    std::uint32_t clock;
    std::uint16_t thread;
    std::uint8_t mask;  // of the word's four bytes
    bool wrote;
  };
  struct Word {
    std::vector<Access> accesses;
    std::uint8_t written = 0, in_flight = 0;
  };

  template <typename Visit>
  void for_words(std::size_t offset, std::size_t bytes, Visit visit) {
    if constexpr (!checks) return;
    for (std::size_t end = offset + bytes; offset < end;) {
      const std::size_t first = offset % 4, count = std::min<std::size_t>(4 - first, end - offset);
      visit(words_[offset / 4], static_cast<std::uint8_t>(((1u << count) - 1) << first), offset);
      offset += count;
    }
  }

  std::optional<Conflict> access(int thread, std::size_t offset, std::size_t bytes, bool writes,
                                 std::uint64_t& unwritten) {
    std::optional<Conflict> conflict;
    for_words(offset, bytes, [&](Word& word, std::uint8_t mask, std::size_t at) {
      const Clock& now = clocks_[thread];
      for (const Access& past : word.accesses) {
        const bool ordered = past.thread == thread || past.clock <= now[past.thread];
        const bool in_flight = (word.in_flight & past.mask & mask) != 0 && past.wrote;
        if ((past.mask & mask) && ((!ordered && (writes || past.wrote)) || in_flight))
          conflict = Conflict{past.thread, past.wrote, in_flight, at};
      }
      std::erase_if(word.accesses, [&](const Access& past) {
        const bool ordered = past.thread == thread || past.clock <= now[past.thread];
        return ordered && (past.mask & ~mask) == 0 && (writes || !past.wrote);
      });
      word.accesses.push_back({now[thread], static_cast<std::uint16_t>(thread), mask, writes});
      if (writes) word.written |= mask;
      else unwritten += static_cast<unsigned>(__builtin_popcount(mask & ~word.written));
    });
    return conflict;
  }

  std::vector<Clock> clocks_;
  std::vector<Word> words_;
};

}  // namespace contrastile::host
