// Memory that kernels and the host both see: CUDA's managed memory, or plain memory where kernels run on a processor.
#pragma once

#include <cstddef>
#include <new>
#include <span>

#ifdef CONTRASTILE_HOST_EXECUTION
#include <cstdlib>
#else
#include <cuda_runtime.h>
#endif

namespace example {

#ifdef CONTRASTILE_HOST_EXECUTION
inline void* allocate(std::size_t bytes) { return std::malloc(bytes); }
inline void release(void* memory) { std::free(memory); }
inline bool wait_for_device() { return true; }  // a launch is over when it returns
#else
inline void* allocate(std::size_t bytes) {
  void* memory = nullptr;
  return cudaMallocManaged(&memory, bytes) == cudaSuccess ? memory : nullptr;
}
inline void release(void* memory) { cudaFree(memory); }
inline bool wait_for_device() { return cudaDeviceSynchronize() == cudaSuccess; }
#endif

template <class T>
class ManagedArray {
 public:
  explicit ManagedArray(std::size_t size, T value = {})
      : values_(static_cast<T*>(allocate(size * sizeof(T))), size) {
    if (!values_.data()) throw std::bad_alloc();
    for (T& each : values_) each = value;
  }
  ~ManagedArray() { release(values_.data()); }
  ManagedArray(const ManagedArray&) = delete;
  ManagedArray& operator=(const ManagedArray&) = delete;

  T& operator[](std::size_t i) { return values_[i]; }
  T* data() { return values_.data(); }
  operator std::span<const T>() const { return values_; }

 private:
  std::span<T> values_;
};

}  // namespace example
