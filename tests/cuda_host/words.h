// CUDA's words for a host compiler. `__shared__` has no counterpart: kernels use dynamic_shared.
#pragma once

#define __global__
#define __grid_constant__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread that runs; the scheduler sets them at every switch.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
