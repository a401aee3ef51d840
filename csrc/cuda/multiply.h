// How embeddings of each type are multiplied. `add` adds the product of m16n8 fragments, 32 bytes deep, to the four
// values of a thread.
#pragma once

#include <cstdint>

#include "device.h"
#include "panels.h"
#include "tile.h"

namespace contrastile::cuda {

__device__ inline float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }
__device__ inline std::uint32_t bits_of(float value) { return __builtin_bit_cast(std::uint32_t, value); }

// The part of a thread's values that is fragment (m, n), for an instruction, and back.
template <class Total, class Instruction>
__device__ void on_fragment(Total& total, int m, int n, Instruction instruction) {
  float values[] = {total[2 * m][2 * n], total[2 * m][2 * n + 1], total[2 * m + 1][2 * n], total[2 * m + 1][2 * n + 1]};
  instruction(values);
  total[2 * m][2 * n] = values[0];
  total[2 * m][2 * n + 1] = values[1];
  total[2 * m + 1][2 * n] = values[2];
  total[2 * m + 1][2 * n + 1] = values[3];
}

template <class Element_>
struct Multiply16Bit {
  using Element = Element_;
  template <class Total>
  __device__ static void add(Total& total, int m, int n, const std::uint32_t* rows, const std::uint32_t* cols) {
    on_fragment(total, m, n, [&](float* values) { device::mma_m16n8k16<Element>(values, rows, cols); });
  }
};

// A float32 is the sum of its leading part, which is a TF32, and a rest. Without the product of both rests, about
// 2^-21 of a product is lost; with the leading parts alone, about 2^-11.
template <int Count>
struct Tf32Parts {
  std::uint32_t leading[Count], rest[Count];
};
template <int Count>
__device__ void split(const std::uint32_t* bits, Tf32Parts<Count>& parts) {
  for (int i = 0; i < Count; ++i) {
    parts.leading[i] = device::to_tf32(float_of(bits[i]));
    parts.rest[i] = device::to_tf32(float_of(bits[i]) - float_of(parts.leading[i]));
  }
}

template <Float32Products Products>
struct MultiplyTf32 {
  using Element = float;
  template <class Total>
  __device__ static void add(Total& total, int m, int n, const std::uint32_t* rows, const std::uint32_t* cols) {
    Tf32Parts<4> left;
    Tf32Parts<2> right;
    split(rows, left);
    split(cols, right);
    on_fragment(total, m, n, [&](float* values) {
      if constexpr (Products == Float32Products::tf32x3) {
        device::mma_m16n8k8_tf32(values, left.rest, right.leading);
        device::mma_m16n8k8_tf32(values, left.leading, right.rest);
      }
      device::mma_m16n8k8_tf32(values, left.leading, right.leading);
    });
  }
};

// float32 by multiply-adds, four features of a row at a time; the eight rows that a warp reads at once lie in different
// banks, as for a matrix load.
struct MultiplyExactly {
  using Element = float;
};

}  // namespace contrastile::cuda
