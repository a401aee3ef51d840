// The kernels that depend on the processor's instruction set, chosen once per
// process.
#pragma once

#include "prefix_kernels.h"
#include "product_kernels.h"
#include "row_kernels.h"
#include "vector_kernels.h"

namespace contrastile::cpu {

struct Isa {
  const char* name;
  const VectorKernels<float>* vector_single;
  const VectorKernels<double>* vector_double;
  const ProductKernels<float>* product_single;
  const ProductKernels<double>* product_double;
  const RowKernels<float>* row_single;
  const RowKernels<double>* row_double;
  const PrefixKernels<float>* prefix_single;
  const PrefixKernels<double>* prefix_double;
  // Fused multiply-adds on registers alone for about `seconds`; flop/s of the
  // calling thread.
  double (*fma_rate)(double seconds);
};

// The widest instruction set that this processor has;
// CONTRASTILE_ISA=generic|avx2|avx512 lowers it.
const Isa& isa();

}  // namespace contrastile::cpu
