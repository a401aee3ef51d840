// Comparison of a sweep's results with the truth.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <string>
#include <vector>

#include "dense_truth.h"

namespace contrastile::test {

struct Judge {
  double tolerance;
  std::string failure;

  // |ours - truth| <= tolerance * (size + 1) everywhere, NaN exactly where the truth has it.
  template <class Real>
  void compare(const char* name, const std::vector<Real>& ours, const Vector& truth, const Vector& size) {
    for (std::size_t k = 0; k < ours.size(); ++k) {
      const double error = std::abs(double(ours[k]) - truth[k]);
      const bool same = std::isnan(truth[k]) ? std::isnan(ours[k])
                                             : double(ours[k]) == truth[k] || error <= tolerance * (size[k] + 1);
      if (same || !failure.empty()) continue;
      char text[200];
      std::snprintf(text, sizeof text, "%s[%zu of %zu] is %.9g, expected %.9g", name, k, ours.size(), double(ours[k]),
                    truth[k]);
      failure = text;
    }
  }
};

inline Vector magnitudes(Vector values) {
  for (double& value : values) value = std::abs(value);
  return values;
}

template <class Real>
std::vector<Real> log_sums(const std::vector<Real>& max, const std::vector<Real>& sum) {
  std::vector<Real> out(max.size());
  // Without negatives: maximum -inf and sum 0, hence -inf; a NaN sum stays NaN.
  for (std::size_t i = 0; i < max.size(); ++i) out[i] = (std::isinf(max[i]) ? Real(0) : max[i]) + std::log(sum[i]);
  return out;
}

inline Vector logs(const Vector& sums) {
  Vector out;
  for (const double sum : sums) out.push_back(std::log(sum));
  return out;
}

}  // namespace contrastile::test
