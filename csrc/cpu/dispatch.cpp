// Chooses the instruction set once per process.
#include <cstdlib>
#include <string_view>

#include "vector_kernels.h"

namespace contrastile::cpu {

namespace generic {
extern const VectorIsa isa;
}
#if defined(__x86_64__)
namespace avx2 {
extern const VectorIsa isa;
}
namespace avx512 {
extern const VectorIsa isa;
}
#endif

namespace {

const VectorIsa& choose() {
  const char* named = std::getenv("CONTRASTILE_ISA");
  const std::string_view limit = named ? named : "avx512";
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (limit == "avx512" && has_avx512) return avx512::isa;
  if ((limit == "avx512" || limit == "avx2") && has_avx2) return avx2::isa;
#endif
  return generic::isa;
}

}  // namespace

const VectorIsa& vector_isa() {
  static const VectorIsa& chosen = choose();
  return chosen;
}

template <>
const VectorKernels<float>& vector_kernels<float>() {
  return vector_isa().single;
}

template <>
const VectorKernels<double>& vector_kernels<double>() {
  return vector_isa().twice;
}

}  // namespace contrastile::cpu
