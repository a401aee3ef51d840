// run(case, buffers, numbers): launches one kernel of self_test.cu with what Python passes.
#pragma once

#include <functional>
#include <map>
#include <string>

#include "exports.h"

namespace self_test {

using contrastile::host::launch;
using contrastile::host::Report;

template <typename T>
T* as(void* buffer) {
  return static_cast<T*>(buffer);
}

using Case = std::function<void(void** buffers, const int* numbers)>;
using Word = std::uint32_t;

inline const std::map<std::string, Case> cases = {
    {"grid_sum", [](void** b, const int* n) { launch(grid_sum, n[0], n[1], 128, as<float>(b[0]), as<float>(b[1])); }},
    {"tickets", [](void** b, const int* n) { launch(tickets, n[0], 32, 0, as<unsigned>(b[0]), as<unsigned>(b[1])); }},
    {"reverse", [](void** b, const int* n) { launch(reverse, 1, 64, 256, as<int>(b[0]), as<int>(b[1]), n[0]); }},
    {"half_written",
     [](void** b, const int* n) { launch(half_written, n[0], 32, 128, as<float>(b[0]), as<float>(b[1])); }},
    {"hand_over", [](void** b, const int* n) { launch(hand_over, 1, 96, 128, as<int>(b[0]), n[0], n[1]); }},
    {"lanes", [](void** b, const int* n) { launch(lanes, 1, 32, 0, as<unsigned>(b[0]), n[0]); }},
    {"copy_through_stages",
     [](void** b, const int* n) {
       launch(copy_through_stages, 1, 64, 2 * 64 * 16, as<Vector16>(b[0]), as<Vector16>(b[1]), n[0], n[1], n[2]);
     }},
    {"small_copies", [](void** b, const int*) { launch(small_copies, 1, 32, 384, as<Word>(b[0]), as<Word>(b[1])); }},
    {"misplaced", [](void** b, const int* n) { launch(misplaced, 1, 32, 128, as<char>(b[0]), n[0]); }},
    {"strided",
     [](void**, const int* n) {
       const int bytes = n[0] * (31 * n[1] + 1);
       if (n[0] == 2) launch(strided<std::uint16_t>, 1, 32, bytes, n[1], n[2]);
       if (n[0] == 4) launch(strided<float>, 1, 32, bytes, n[1], n[2]);
       if (n[0] == 8) launch(strided<Vector8>, 1, 32, bytes, n[1], n[2]);
       if (n[0] == 16) launch(strided<Vector16>, 1, 32, bytes, n[1], n[2]);
     }},
    {"read_tile",
     [](void** b, const int* n) { launch(read_tile, 1, 32, 8192, as<Word>(b[0]), as<Vector16>(b[1]), n[0]); }},
    {"load_fragments",
     [](void** b, const int* n) {
       const auto run = [&](auto kernel) { launch(kernel, 1, 32, 512, as<Word>(b[0]), as<Vector16>(b[1])); };
       if (n[0] == 1) run(n[1] ? load_fragments<1, true> : load_fragments<1, false>);
       if (n[0] == 2) run(n[1] ? load_fragments<2, true> : load_fragments<2, false>);
       if (n[0] == 4) run(n[1] ? load_fragments<4, true> : load_fragments<4, false>);
     }},
    {"multiply",
     [](void** b, const int* n) {
       const auto run = [&](auto kernel) { launch(kernel, 1, 32, 0, as<float>(b[0]), as<Word>(b[1]), as<Word>(b[2]), n[1]); };
       run(n[0] == 0 ? multiply<bf16> : n[0] == 1 ? multiply<f16> : multiply<float>);
     }},
    {"convert",
     [](void** b, const int* n) { launch(convert, 1, 32, 0, as<Word>(b[0]), as<float>(b[1]), n[0], n[1]); }},
    {"exp2_row_sums",
     [](void** b, const int* n) {
       launch<exp2_row_sums>("exp2_row_sums", n[0] / 64, 128, 3 * 8192, nullptr, as<float>(b[0]), as<Vector16>(b[1]),
                             as<Vector16>(b[2]), n[1]);
     }},
    {"shared_bytes", [](void**, const int* n) { launch(strided<float>, 1, 32, n[0], 1, 1); }},
    {"threads", [](void**, const int* n) { launch(strided<float>, 1, n[0], 4096, 1, 1); }},
};

}  // namespace self_test

extern "C" bool run(const char* name, void** buffers, const int* numbers, contrastile::host::Report* report, char* message,
                    std::size_t message_bytes) {
  return contrastile::host::guarded([&] { self_test::cases.at(name)(buffers, numbers); }, report, message, message_bytes);
}
