// The one way from a kernel to the hardware: thin wrappers over CUDA and PTX for sm_80 and later. With
// CONTRASTILE_HOST_EXECUTION defined the same names come from an execution layer that runs kernels on a processor.
//
//   where am I      lane_id, warp_id, and CUDA's threadIdx, blockIdx, blockDim, gridDim
//   shared memory   dynamic_shared, load_shared, store_shared: what other threads see passes through these two
//   global memory   load_global, store_global: aligned to the size of the type, Vector16 for 16 bytes
//   barriers        block_barrier, named_barrier, named_barrier_arrive, warp_barrier
//   lanes           shuffle, shuffle_xor, shuffle_up, shuffle_down, vote_any, vote_all, vote_ballot
//   atomics         atomic_add (relaxed, global memory), thread_fence
//   async copies    cp_async, commit_group, wait_group, wait_all
//   matrices        ldmatrix, ldmatrix_trans, mma_m16n8k16, mma_m16n8k8_tf32
//   numbers         exp2_approx, log2_approx, rcp_approx, from_float, to_float, pack, to_tf32
//
// Shuffles, votes, matrix loads and products order no memory between threads: only barriers do.
#pragma once

#include <cstdint>
#include <type_traits>

namespace contrastile::device {

struct bf16 {
  std::uint16_t bits;
};

struct f16 {
  std::uint16_t bits;
};

struct alignas(16) Vector16 {
  std::uint32_t words[4];
};

struct alignas(8) Vector8 {
  std::uint32_t words[2];
};

inline constexpr int warp_size = 32;
inline constexpr unsigned full_warp = 0xffffffffu;
inline constexpr int named_barriers = 16;  // number 0 is the one of block_barrier

}  // namespace contrastile::device

#ifdef CONTRASTILE_HOST_EXECUTION
#include "execution.h"
#else

namespace contrastile::device {

__device__ __forceinline__ int thread_id() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}
__device__ __forceinline__ int lane_id() { return thread_id() % warp_size; }
__device__ __forceinline__ int warp_id() { return thread_id() / warp_size; }

// The block's shared memory, `offset` bytes from its start; its size is the launch's.
template <typename T>
__device__ __forceinline__ T* dynamic_shared(int offset = 0) {
  extern __shared__ __align__(128) unsigned char block_shared_memory[];
  return reinterpret_cast<T*>(block_shared_memory + offset);
}

template <typename T>
__device__ __forceinline__ T load_shared(const T* address) {
  return *address;
}

template <typename T>
__device__ __forceinline__ void store_shared(T* address, std::type_identity_t<T> value) {
  *address = value;
}

template <typename T>
__device__ __forceinline__ T load_global(const T* address) {
  return *address;
}

template <typename T>
__device__ __forceinline__ void store_global(T* address, std::type_identity_t<T> value) {
  *address = value;
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void block_barrier() { __syncthreads(); }

// `threads` is a multiple of 32 and counts those that arrive as well as those that wait.
__device__ __forceinline__ void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ __forceinline__ void warp_barrier(unsigned lanes = full_warp) { __syncwarp(lanes); }

template <typename T>
__device__ __forceinline__ T shuffle(T value, int lane, unsigned lanes = full_warp) {
  return __shfl_sync(lanes, value, lane);
}
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask, unsigned lanes = full_warp) {
  return __shfl_xor_sync(lanes, value, lane_mask);
}
template <typename T>
__device__ __forceinline__ T shuffle_up(T value, int distance, unsigned lanes = full_warp) {
  return __shfl_up_sync(lanes, value, distance);
}
template <typename T>
__device__ __forceinline__ T shuffle_down(T value, int distance, unsigned lanes = full_warp) {
  return __shfl_down_sync(lanes, value, distance);
}

__device__ __forceinline__ bool vote_any(bool yes, unsigned lanes = full_warp) { return __any_sync(lanes, yes); }
__device__ __forceinline__ bool vote_all(bool yes, unsigned lanes = full_warp) { return __all_sync(lanes, yes); }
__device__ __forceinline__ unsigned vote_ballot(bool yes, unsigned lanes = full_warp) {
  return __ballot_sync(lanes, yes);
}

__device__ __forceinline__ float atomic_add(float* address, float value) { return atomicAdd(address, value); }
__device__ __forceinline__ unsigned atomic_add(unsigned* address, unsigned value) { return atomicAdd(address, value); }
__device__ __forceinline__ unsigned long long atomic_add(unsigned long long* address, unsigned long long value) {
  return atomicAdd(address, value);
}
__device__ __forceinline__ void thread_fence() { __threadfence(); }

// Copies `source_bytes` of Bytes and fills the rest with zeros; with 0 the source is not read. The destination
// holds nothing of use from here to the wait that covers the copy.
template <int Bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int source_bytes = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(Bytes),
                 "r"(source_bytes)
                 : "memory");
  }
}
__device__ __forceinline__ void commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies of all groups but the Pending youngest; other threads' copies need a barrier.
template <int Pending>
__device__ __forceinline__ void wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}
__device__ __forceinline__ void wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Count 8 x 8 matrices of 16-bit elements: lane 8 m + r gives the address of row r of matrix m, and receives in
// fragment[m] elements (lane / 4, 2 (lane % 4)) and its right neighbour, of the transpose with ldmatrix_trans.
template <int Count, bool Transposed>
__device__ __forceinline__ void load_matrices(std::uint32_t* fragment, const void* row) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
  const unsigned address = shared_address(row);
  if constexpr (Count == 1 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0]) : "r"(address) : "memory");
  else if constexpr (Count == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0]) : "r"(address) : "memory");
  else if constexpr (Count == 2 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1]) : "r"(address) : "memory");
  else if constexpr (Count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1]) : "r"(address) : "memory");
  else if constexpr (!Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address) : "memory");
}
template <int Count>
__device__ __forceinline__ void ldmatrix(std::uint32_t* fragment, const void* row) {
  load_matrices<Count, false>(fragment, row);
}
template <int Count>
__device__ __forceinline__ void ldmatrix_trans(std::uint32_t* fragment, const void* row) {
  load_matrices<Count, true>(fragment, row);
}

// accumulator[4] += a[4] b[2]: 16 x 16 by 16 x 8 of bf16 or f16, accumulated in fp32.
template <typename Element>
__device__ __forceinline__ void mma_m16n8k16(float* accumulator, const std::uint32_t* a, const std::uint32_t* b) {
  static_assert(std::is_same_v<Element, bf16> || std::is_same_v<Element, f16>);
  if constexpr (std::is_same_v<Element, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// accumulator[4] += a[4] b[2]: 16 x 8 by 8 x 8 of tf32 as to_tf32 gives it, accumulated in fp32.
__device__ __forceinline__ void mma_m16n8k8_tf32(float* accumulator, const std::uint32_t* a, const std::uint32_t* b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float log2_approx(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float rcp_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) {
  return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float to_float(f16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

// To the nearest, ties to even.
template <typename Element>
__device__ __forceinline__ Element from_float(float value) {
  if constexpr (std::is_same_v<Element, float>) {
    return value;
  } else {
    Element result;
    if constexpr (std::is_same_v<Element, bf16>)
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    else
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
  }
}

// Two elements in a register, `low` in the lower half.
template <typename Element>
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
  std::uint32_t result;
  if constexpr (std::is_same_v<Element, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// To the nearest of 10 fraction bits, ties away from zero.
__device__ __forceinline__ std::uint32_t to_tf32(float value) {
  std::uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
}

}  // namespace contrastile::device

#endif
