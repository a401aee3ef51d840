// A sum of exponentials kept as (maximum, sum), and what a softmax makes of it.
// O(N) work in double.
#pragma once

#include <cmath>
#include <limits>

namespace contrastile::cpu {

template <class Real>
inline constexpr Real minus_infinity = -std::numeric_limits<Real>::infinity();

// (max, sum) += (other_max, other_sum). A NaN sum stays NaN.
template <class Real>
void merge_running_sum(Real& max, Real& sum, Real other_max, Real other_sum) {
  const Real largest = other_max > max ? other_max : max;
  if (largest == minus_infinity<Real>) {
    sum += other_sum;
    return;
  }
  sum = sum * std::exp(max - largest) + other_sum * std::exp(other_max - largest);
  max = largest;
}

// Weights exp(s - shift) * gain of one row's softmax, times its `share` of the
// loss, and the positive's coefficient p - 1, which is minus the mass of the
// negatives and therefore keeps its digits when p is close to 1.
template <class Real>
struct SoftmaxRow {
  Real shift;
  Real gain;
  Real positive_coeff;
};

template <class Real>
SoftmaxRow<Real> softmax_row(Real negatives_max, Real negatives_sum, Real positive_logit, double share) {
  const double largest = negatives_max > positive_logit ? negatives_max : positive_logit;
  if (largest == minus_infinity<double>) {
    const Real zero_or_nan = negatives_sum * Real(0);
    return {Real(0), zero_or_nan, zero_or_nan};
  }
  const double negatives = negatives_sum * std::exp(negatives_max - largest);
  const double total = negatives + std::exp(positive_logit - largest);
  return {Real(largest), Real(share / total), Real(-share * negatives / total)};
}

}  // namespace contrastile::cpu
