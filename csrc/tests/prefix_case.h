// A random case of the sweep over prefixes: every prefix as a dense problem of its own, its gradient taken through the
// norms of its rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "cpu/prefix_sweep.h"
#include "dense_truth.h"
#include "judge.h"
#include "random_embeddings.h"

namespace contrastile::test {

template <class Real>
class PrefixCase {
 public:
  PrefixCase(Random& random, ElementType type) : random_(random) {
    judge_.tolerance = sizeof(Real) == sizeof(float) ? 2e-4 : 1e-10;
    rows_ = random.one_of<std::int64_t>({1, 2, 3, 17, 63, 64, 65, 100, 129, 257, 300, 520});
    columns_ = random.chance(0.5);
    cols_ = rows_ + (columns_ ? 0 : random.one_of<std::int64_t>({0, 1, 31, 200}));
    const std::int64_t most = std::max<std::int64_t>(1, 600'000 / (rows_ * cols_));
    depth_ = std::min(most, random.one_of<std::int64_t>({1, 3, 16, 48, 100, 257, 520}));
    anchors_ = random_embeddings<Real>(random, rows_, depth_, type, x_);
    candidates_ = random_embeddings<Real>(random, cols_, depth_, type, y_);
    std::set<std::int64_t> ends{depth_};
    for (std::int64_t prefixes = random.below(4); prefixes > 0; --prefixes) ends.insert(1 + random.below(depth_));
    ends_.assign(ends.begin(), ends.end());
    for (std::size_t k = 0; k < ends_.size(); ++k) gains_.push_back(random.one_of({0.0, 0.25, 1.0}));
    normalize_ = random.chance(0.6);
    positives_ = random.permutation(rows_, cols_);
    for (std::int64_t i = 0; i < rows_; ++i)
      scale_.push_back(Real(random.uniform(1, 8) / (normalize_ ? 1 : std::sqrt(double(depth_)))));
    scale_.shrink_to_fit();
    execution_ = {int(1 + random.below(8)), random.one_of<std::int64_t>({0, 1 << 16, 600'000, 1 << 26})};
  }

  std::string run() {
    const Real nan = std::numeric_limits<Real>::quiet_NaN();
    const std::int64_t count = std::int64_t(ends_.size());
    std::vector<Real> row_max(count * rows_, nan), row_sum = row_max, positive_logit = row_max;
    std::vector<Real> col_max(columns_ ? count * cols_ : 0, nan), col_sum = col_max;
    std::vector<Real> dx(random_.chance(0.8) ? rows_ * depth_ : 0, nan),
        dy(random_.chance(0.8) ? cols_ * depth_ : 0, nan);
    std::vector<Real> moment(random_.chance(0.5) ? rows_ : 0, nan);
    const auto given = [](std::vector<Real>& v) { return v.empty() ? nullptr : v.data(); };
    const cpu::PrefixProblem<Real> problem{anchors_.view, candidates_.view, scale_.data(), positives_.data(),
                                           ends_,         gains_,           columns_,      normalize_};
    const cpu::PrefixResults<Real> results{row_max.data(),        row_sum.data(), given(col_max), given(col_sum),
                                           positive_logit.data(), given(dx),      given(dy),      given(moment)};
    cpu::prefix_softmax(problem, results, execution_);

    for (Vector* of_x : {&dx_, &dx_size_}) of_x->assign(rows_ * depth_, 0);
    for (Vector* of_y : {&dy_, &dy_size_}) of_y->assign(cols_ * depth_, 0);
    for (Vector* of_row : {&moment_, &moment_size_}) of_row->assign(rows_, 0);
    for (std::int64_t k = 0; k < count; ++k) {
      const DenseStats stats = add_prefix(ends_[k], gains_[k]);
      const auto part = [k](const std::vector<Real>& of_all, std::int64_t size) {
        return of_all.empty() ? of_all : std::vector<Real>(of_all.begin() + k * size, of_all.begin() + (k + 1) * size);
      };
      const Vector row_lse = logs(stats.row_sum), col_lse = logs(stats.col_sum);
      judge_.compare("row log-sum-exp", log_sums(part(row_max, rows_), part(row_sum, rows_)), row_lse,
                     magnitudes(row_lse));
      judge_.compare("column log-sum-exp", log_sums(part(col_max, cols_), part(col_sum, cols_)), col_lse,
                     magnitudes(col_lse));
      judge_.compare("positive logit", part(positive_logit, rows_), stats.positive_logit,
                     magnitudes(stats.positive_logit));
    }
    judge_.compare("dX", dx, dx_, dx_size_);
    judge_.compare("dY", dy, dy_, dy_size_);
    judge_.compare("moment", moment, moment_, moment_size_);
    return judge_.failure;
  }

  std::string describe() const {
    char text[200];
    std::snprintf(text, sizeof text,
                  "prefixes: N %lld, M %lld, D %lld, %lld prefixes, type %d, %s%s%d threads, %lld bytes",
                  (long long)rows_, (long long)cols_, (long long)depth_, (long long)ends_.size(),
                  int(anchors_.view.type), columns_ ? "columns, " : "", normalize_ ? "unit rows, " : "",
                  execution_.threads, (long long)execution_.workspace_bytes);
    return text;
  }

 private:
  static constexpr double least_norm = 1e-12;

  // Adds one prefix's loss to the truth.
  DenseStats add_prefix(std::int64_t length, double gain) {
    Vector x_norm, y_norm;
    DenseProblem p{rows_, cols_, length};
    p.x = prefix_of(x_, rows_, length, x_norm);
    p.y = prefix_of(y_, cols_, length, y_norm);
    p.scale.assign(scale_.begin(), scale_.end());
    p.positives = positives_;
    const DenseStats stats = dense_stats(p);
    const DenseGrads grads = dense_grads(p, stats, softmax_weights(p, stats, columns_, false, gain));
    add_through_norms(p.x, x_norm, length, grads.dx, grads.dx_size, dx_, dx_size_);
    add_through_norms(p.y, y_norm, length, grads.dy, grads.dy_size, dy_, dy_size_);
    for (std::int64_t i = 0; i < rows_; ++i) {
      moment_[i] += grads.moment[i];
      moment_size_[i] += grads.moment_size[i];
    }
    return stats;
  }

  // (rows, length), of unit length if asked. norms: what they were divided by.
  Vector prefix_of(const Vector& all, std::int64_t rows, std::int64_t length, Vector& norms) const {
    Vector out;
    for (std::int64_t i = 0; i < rows; ++i) {
      double square = 0;
      for (std::int64_t k = 0; k < length; ++k) square += all[i * depth_ + k] * all[i * depth_ + k];
      norms.push_back(normalize_ ? std::max(std::sqrt(square), least_norm) : 1.0);
      for (std::int64_t k = 0; k < length; ++k) out.push_back(all[i * depth_ + k] / norms[i]);
    }
    return out;
  }

  void add_through_norms(const Vector& unit, const Vector& norms, std::int64_t length, const Vector& gradient,
                         const Vector& size, Vector& total, Vector& total_size) const {
    for (std::size_t i = 0; i < norms.size(); ++i) {
      double radial = 0, radial_size = 0;
      const bool through_norm = normalize_ && norms[i] > least_norm;  // at the bound it is a constant
      for (std::int64_t k = 0; through_norm && k < length; ++k) {
        radial += gradient[i * length + k] * unit[i * length + k];
        radial_size += size[i * length + k] * std::abs(unit[i * length + k]);
      }
      for (std::int64_t k = 0; k < length; ++k) {
        const double u = unit[i * length + k];
        total[i * depth_ + k] += (gradient[i * length + k] - radial * u) / norms[i];
        total_size[i * depth_ + k] += (size[i * length + k] + radial_size * std::abs(u)) / norms[i];
      }
    }
  }

  Random& random_;
  Judge judge_;
  std::int64_t rows_, cols_, depth_;
  bool columns_, normalize_;
  Embeddings<Real> anchors_, candidates_;
  Vector x_, y_;
  std::vector<std::int64_t> ends_;
  std::vector<double> gains_;
  Ids positives_;
  std::vector<Real> scale_;
  cpu::Execution execution_;
  Vector dx_, dx_size_, dy_, dy_size_, moment_, moment_size_;
};

}  // namespace contrastile::test
