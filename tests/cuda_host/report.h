// What a launch is told and what it tells.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>

namespace contrastile::host {

#ifdef CONTRASTILE_HOST_CHECKS
inline constexpr bool checks = true;  // races and bank conflicts
#else
inline constexpr bool checks = false;
#endif

enum class Target { sm_80, sm_86, sm_89, sm_90, sm_100, sm_120 };
enum class Order { natural, reversed, random };

// A block's shared memory at most, in bytes.
constexpr std::size_t shared_limit(Target target) {
  switch (target) {
    case Target::sm_80: return 163 << 10;
    case Target::sm_90:
    case Target::sm_100: return 227 << 10;
    default: return 99 << 10;
  }
}

constexpr const char* name_of(Target target) {
  constexpr const char* names[] = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"};
  return names[static_cast<int>(target)];
}

struct Settings {
  Target target = Target::sm_86;
  Order blocks = Order::natural;
  bool random_threads = false;  // otherwise each thread runs until it waits, in turn
  std::uint64_t seed = 0;
  std::string left_out;  // the place, as panels.h:10, of a block barrier or a wait for copies that is to do nothing
};
inline Settings settings;

struct Banks {
  std::uint64_t requests = 0;    // by a warp
  std::uint64_t wavefronts = 0;  // passes that they took
  std::uint64_t conflicts = 0;   // passes beyond the fewest possible

  Banks& operator+=(const Banks& other) {
    requests += other.requests;
    wavefronts += other.wavefronts;
    conflicts += other.conflicts;
    return *this;
  }
};

struct Report {
  Banks loads, stores, matrix_loads;        // zero without CONTRASTILE_HOST_CHECKS
  std::uint64_t unwritten_bytes_read = 0;   // zero without CONTRASTILE_HOST_CHECKS
  std::uint64_t copies_never_waited_for = 0;
  std::uint64_t matrix_products = 0;
  std::uint64_t switches = 0;  // between threads

  Report& operator+=(const Report& other) {
    loads += other.loads;
    stores += other.stores;
    matrix_loads += other.matrix_loads;
    unwritten_bytes_read += other.unwritten_bytes_read;
    copies_never_waited_for += other.copies_never_waited_for;
    matrix_products += other.matrix_products;
    switches += other.switches;
    return *this;
  }
};

struct KernelFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Place = std::source_location;

inline std::string text(const Place& place) {
  const std::string path = place.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(place.line());
}

inline bool is_left_out(const Place& place) { return !settings.left_out.empty() && settings.left_out == text(place); }

inline bool same(const Place& a, const Place& b) {
  return a.line() == b.line() && a.column() == b.column() && std::string_view(a.file_name()) == b.file_name();
}

}  // namespace contrastile::host
