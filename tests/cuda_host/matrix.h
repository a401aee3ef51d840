// ldmatrix and mma.sync with the register layouts of the PTX ISA, done once a warp.
// Below, `group` is lane / 4 and `member` lane % 4.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "numbers.h"
#include "shared_memory.h"
#include "warp.h"

namespace contrastile::host {

struct MatrixRows {
  std::uint32_t* fragment;
  const char* row;
};

// The lane that receives an element is taken for its reader.
template <bool Transposed>
void load_matrix(const std::array<MatrixRows*, lanes_per_warp>& operands, int matrix, int first_thread,
                 const Place& place) {
  for (int lane = 0; lane < lanes_per_warp; ++lane) {
    const int group = lane / 4, member = lane % 4;
    std::uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int row = Transposed ? 2 * member + i : group;
      const int column = Transposed ? group : 2 * member + i;
      const char* element = operands[8 * matrix + row]->row + 2 * column;
      note_read(first_thread + lane, element - block->shared, 2, "ldmatrix", place);
      std::memcpy(&pair[i], element, 2);
    }
    operands[lane]->fragment[matrix] = pair[0] | static_cast<std::uint32_t>(pair[1]) << 16;
  }
}

template <int Count, bool Transposed>
void load_matrices(std::uint32_t* fragment, const void* row, const Place& place) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
  const Thread& self = *block->running;
  if (self.lane() < 8 * Count) shared_offset(row, 16, place);
  block->maybe_give_way();
  MatrixRows mine{fragment, static_cast<const char*>(row)};
  together("ldmatrix", Alignment::aligned, 0xffffffffu, mine, place, [&](const auto& operands) {
    const int first_thread = self.index - self.lane();
    for (int matrix = 0; matrix < Count; ++matrix) load_matrix<Transposed>(operands, matrix, first_thread, place);
    if constexpr (checks) {
      Request request;
      for (int lane = 0; lane < 8 * Count; ++lane)
        request.push_back({lane, static_cast<std::uint32_t>(operands[lane]->row - block->shared)});
      count_banks(request, 16, block->report.matrix_loads);
    }
  });
}

struct Product {
  float* accumulator;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

// The operands of a warp's product, gathered from its lanes; the sum runs over k in order, rounded to fp32 each time.
template <int Depth>
struct Tile {
  float a[16][Depth];
  float b[Depth][8];
  float c[16][8];

  void multiply() {
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < Depth; ++k)
        for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  }
};

template <int Depth, typename Gather>
void multiply(const char* operation, float* accumulator, const std::uint32_t* a, const std::uint32_t* b,
              const Place& place, Gather gather) {
  Product mine{accumulator, a, b};
  together(operation, Alignment::aligned, 0xffffffffu, mine, place, [&](const auto& operands) {
    Tile<Depth> tile;
    for (int lane = 0; lane < lanes_per_warp; ++lane) {
      const int group = lane / 4, member = lane % 4;
      gather(tile, *operands[lane], group, member);
      for (int i = 0; i < 4; ++i) tile.c[group + 8 * (i / 2)][2 * member + i % 2] = operands[lane]->accumulator[i];
    }
    tile.multiply();
    for (int lane = 0; lane < lanes_per_warp; ++lane)
      for (int i = 0; i < 4; ++i)
        operands[lane]->accumulator[i] = tile.c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    ++block->report.matrix_products;
  });
}

}  // namespace contrastile::host

namespace contrastile::device {

template <int Count>
void ldmatrix(std::uint32_t* fragment, const void* row, host::Place place = host::Place::current()) {
  host::load_matrices<Count, false>(fragment, row, place);
}
template <int Count>
void ldmatrix_trans(std::uint32_t* fragment, const void* row, host::Place place = host::Place::current()) {
  host::load_matrices<Count, true>(fragment, row, place);
}

template <typename Element>
void mma_m16n8k16(float* accumulator, const std::uint32_t* a, const std::uint32_t* b,
                  host::Place place = host::Place::current()) {
  static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, f16>);
  host::multiply<16>("mma_m16n8k16", accumulator, a, b, place, [](auto& tile, const auto& mine, int group, int member) {
    for (int half = 0; half < 2; ++half) {
      const auto element = [half](std::uint32_t pair) {
        return to_float(Element{static_cast<std::uint16_t>(pair >> 16 * half)});
      };
      for (int i = 0; i < 4; ++i)
        tile.a[group + 8 * (i % 2)][2 * member + half + 8 * (i / 2)] = element(mine.a[i]);
      for (int i = 0; i < 2; ++i) tile.b[2 * member + half + 8 * i][group] = element(mine.b[i]);
    }
  });
}

inline void mma_m16n8k8_tf32(float* accumulator, const std::uint32_t* a, const std::uint32_t* b,
                             host::Place place = host::Place::current()) {
  host::multiply<8>("mma_m16n8k8_tf32", accumulator, a, b, place,
                    [](auto& tile, const auto& mine, int group, int member) {
                      for (int i = 0; i < 4; ++i)
                        tile.a[group + 8 * (i % 2)][member + 4 * (i / 2)] = host::read_tf32(mine.a[i]);
                      for (int i = 0; i < 2; ++i) tile.b[member + 4 * i][group] = host::read_tf32(mine.b[i]);
                    });
}

}  // namespace contrastile::device
