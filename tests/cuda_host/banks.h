// Bank conflicts of shared memory: 32 banks of 4 bytes; a warp's 16-byte accesses go 8 lanes at a time, 8-byte ones
// 16 at a time. Lanes run one after another here, so the accesses of a warp are put together afterwards: the n-th
// execution of one place in the source by each lane since the warp last met is one request.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <set>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "report.h"

namespace contrastile::host {

// Where each lane that takes part looks, in bytes from the start of shared memory.
using Request = std::vector<std::pair<int, std::uint32_t>>;

inline void count_banks(const Request& request, int bytes, Banks& banks) {
  const int lanes_together = bytes <= 4 ? 32 : 128 / bytes;
  ++banks.requests;
  for (int first = 0; first < 32; first += lanes_together) {
    std::array<std::set<std::uint32_t>, 32> words_of_bank;
    for (const auto& [lane, offset] : request)
      if (lane / lanes_together == first / lanes_together)
        for (std::uint32_t word = offset / 4; word <= (offset + bytes - 1) / 4; ++word)
          words_of_bank[word % 32].insert(word);
    std::size_t passes = 0;
    for (const auto& words : words_of_bank) passes = std::max(passes, words.size());
    banks.wavefronts += passes;
    banks.conflicts += passes > 0 ? passes - 1 : 0;
  }
}

class BankLog {
 public:
  void record(int lane, std::uint32_t offset, int bytes, bool store, const Place& place) {
    Site& site = sites_[{place.file_name(), place.line(), place.column(), bytes, store}];
    const std::size_t turn = site.turns[lane]++;
    if (turn == site.requests.size()) site.requests.emplace_back();
    site.requests[turn].push_back({lane, offset});
  }

  // Counts what is logged; called when all lanes of the warp have come to the same point.
  void settle(Report& report) {
    for (const auto& [key, site] : sites_)
      for (const Request& request : site.requests)
        count_banks(request, std::get<3>(key), std::get<4>(key) ? report.stores : report.loads);
    sites_.clear();
  }

 private:
  struct Site {
    std::array<std::size_t, 32> turns{};
    std::vector<Request> requests;
  };
  using Key = std::tuple<std::string_view, unsigned, unsigned, int, bool>;
  std::map<Key, Site> sites_;
};

}  // namespace contrastile::host
