// Last pass over the rows of a gradient: its factors, its moment, and its rounding, all at once.
//
//   reads   the sums over pairs, 4 D bytes a row; the embeddings for a moment; the sums of another role if there is one
//   writes  the gradient in the type that it is wanted in, and its moment, 4 bytes a row
//   takes   registers and shared memory of each chip: docs/cuda.md
//   bound   DRAM bandwidth
//
// The gradient may take the place of the sums: every entry is read before it is written, by the same thread.
#include "kernels.h"
#include "launch.h"
#include "multiply.h"
#include "tile.h"

namespace contrastile::cuda {
namespace {

constexpr int rows_of_block = 8;  // a warp each

template <class Element>
__device__ void store_four(Element* to, const float (&values)[4]) {
  if constexpr (sizeof(Element) == 4) {
    for (int i = 0; i < 4; ++i) to[i] = values[i];
  } else {
    const device::Vector8 packed{
        {device::pack<Element>(values[0], values[1]), device::pack<Element>(values[2], values[3])}};
    device::store_global(reinterpret_cast<device::Vector8*>(to), packed);
  }
}

template <class Element, class Result>
__global__ void __launch_bounds__(rows_of_block * warp_size)
    finish_rows_kernel(const __grid_constant__ RowSums sums) {
  const int row = block_id() * rows_of_block + device::warp_id();
  if (row >= sums.rows) return;
  const float common = sums.factor ? *sums.factor : 1;
  const float factor = sums.row_factors ? common * sums.row_factors[row] : common;
  const std::int64_t first = std::int64_t{row} * sums.depth;
  const auto* embedding = static_cast<const Element*>(sums.embeddings) + row * sums.embedding_stride;
  float moment = 0;
  for (int k = device::lane_id() * 4; k < sums.depth; k += warp_size * 4) {
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = sums.values[first + k + i] * factor;
    if (sums.moments) {
#pragma unroll
      for (int i = 0; i < 4; ++i) moment += device::to_float(embedding[k + i]) * values[i];
    }
    if (sums.other_values) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] += sums.other_values[first + k + i] * common;
    }
    if (sums.gradient) store_four(static_cast<Result*>(sums.gradient) + first + k, values);
  }
  for (int lanes = 1; lanes < warp_size; lanes *= 2) moment += device::shuffle_xor(moment, lanes);
  if (sums.moments && device::lane_id() == 0) sums.moments[row] = moment;
}

template <class Function>
void with_element(ElementType type, Function function) {
  switch (type) {
    case ElementType::bfloat16: return function(device::bf16{});
    case ElementType::float16: return function(device::f16{});
    case ElementType::float32: return function(float{});
  }
}

}  // namespace

void launch_finish_rows(const RowSums& sums, Stream stream) {
  if (sums.rows == 0) return;
  with_element(sums.type, [&]<class Element>(Element) {
    const int blocks = ceil_div(sums.rows, rows_of_block), threads = rows_of_block * warp_size;
    if (sums.rounds)
      launch<finish_rows_kernel<Element, Element>>("finish rows", blocks, threads, 0, stream, sums);
    else
      launch<finish_rows_kernel<Element, float>>("finish rows", blocks, threads, 0, stream, sums);
  });
}

}  // namespace contrastile::cuda
