// Kernels that use every name of device.h, rightly or, where `fault` says so, wrongly. They compile for a device too.
#include "device.h"

namespace self_test {

using namespace contrastile::device;

constexpr int rows_of_tile = 64;

// Sums `in` over the grid; each warp hands its sum on through shared memory.
__global__ void grid_sum(float* out, const float* in) {
  float* partial = dynamic_shared<float>();
  float sum = load_global(in + blockIdx.x * blockDim.x + thread_id());
  for (int distance = 16; distance > 0; distance /= 2) sum += shuffle_xor(sum, distance);
  if (lane_id() == 0) store_shared(partial + warp_id(), sum);
  block_barrier();
  if (thread_id() == 0)
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) atomic_add(out, load_shared(partial + warp));
}

// What `counter` stood at when each thread came.
__global__ void tickets(unsigned* drawn, unsigned* counter) {
  drawn[blockIdx.x * blockDim.x + thread_id()] = atomic_add(counter, 1u);
}

// Every thread reads what its mirror image in the block wrote.
enum Exchange { right, no_barrier, warp_barrier_only, one_thread_absent, two_places, exits_early, overwritten };
__global__ void reverse(int* out, const int* in, int fault) {
  int* values = dynamic_shared<int>();
  const int self = thread_id(), mirror = static_cast<int>(blockDim.x) - 1 - self;
  if (fault == exits_early && self == 5) return;
  store_shared(values + self, load_global(in + self));
  if (fault == warp_barrier_only)
    warp_barrier();
  else if (fault == one_thread_absent && self == 7)
    return;
  else if (fault == two_places && warp_id() == 1)
    block_barrier();
  else if (fault != no_barrier)
    block_barrier();
  store_global(out + self, load_shared(values + mirror));
  if (fault == overwritten) store_shared(values + self, 0);
}

// Only the first half of the lanes write what all read.
__global__ void half_written(float* out, const float* in) {
  float* values = dynamic_shared<float>();
  if (lane_id() < 16) store_shared(values + lane_id(), load_global(in + lane_id()));
  warp_barrier();
  store_global(out + 32 * blockIdx.x + lane_id(), load_shared(values + lane_id()));
  if (lane_id() >= 16) store_shared(values + lane_id(), 1.0f);
}

// Warp 0 fills what warp 1 reads, through barriers 1 (full) and 2 (free again).
enum Handover { handed_over, never_full, half_a_warp, other_count, arrives_twice };
__global__ void hand_over(int* out, int rounds, int fault) {
  int* slot = dynamic_shared<int>();
  for (int round = 0; round < rounds; ++round) {
    if (warp_id() == 0) {
      if (round > 0) named_barrier(2, 64);
      store_shared(slot + lane_id(), 100 * round + lane_id());
      if (fault == arrives_twice && lane_id() == 3) named_barrier_arrive(1, 64);
      if (fault != half_a_warp || lane_id() < 16) named_barrier_arrive(1, fault == other_count ? 32 + 64 : 64);
    } else if (warp_id() == 1) {
      if (fault != never_full) named_barrier(1, 64);
      store_global(out + 32 * round + lane_id(), load_shared(slot + (lane_id() ^ 1)));
      if (round + 1 < rounds) named_barrier_arrive(2, 64);
    } else if (fault == half_a_warp && lane_id() < 16) {
      named_barrier_arrive(1, 64);
    }
  }
}

enum Lanes { all_lanes, lane_absent, other_operation, not_in_mask, reads_outside_mask, halves };
__global__ void lanes(unsigned* out, int fault) {
  const int lane = lane_id();
  if (fault == lane_absent && lane == 9) return;
  if (fault == halves) {
    const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    out[lane] = vote_ballot(lane % 2 == 0, half) + shuffle(100u * lane, lane < 16 ? 3 : 19, half);
    return;
  }
  if (fault == other_operation && lane == 2) {
    out[0] = vote_any(true);
  } else if (fault == not_in_mask) {
    out[lane] = shuffle(lane, 0, 0x7fffffffu);
  } else if (fault == reads_outside_mask) {
    if (lane < 16) out[lane] = shuffle_xor(lane, 16, 0xffffu);
  } else {
    out[lane] = shuffle(lane, 5);
    out[32 + lane] = shuffle_up(lane, 3);
    out[64 + lane] = shuffle_down(lane, 3);
    out[96 + lane] = shuffle_xor(lane, 7);
    out[128 + lane] = vote_any(lane == 30) + 2 * vote_all(lane != 30) + 4 * vote_any(lane > 31) + 8 * vote_all(true);
    out[160 + lane] = vote_ballot(lane % 3 == 0);
  }
}

// Copies 16-byte pieces through two stages of shared memory; the last piece has `tail` bytes. Waiting one group too
// few shows what is read before it has landed.
enum Pipeline { waited, waits_one_stage_early, no_barrier_after_wait, never_waited, reads_the_next_stage };
__global__ void copy_through_stages(Vector16* out, const Vector16* in, int steps, int tail, int fault) {
  Vector16* stages = dynamic_shared<Vector16>();
  const int threads = static_cast<int>(blockDim.x), self = thread_id();
  const auto issue = [&](int step) {
    if (step < steps) {
      const bool last = step + 1 == steps && self + 1 == threads;
      cp_async<16>(stages + step % 2 * threads + self, in + step * threads + self, last ? tail : 16);
    }
    commit_group();
  };
  issue(0);
  for (int step = 0; step < steps; ++step) {
    issue(step + 1);
    if (fault == waits_one_stage_early)
      wait_group<2>();
    else if (fault != never_waited)
      wait_group<1>();
    if (fault != no_barrier_after_wait) block_barrier();
    const int stage_read = (fault == reads_the_next_stage ? step + 1 : step) % 2;
    store_global(out + step * threads + self, load_shared(stages + stage_read * threads + (self ^ 1)));
    block_barrier();
  }
}

__global__ void small_copies(std::uint32_t* out, const std::uint32_t* in) {
  std::uint32_t* words = dynamic_shared<std::uint32_t>();
  const int self = thread_id();
  cp_async<4>(words + self, in + self, self % 5);
  cp_async<8>(words + 32 + 2 * self, in + 2 * self, self % 9);
  wait_all();
  store_global(out + self, load_shared(words + self));
  store_global(reinterpret_cast<Vector8*>(out + 32) + self, load_shared(reinterpret_cast<Vector8*>(words + 32) + self));
}

enum Misplaced { in_place, global_load, global_store, shared_load, shared_store, copy_source, copy_destination,
                 matrix_row, outside_shared, global_atomic };
__global__ void misplaced(char* global, int fault) {
  char* shared = dynamic_shared<char>();
  std::uint32_t fragment[1];
  if (lane_id() < 8) {
    for (int i = 0; i < 4; ++i) store_shared(reinterpret_cast<int*>(shared + 16 * lane_id()) + i, 0);
  }
  warp_barrier();
  if (lane_id() == 4) {
    if (fault == global_load) load_global(reinterpret_cast<Vector16*>(global + 8));
    if (fault == global_store) store_global(reinterpret_cast<int*>(global + 2), 1);
    if (fault == global_atomic) atomic_add(reinterpret_cast<float*>(global + 2), 1.0f);
    if (fault == shared_load) load_shared(reinterpret_cast<Vector16*>(shared + 4));
    if (fault == shared_store) store_shared(reinterpret_cast<Vector8*>(shared + 4), {});
    if (fault == copy_source) cp_async<8>(shared, global + 4);
    if (fault == copy_destination) cp_async<16>(shared + 8, global);
    if (fault == outside_shared) load_shared(reinterpret_cast<int*>(shared + 128));
  }
  ldmatrix<1>(fragment, shared + 16 * (lane_id() % 8) + (fault == matrix_row && lane_id() == 4 ? 8 : 0));
}

// Each lane touches the element at `stride` times its lane.
template <typename T>
__global__ void strided(int stride, int repeats) {
  T* elements = dynamic_shared<T>();
  for (int i = 0; i < repeats; ++i) store_shared(elements + stride * lane_id(), T{});
  warp_barrier();
  for (int i = 0; i < repeats; ++i) load_shared(elements + stride * lane_id());
}

// Reads a 64 x 64 tile of 16-bit elements by ldmatrix, plainly laid out or with the 16-byte pieces of a row permuted.
__global__ void read_tile(std::uint32_t* out, const Vector16* in, int swizzled) {
  Vector16* tile = dynamic_shared<Vector16>();
  const auto place = [=](int row, int piece) { return tile + 8 * row + (swizzled ? piece ^ row % 8 : piece); };
  for (int i = lane_id(); i < rows_of_tile * 8; i += 32) store_shared(place(i / 8, i % 8), load_global(in + i));
  warp_barrier();
  for (int row = 0; row < rows_of_tile; row += 16) {
    for (int piece = 0; piece < 8; piece += 2) {
      std::uint32_t fragment[4];
      ldmatrix<4>(fragment, place(row + lane_id() % 16, piece + lane_id() / 16));
      for (int i = 0; i < 4; ++i) store_global(out + 32 * i + lane_id(), fragment[i]);
      out += 128;
    }
  }
}

template <int Count, bool Transposed>
__global__ void load_fragments(std::uint32_t* out, const Vector16* in) {
  Vector16* rows = dynamic_shared<Vector16>();
  store_shared(rows + lane_id(), load_global(in + lane_id()));
  warp_barrier();
  std::uint32_t fragment[Count];
  if constexpr (Transposed)
    ldmatrix_trans<Count>(fragment, rows + lane_id());
  else
    ldmatrix<Count>(fragment, rows + lane_id());
  for (int i = 0; i < Count; ++i) store_global(out + Count * lane_id() + i, fragment[i]);
}

// The registers of each lane as they are given: a (32, 4), b (32, 2), c (32, 4).
template <typename Element>
__global__ void multiply(float* c, const std::uint32_t* a, const std::uint32_t* b, int fault) {
  c += 4 * lane_id();
  a += 4 * lane_id();
  b += 2 * lane_id();
  if (fault && lane_id() == 1) {
    mma_m16n8k8_tf32(c, a, b);
  } else if constexpr (std::is_same_v<Element, float>) {
    mma_m16n8k8_tf32(c, a, b);
  } else {
    mma_m16n8k16<Element>(c, a, b);
  }
}

// 0 exp2, 1 log2, 2 rcp, 3 tf32, 4 bf16 there and back, 5 f16 there and back, 6 packed bf16, 7 packed f16
__global__ void convert(std::uint32_t* out, const float* in, int count, int function) {
  union Bits {
    float number;
    std::uint32_t word;
  };
  for (int i = thread_id(); i < count; i += static_cast<int>(blockDim.x)) {
    const float x = in[i];
    Bits result{0.0f};
    if (function == 0) result.number = exp2_approx(x);
    if (function == 1) result.number = log2_approx(x);
    if (function == 2) result.number = rcp_approx(x);
    if (function == 3) result.word = to_tf32(x);
    if (function == 4) result.number = to_float(from_float<bf16>(x));
    if (function == 5) result.number = to_float(from_float<f16>(x));
    if (function == 6) result.word = pack<bf16>(x, 1.0f);
    if (function == 7) result.word = pack<f16>(x, 1.0f);
    store_global(out + i, result.word);
  }
}

// Row sums of exp2(X Y^T) for bf16 X (N, 64), Y (M, 64), N and M multiples of 64: a block of four warps owns 64 rows,
// walks Y in two swizzled stages, and does the work of a product twice more, as a fused gradient would.
__global__ void exp2_row_sums(float* out, const Vector16* x, const Vector16* y, int columns) {
  Vector16* anchors = dynamic_shared<Vector16>();
  Vector16* candidates = anchors + rows_of_tile * 8;
  const auto place = [](Vector16* tile, int row, int piece) { return tile + 8 * row + (piece ^ row % 8); };
  const auto fetch = [&](Vector16* tile, const Vector16* rows) {
    for (int i = thread_id(); i < rows_of_tile * 8; i += 128) cp_async<16>(place(tile, i / 8, i % 8), rows + i);
    commit_group();
  };
  fetch(anchors, x + blockIdx.x * rows_of_tile * 8);
  fetch(candidates, y);
  float sums[2] = {};
  const int first_row = 16 * warp_id(), tiles = columns / rows_of_tile;
  for (int step = 0; step < tiles; ++step) {
    Vector16* tile = candidates + step % 2 * rows_of_tile * 8;
    if (step + 1 < tiles) fetch(candidates + (step + 1) % 2 * rows_of_tile * 8, y + (step + 1) * rows_of_tile * 8);
    else commit_group();
    wait_group<1>();
    block_barrier();
    for (int product = 0; product < 3; ++product) {
      float scores[8][4] = {};
      for (int k = 0; k < 4; ++k) {
        std::uint32_t a[4];
        ldmatrix<4>(a, place(anchors, first_row + lane_id() % 16, 2 * k + lane_id() / 16));
        for (int n = 0; n < 8; n += 2) {
          std::uint32_t b[4];
          ldmatrix<4>(b, place(tile, 8 * n + lane_id() % 8 + lane_id() / 16 * 8, 2 * k + lane_id() / 8 % 2));
          mma_m16n8k16<bf16>(scores[n], a, b);
          mma_m16n8k16<bf16>(scores[n + 1], a, b + 2);
        }
      }
      for (int n = 0; n < 8; ++n)
        for (int i = 0; i < 4; ++i) sums[i / 2] += product == 0 ? exp2_approx(scores[n][i]) : 0.0f;
    }
    block_barrier();
  }
  for (int half = 0; half < 2; ++half) {
    for (int distance = 1; distance < 4; distance *= 2) sums[half] += shuffle_xor(sums[half], distance);
    if (lane_id() % 4 == 0) atomic_add(out + blockIdx.x * rows_of_tile + first_row + lane_id() / 4 + 8 * half, sums[half]);
  }
}

}  // namespace self_test

#ifdef CONTRASTILE_HOST_EXECUTION
#include "self_test_exports.h"
#else
namespace self_test {
template __global__ void strided<float>(int, int);
template __global__ void load_fragments<4, true>(std::uint32_t*, const Vector16*);
template __global__ void multiply<bf16>(float*, const std::uint32_t*, const std::uint32_t*, int);
template __global__ void multiply<f16>(float*, const std::uint32_t*, const std::uint32_t*, int);
template __global__ void multiply<float>(float*, const std::uint32_t*, const std::uint32_t*, int);
}  // namespace self_test
#endif
