// Coefficients of gain * sum_i (logsumexp_j s_ij - s_i,pos), and of the same
// over columns, from the statistics.
#pragma once

#include <cstdint>
#include <vector>

#include "running_sum.h"
#include "sweeps.h"

namespace contrastile::cpu {

template <class Real>
class SoftmaxWeights {
 public:
  // cols = 0: no softmax over columns. positives: null, or each row's column.
  SoftmaxWeights(std::int64_t rows, std::int64_t cols, const std::int64_t* positives, bool triangle, double gain)
      : positives_(positives),
        gain_(gain),
        row_shift_(rows),
        row_gain_(rows),
        positive_coeff_(rows),
        col_shift_(cols),
        col_gain_(cols),
        triangle_(triangle) {}

  void normalise_rows(std::int64_t begin, std::int64_t end, const std::vector<Real>& max, const std::vector<Real>& sum,
                      const std::vector<Real>& positive_logit) {
    for (std::int64_t i = begin; i < end; ++i) {
      const SoftmaxRow<Real> row = softmax_row(max[i], sum[i], positive_logit[i], gain_);
      row_shift_[i] = row.shift;
      row_gain_[i] = row.gain;
      positive_coeff_[i] = row.positive_coeff;
    }
  }

  void normalise_columns(const std::vector<Real>& max, const std::vector<Real>& sum,
                         const std::vector<Real>& positive_logit) {
    std::vector<Real> col_positive(col_shift_.size(), minus_infinity<Real>);
    if (positives_)
      for (std::size_t i = 0; i < row_shift_.size(); ++i) col_positive[positives_[i]] = positive_logit[i];
    std::vector<Real> col_coeff(col_shift_.size());
    for (std::size_t j = 0; j < col_shift_.size(); ++j) {
      const SoftmaxRow<Real> col = softmax_row(max[j], sum[j], col_positive[j], gain_);
      col_shift_[j] = col.shift;
      col_gain_[j] = col.gain;
      col_coeff[j] = col.positive_coeff;
    }
    add_other_end(col_coeff);
  }

  // One triangle: s_ij = s_ji, so that C_ij = p_ij + p_ji and the rows' weights
  // are the columns' too.
  void mirror() {
    const std::vector<Real> one_end = positive_coeff_;
    add_other_end(one_end);
  }

  GivenWeights<Real> weights() const {
    const bool has_cols = !col_shift_.empty();
    return {row_shift_.data(),
            row_gain_.data(),
            triangle_  ? row_shift_.data()
            : has_cols ? col_shift_.data()
                       : nullptr,
            triangle_  ? row_gain_.data()
            : has_cols ? col_gain_.data()
                       : nullptr,
            positives_ ? positive_coeff_.data() : nullptr,
            WeightFunction::softmax};
  }

 private:
  void add_other_end(const std::vector<Real>& coeff) {
    if (!positives_) return;
    for (std::size_t i = 0; i < positive_coeff_.size(); ++i) positive_coeff_[i] += coeff[positives_[i]];
  }

  const std::int64_t* positives_;
  double gain_;
  std::vector<Real> row_shift_, row_gain_, positive_coeff_, col_shift_, col_gain_;
  bool triangle_;
};

}  // namespace contrastile::cpu
