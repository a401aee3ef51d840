// Matrix products: a BLAS handed over at run time as two function pointers, so that nothing is linked.
#pragma once

#include <cstdint>

namespace contrastile::cpu {

// cblas_sgemm and cblas_dgemm with 32-bit integers. They must run in the calling thread.
template <class Real>
using CblasGemm = void (*)(int order, int transpose_a, int transpose_b, int m, int n, int k, Real alpha, const Real* a,
                           int lda, const Real* b, int ldb, Real beta, Real* c, int ldc);

struct Blas {
  CblasGemm<float> sgemm = nullptr;
  CblasGemm<double> dgemm = nullptr;
};

// Set once, before the first sweep.
Blas& blas();

enum class Transpose : int { no = 111, yes = 112 };   // CBLAS_TRANSPOSE

// Row-major (rows, row_stride) or its transpose, as one operand of a product.
template <class Real>
struct Operand {
  const Real* data;
  std::int64_t row_stride;
  Transpose transpose = Transpose::no;
};

enum class Accumulate { no, yes };

// target (m, n) = a (m, k) * b (k, n), or added to it.
template <class Real>
void multiply(std::int64_t m, std::int64_t n, std::int64_t k, Operand<Real> a, Operand<Real> b, Accumulate accumulate,
              Real* target, std::int64_t target_stride) {
  constexpr int row_major = 101;
  const auto run = [&](auto gemm) {
    gemm(row_major, int(a.transpose), int(b.transpose), int(m), int(n), int(k), Real(1), a.data, int(a.row_stride),
         b.data, int(b.row_stride), Real(accumulate == Accumulate::yes), target, int(target_stride));
  };
  if constexpr (sizeof(Real) == sizeof(float))
    run(blas().sgemm);
  else
    run(blas().dgemm);
}

}  // namespace contrastile::cpu
