// Chooses the instruction set. Every set is a namespace, filled by
// vector_kernels.cpp, product_kernels.cpp, row_kernels.cpp and
// prefix_kernels.cpp.
#include <cstdlib>
#include <string_view>

#include "isa.h"

#define CONTRASTILE_DECLARE_ISA(set)                          \
  namespace contrastile::cpu::set {                           \
  extern const VectorKernels<float> vector_kernels_single;    \
  extern const VectorKernels<double> vector_kernels_double;   \
  extern const ProductKernels<float> product_kernels_single;  \
  extern const ProductKernels<double> product_kernels_double; \
  extern const RowKernels<float> row_kernels_single;          \
  extern const RowKernels<double> row_kernels_double;         \
  extern const PrefixKernels<float> prefix_kernels_single;    \
  extern const PrefixKernels<double> prefix_kernels_double;   \
  double fma_rate(double seconds);                            \
  }                                                           \
  namespace contrastile::cpu {                                \
  static const Isa set##_isa = {#set,                         \
                                &set::vector_kernels_single,  \
                                &set::vector_kernels_double,  \
                                &set::product_kernels_single, \
                                &set::product_kernels_double, \
                                &set::row_kernels_single,     \
                                &set::row_kernels_double,     \
                                &set::prefix_kernels_single,  \
                                &set::prefix_kernels_double,  \
                                &set::fma_rate};              \
  }

CONTRASTILE_DECLARE_ISA(generic)
#if defined(__x86_64__)
CONTRASTILE_DECLARE_ISA(avx2)
CONTRASTILE_DECLARE_ISA(avx512)
#endif

namespace contrastile::cpu {

namespace {

const Isa& choose() {
  const char* named = std::getenv("CONTRASTILE_ISA");
  const std::string_view limit = named ? named : "avx512";
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (limit == "avx512" && has_avx512) return avx512_isa;
  if ((limit == "avx512" || limit == "avx2") && has_avx2) return avx2_isa;
#endif
  return generic_isa;
}

}  // namespace

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

template <>
const VectorKernels<float>& vector_kernels<float>() {
  return *isa().vector_single;
}

template <>
const VectorKernels<double>& vector_kernels<double>() {
  return *isa().vector_double;
}

template <>
const ProductKernels<float>& product_kernels<float>() {
  return *isa().product_single;
}

template <>
const ProductKernels<double>& product_kernels<double>() {
  return *isa().product_double;
}

template <>
const RowKernels<float>& row_kernels<float>() {
  return *isa().row_single;
}

template <>
const RowKernels<double>& row_kernels<double>() {
  return *isa().row_double;
}

template <>
const PrefixKernels<float>& prefix_kernels<float>() {
  return *isa().prefix_single;
}

template <>
const PrefixKernels<double>& prefix_kernels<double>() {
  return *isa().prefix_double;
}

}  // namespace contrastile::cpu
