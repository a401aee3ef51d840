// Runs all sweeps over random problems for AddressSanitizer, UndefinedBehaviorSanitizer and
// ThreadSanitizer, and compares every result with double loops.
//
//     sweep_driver [cases = 200] [first seed = 0]
//
// Every buffer has exactly the size it needs, so that an access beyond it meets a redzone; embeddings are
// strided and the gaps hold NaN. A case is its seed: rerun one with `sweep_driver 1 SEED`.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/sweeps.h"
#include "cpu/vector_kernels.h"
#include "dense_truth.h"
#include "judge.h"
#include "prefix_case.h"
#include "random_embeddings.h"

namespace {

using namespace contrastile::cpu;
using namespace contrastile::test;

template <class Real>
class Case {
 public:
  Case(Random& random, ElementType type) : random_(random) {
    judge_.tolerance = sizeof(Real) == sizeof(float) ? 1e-4 : 1e-11;
    mirrored_ = random.chance(0.3);
    p_.rows = random.one_of<std::int64_t>({1, 2, 3, 17, 63, 64, 65, 100, 129, 257, 300, 520});
    p_.cols = mirrored_ ? p_.rows : p_.rows + random.one_of<std::int64_t>({0, 0, 1, 31, 200});
    const std::int64_t most = std::max<std::int64_t>(1, 2'000'000 / (p_.rows * p_.cols));
    p_.depth = std::min(most, random.one_of<std::int64_t>({1, 3, 16, 48, 96, 100, 257, 300, 520}));
    anchors_ = random_embeddings<Real>(random, p_.rows, p_.depth, type, p_.x);
    choose_scale();
    choose_masks();
    // A masked pair of a NaN row may or may not carry the NaN on, so such rows come without masks.
    if ((mirrored_ || !p_.self_offset) && !p_.row_groups && random.chance(0.2)) spoil_anchor();
    if (mirrored_)
      p_.y = p_.x;
    else
      candidates_ = random_embeddings<Real>(random, p_.cols, p_.depth, type, p_.y);
    if (!mirrored_ && random.chance(0.3))
      for (double ceiling : choose_ceilings(p_)) row_ceiling_.push_back(Real(ceiling));
    row_ceiling_.shrink_to_fit();
    execution_ = {int(1 + random.below(8)), random.one_of<std::int64_t>({0, 1 << 16, 600'000, 1 << 26})};
    truth_ = dense_stats(p_);
  }

  std::string run() {
    statistics();
    softmax_gradient();
    given_gradient();
    return judge_.failure;
  }

  std::string describe() const {
    char text[200];
    std::snprintf(text, sizeof text, "N %lld, M %lld, D %lld, type %d, %s%s%s%s%s%d threads, %lld bytes",
                  (long long)p_.rows, (long long)p_.cols, (long long)p_.depth, int(anchors_.view.type),
                  mirrored_ ? "one triangle, " : "", p_.positives ? "positives, " : "", p_.row_groups ? "groups, " : "",
                  p_.above_ceiling ? "ceilings, " : "", p_.self_offset ? "self masked, " : "", execution_.threads,
                  (long long)execution_.workspace_bytes);
    return text;
  }

 private:
  void spoil_anchor() {
    const std::int64_t row = random_.below(p_.rows), k = random_.below(p_.depth);
    const std::int64_t at = row * anchors_.view.row_stride + k;
    if (anchors_.reals.empty())
      anchors_.halves[at] = nan_half;
    else
      anchors_.reals[at] = std::numeric_limits<Real>::quiet_NaN();
    p_.x[row * p_.depth + k] = std::numeric_limits<double>::quiet_NaN();
  }

  void choose_scale() {
    const double typical = 8 / std::sqrt(double(p_.depth));
    const double uniform = Real(typical * random_.uniform(0.2, 1));
    const bool per_row = !mirrored_ && random_.chance(0.5);
    for (std::int64_t i = 0; i < p_.rows; ++i) {
      scale_.push_back(per_row ? Real(typical * random_.uniform(0.2, 1)) : Real(uniform));
      p_.scale.push_back(scale_.back());
    }
    scale_.shrink_to_fit();
  }

  void choose_masks() {
    const auto groups = [&](std::int64_t size) {
      Ids ids(size);
      for (std::int64_t& id : ids) id = random_.below(1 + size / 3);
      return ids;
    };
    if (mirrored_) {
      p_.self_offset = 0;
      if (p_.rows % 2 == 0 && random_.chance(0.8)) {
        const Ids order = random_.permutation(p_.rows, p_.rows);
        p_.positives = Ids(p_.rows);
        for (std::int64_t i = 0; i < p_.rows; ++i) (*p_.positives)[order[i]] = order[i ^ 1];
      }
      if (random_.chance(0.3)) p_.row_groups = p_.col_groups = groups(p_.rows);
      return;
    }
    if (random_.chance(0.8)) p_.positives = random_.permutation(p_.rows, p_.cols);
    if (random_.chance(0.3)) {
      p_.row_groups = groups(p_.rows);
      p_.col_groups = groups(p_.cols);
    } else if (random_.chance(0.3)) {
      p_.self_offset = random_.below(p_.cols - p_.rows + 1);
      if (p_.positives)  // a positive is never a sample paired with itself
        for (std::int64_t i = 0; i < p_.rows; ++i)
          if ((*p_.positives)[i] == i + *p_.self_offset) return p_.self_offset.reset();
    }
  }

  static const std::int64_t* address(const std::optional<Ids>& ids) { return ids ? ids->data() : nullptr; }

  PairProblem<Real> problem() const {
    return {anchors_.view,          mirrored_ ? anchors_.view : candidates_.view,
            scale_.data(),          address(p_.positives),
            address(p_.row_groups), address(p_.col_groups),
            p_.above_ceiling ? row_ceiling_.data() : nullptr,
            p_.self_offset,         mirrored_};
  }

  // Where statistics go: exact buffers full of NaN.
  struct StatsBuffers {
    std::vector<Real> row_max, row_sum, col_max, col_sum, positive_logit;
    Ids row_rank;
  };

  PairStats<Real> make_stats(StatsBuffers& b, bool columns, bool ranks) const {
    const Real nan = std::numeric_limits<Real>::quiet_NaN();
    b.row_max.assign(p_.rows, nan);
    b.row_sum.assign(p_.rows, nan);
    if (columns) b.col_max.assign(p_.cols, nan), b.col_sum.assign(p_.cols, nan);
    if (p_.positives) b.positive_logit.assign(p_.rows, nan);
    if (ranks) b.row_rank.assign(p_.rows, -1);
    return {b.row_max.data(),
            b.row_sum.data(),
            columns ? b.col_max.data() : nullptr,
            columns ? b.col_sum.data() : nullptr,
            p_.positives ? b.positive_logit.data() : nullptr,
            ranks ? b.row_rank.data() : nullptr};
  }

  void check_stats(const StatsBuffers& b) {
    const Vector row_lse = logs(truth_.row_sum), col_lse = logs(truth_.col_sum);
    judge_.compare("row log-sum-exp", log_sums(b.row_max, b.row_sum), row_lse, magnitudes(row_lse));
    judge_.compare("column log-sum-exp", log_sums(b.col_max, b.col_sum), col_lse, magnitudes(col_lse));
    judge_.compare("positive logit", b.positive_logit, truth_.positive_logit, magnitudes(truth_.positive_logit));
  }

  void statistics() {
    const bool ranks = p_.positives && !mirrored_ && random_.chance(0.5);
    StatsBuffers buffers;
    pair_stats(problem(), make_stats(buffers, random_.chance(0.5), ranks), execution_);
    check_stats(buffers);
    for (std::size_t i = 0; i < buffers.row_rank.size(); ++i) {
      if (std::isnan(truth_.positive_logit[i])) continue;
      // Logits closer than rounding may fall on either side of the positive's.
      Vector bounds(2);
      for (std::int64_t j = 0; j < p_.cols; ++j) {
        const double lead = truth_.logits[i * p_.cols + j] - truth_.positive_logit[i];
        if (p_.kind(i, j) != Pair::negative) continue;
        bounds[0] += !(lead <= 1e-4);  // a NaN counts as above
        bounds[1] += !(lead <= -1e-4);
      }
      const double rank = double(buffers.row_rank[i]);
      if (rank < bounds[0] || rank > bounds[1])
        judge_.compare("rank", std::vector<double>{rank}, Vector{bounds[0]}, Vector{0});
    }
  }

  struct GradBuffers {
    std::vector<Real> dx, dy, moment, row_mass, col_mass, row_weight;
  };

  PairGrads<Real> make_grads(GradBuffers& b, const DenseWeights& weights, bool masses) {
    const Real nan = std::numeric_limits<Real>::quiet_NaN();
    const auto optional = [&](std::vector<Real>& buffer, bool wanted, std::int64_t size) -> Real* {
      if (!wanted) return nullptr;
      buffer.assign(size, nan);
      return buffer.data();
    };
    return {optional(b.dx, mirrored_ || random_.chance(0.8), p_.rows * p_.depth),
            optional(b.dy, !mirrored_ && random_.chance(0.8), p_.cols * p_.depth),
            optional(b.moment, random_.chance(0.5), p_.rows),
            optional(b.row_mass, masses && !weights.row.shift.empty(), p_.rows),
            optional(b.col_mass, masses && !mirrored_ && !weights.col.shift.empty(), p_.cols),
            optional(b.row_weight, weights.function == WeightFunction::sigmoid && !mirrored_ && !weights.row.shift.empty(),
                     p_.rows)};
  }

  void check_grads(const GradBuffers& b, const DenseWeights& weights) {
    const DenseGrads truth = dense_grads(p_, truth_, weights);
    judge_.compare("dX", b.dx, truth.dx, truth.dx_size);
    judge_.compare("dY", b.dy, truth.dy, truth.dy_size);
    judge_.compare("row mass", b.row_mass, truth.row_mass, magnitudes(truth.row_mass));
    judge_.compare("row weight", b.row_weight, truth.row_weight, magnitudes(truth.row_weight));
    judge_.compare("column mass", b.col_mass, truth.col_mass, magnitudes(truth.col_mass));
    if (!mirrored_) return judge_.compare("moment", b.moment, truth.moment, truth.moment_size);
    if (b.moment.empty()) return;
    // One triangle: C counts every pair from both ends, and only the sum over rows is defined.
    const auto total = [](const auto& v) { return std::accumulate(v.begin(), v.end(), 0.0); };
    judge_.compare("sum of moments", std::vector<double>{total(b.moment)}, Vector{total(truth.moment) / 2},
                   Vector{total(truth.moment_size)});
  }

  void softmax_gradient() {
    const bool columns = random_.chance(0.5);
    const double gain = random_.chance(0.5) ? 1.0 : 0.25;
    const DenseWeights weights = softmax_weights(p_, truth_, columns, mirrored_, gain);
    StatsBuffers stats;
    GradBuffers grads;
    pair_grad_softmax(problem(), gain, make_grads(grads, weights, false), make_stats(stats, columns, false),
                      execution_);
    check_stats(stats);
    check_grads(grads, weights);
  }

  // Weights near the softmax's, rounded to Real, so that logits are on both sides of the shifts.
  DenseTerm random_term(const Vector& sums, std::vector<Real>& shift, std::vector<Real>& gain) {
    DenseTerm term;
    for (const double sum : sums) {
      shift.push_back(Real((sum > 0 ? std::log(sum) : 0) + random_.uniform(-2, 1)));
      gain.push_back(Real(random_.uniform(0.5, 1.5)));
    }
    shift.shrink_to_fit();
    gain.shrink_to_fit();
    term.shift.assign(shift.begin(), shift.end());
    term.gain.assign(gain.begin(), gain.end());
    return term;
  }

  void given_gradient() {
    DenseWeights weights;
    std::vector<Real> row_shift, row_gain, col_shift, col_gain, coeff;
    const int directions = mirrored_ ? 0 : int(random_.below(3));  // both, rows, columns
    if (directions != 2) weights.row = random_term(truth_.row_sum, row_shift, row_gain);
    if (mirrored_) {
      weights.col = weights.row;
      col_shift = row_shift;
      col_gain = row_gain;
    } else if (directions != 1) {
      weights.col = random_term(truth_.col_sum, col_shift, col_gain);
    }
    if (p_.positives) {
      coeff.resize(p_.rows);
      for (std::int64_t i = 0; i < p_.rows; ++i) coeff[i] = Real(random_.uniform(-1, 0.5));
      if (mirrored_)
        for (std::int64_t i = 0; i < p_.rows; ++i) coeff[(*p_.positives)[i]] = coeff[i];
      weights.positive_coeff.assign(coeff.begin(), coeff.end());
    }
    weights.function =
        random_.one_of({WeightFunction::exponential, WeightFunction::capped, WeightFunction::sigmoid});
    const auto given = [](const std::vector<Real>& v) { return v.empty() ? nullptr : v.data(); };
    const GivenWeights<Real> handed{given(row_shift), given(row_gain), given(col_shift),
                                    given(col_gain),  given(coeff),    weights.function};
    GradBuffers grads;
    StatsBuffers stats;
    const bool with_stats = random_.chance(0.5);
    pair_grad_given(problem(), handed, make_grads(grads, weights, true),
                    with_stats ? make_stats(stats, random_.chance(0.5), false) : PairStats<Real>{}, execution_);
    if (with_stats) check_stats(stats);
    check_grads(grads, weights);
  }

  Random& random_;
  Judge judge_;
  DenseProblem p_;
  bool mirrored_;
  Embeddings<Real> anchors_, candidates_;
  std::vector<Real> scale_, row_ceiling_;
  Execution execution_;
  DenseStats truth_;
};

template <class Case>
bool passes(Random& random, ElementType type, unsigned seed) {
  Case one(random, type);
  const std::string failure = one.run();
  if (!failure.empty()) std::printf("seed %u (%s): %s\n", seed, one.describe().c_str(), failure.c_str());
  return failure.empty();
}

template <class Real>
bool all_pass(Random& random, ElementType type, unsigned seed) {
  const bool pairs = passes<Case<Real>>(random, type, seed);
  return passes<PrefixCase<Real>>(random, type, seed) && pairs;
}

}  // namespace

int main(int count, char** arguments) {
  const unsigned cases = count > 1 ? unsigned(std::atoi(arguments[1])) : 200;
  const unsigned first = count > 2 ? unsigned(std::atoi(arguments[2])) : 0;
  unsigned failures = 0;
  for (unsigned seed = first; seed < first + cases; ++seed) {
    Random random(seed);
    const ElementType type = random.one_of({ElementType::float16, ElementType::bfloat16, ElementType::float32,
                                            ElementType::float32, ElementType::float64});
    const bool passed =
        type == ElementType::float64 ? all_pass<double>(random, type, seed) : all_pass<float>(random, type, seed);
    failures += !passed;
  }
  std::printf("%u cases with %s vectors, %u mismatches\n", cases, isa().name, failures);
  return failures != 0;
}
