// Starts a kernel on a stream, and turns a refusal into an exception that names the kernel and its shape. On a host it
// runs at once.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.h"
#include "kernels.h"

namespace contrastile::cuda {

#ifdef CONTRASTILE_HOST_EXECUTION
using host::launch;
#else

inline void check(cudaError_t error, const char* kernel, int blocks, int threads, int shared_bytes) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA kernel ") + kernel + " (" + std::to_string(blocks) + " blocks of " +
                           std::to_string(threads) + " threads, " + std::to_string(shared_bytes) +
                           " bytes of shared memory): " + cudaGetErrorString(error));
}

template <auto Kernel, class... Arguments>
void launch(const char* name, int blocks, int threads, int shared_bytes, Stream stream,
            const Arguments&... arguments) {
  check(cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name, blocks, threads,
        shared_bytes);
  Kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  check(cudaGetLastError(), name, blocks, threads, shared_bytes);
}

#endif

}  // namespace contrastile::cuda
