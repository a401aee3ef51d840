// What the lanes of a warp do together: each leaves its operands and waits, the last to come does the work for all.
#pragma once

#include <bit>
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>

#include "block.h"

namespace contrastile::host {

// An instruction of PTX's .aligned kind must be the same one for all lanes, which its place in the source tells.
enum class Alignment { free, aligned };

template <typename Operands>
inline constexpr char kind_of_operands = 0;

inline Meeting& meeting_of(unsigned lanes) {
  Warp& warp = block->warp();
  for (Meeting& meeting : warp.meetings)
    if (meeting.arrived != 0 && meeting.lanes == lanes) return meeting;
  for (Meeting& meeting : warp.meetings)
    if (meeting.arrived == 0) return meeting;
  block->fail("more than 32 meetings of one warp");
}

inline std::string name_of_lanes(unsigned lanes) {
  char digits[11];
  std::snprintf(digits, sizeof digits, "0x%08x", lanes);
  return digits;
}

// execute(operands) gets the 32 lanes' operands, null for lanes that do not take part.
template <typename Operands, typename Execute>
void together(const char* operation, Alignment alignment, unsigned lanes, Operands& mine, const Place& place,
              Execute execute) {
  Thread& self = *block->running;
  const unsigned bit = 1u << self.lane();
  if (!(lanes & bit))
    block->fail(std::string(operation) + " at " + text(place) + " for lanes " + name_of_lanes(lanes) +
                ", of which this is none");
  Meeting& meeting = meeting_of(lanes);
  const void* kind = &kind_of_operands<Operands>;
  if (meeting.arrived == 0) {
    meeting.lanes = lanes;
    meeting.operation = operation;
    meeting.place = place;
    meeting.kind = kind;
    meeting.operands = {};
  } else if (std::strcmp(meeting.operation, operation) != 0 || meeting.kind != kind ||
             (alignment == Alignment::aligned && !same(meeting.place, place))) {
    block->fail("divergent warp: lane " + std::to_string(self.lane()) + " is at " + operation + " at " + text(place) +
                ", lane " + std::to_string(std::countr_zero(meeting.arrived)) + " at " + meeting.operation + " at " +
                text(meeting.place));
  }
  meeting.arrived |= bit;
  meeting.operands[self.lane()] = &mine;
  if (meeting.arrived != lanes) {
    block->wait(operation, place);
    return;
  }
  std::array<Operands*, lanes_per_warp> operands;
  for (int lane = 0; lane < lanes_per_warp; ++lane) operands[lane] = static_cast<Operands*>(meeting.operands[lane]);
  if (checks && lanes == 0xffffffffu) block->warp().banks.settle(block->report);
  execute(operands);
  meeting.arrived = 0;
  for (int lane = 0; lane < lanes_per_warp; ++lane)
    if (lanes >> lane & 1 && lane != self.lane()) block->wake(block->threads[self.index - self.lane() + lane]);
}

// Gives each lane the value of lane source_of(lane), its own where that is no lane of the warp.
template <typename T, typename Source>
T exchange(const char* operation, T value, unsigned lanes, const Place& place, Source source_of) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  struct Operands {
    T value, received;
    int source;
  } mine{value, value, source_of(block->running->lane())};
  together(operation, Alignment::free, lanes, mine, place, [&](const auto& operands) {
    for (Operands* each : operands) {
      if (!each || each->source < 0 || each->source >= lanes_per_warp) continue;
      if (!operands[each->source])
        block->fail(std::string(operation) + " at " + text(place) + " reads lane " + std::to_string(each->source) +
                    ", which lanes " + name_of_lanes(lanes) + " leave out");
      each->received = operands[each->source]->value;
    }
  });
  return mine.received;
}

inline unsigned ballot(const char* operation, bool yes, unsigned lanes, const Place& place) {
  struct Operands {
    bool yes;
    unsigned ballot;
  } mine{yes, 0};
  together(operation, Alignment::free, lanes, mine, place, [](const auto& operands) {
    unsigned ballot = 0;
    for (int lane = 0; lane < lanes_per_warp; ++lane) ballot |= operands[lane] && operands[lane]->yes ? 1u << lane : 0;
    for (Operands* each : operands)
      if (each) each->ballot = ballot;
  });
  return mine.ballot;
}

}  // namespace contrastile::host

namespace contrastile::device {

inline void warp_barrier(unsigned lanes = full_warp, host::Place place = host::Place::current()) {
  struct Operands {
    host::Thread* thread;
  } mine{host::block->running};
  host::together("warp_barrier", host::Alignment::free, lanes, mine, place, [](const auto& operands) {
    if constexpr (host::checks) {
      host::Clock clock;
      for (Operands* each : operands)
        if (each) host::block->races.arrive(each->thread->index, clock);
      for (Operands* each : operands)
        if (each) host::block->races.depart(each->thread->index, clock);
    }
  });
}

template <typename T>
T shuffle(T value, int lane, unsigned lanes = full_warp, host::Place place = host::Place::current()) {
  return host::exchange("shuffle", value, lanes, place, [=](int) { return lane & 31; });
}
template <typename T>
T shuffle_xor(T value, int lane_mask, unsigned lanes = full_warp, host::Place place = host::Place::current()) {
  return host::exchange("shuffle_xor", value, lanes, place, [=](int self) { return self ^ lane_mask; });
}
template <typename T>
T shuffle_up(T value, int distance, unsigned lanes = full_warp, host::Place place = host::Place::current()) {
  return host::exchange("shuffle_up", value, lanes, place, [=](int self) { return self - distance; });
}
template <typename T>
T shuffle_down(T value, int distance, unsigned lanes = full_warp, host::Place place = host::Place::current()) {
  return host::exchange("shuffle_down", value, lanes, place, [=](int self) { return self + distance; });
}

inline bool vote_any(bool yes, unsigned lanes = full_warp, host::Place place = host::Place::current()) {
  return host::ballot("vote_any", yes, lanes, place) != 0;
}
inline bool vote_all(bool yes, unsigned lanes = full_warp, host::Place place = host::Place::current()) {
  return host::ballot("vote_all", yes, lanes, place) == lanes;
}
inline unsigned vote_ballot(bool yes, unsigned lanes = full_warp, host::Place place = host::Place::current()) {
  return host::ballot("vote_ballot", yes, lanes, place);
}

}  // namespace contrastile::device
