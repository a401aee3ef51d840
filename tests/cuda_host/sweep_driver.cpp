// Runs the kernels of csrc/cuda over random problems and compares every result with double loops. Built three times:
// plain, under AddressSanitizer and UndefinedBehaviorSanitizer, and with the layer's own checks.
//
//     sweep_driver [cases = 40] [first seed = 0] [natural, reversed or random] [wait left out, as panels.h:10]
//
// Every buffer has exactly the size it needs, so that an access beyond it meets a red zone; embeddings are strided, the
// gaps and all that is to be written hold NaN. A case is its seed: rerun one with `sweep_driver 1 SEED`.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "cuda/kernels.h"
#include "launch.h"
#include "tests/dense_truth.h"
#include "tests/judge.h"
#include "tests/random_embeddings.h"

namespace {

using namespace contrastile::test;
namespace cuda = contrastile::cuda;
using cuda::Sums, cuda::Tiles, cuda::Window;
using Floats = std::vector<float>;
using Stored = contrastile::test::ElementType;  // by the host

struct Form {
  const char* name;
  Stored stored;
  cuda::ElementType type;
  cuda::Float32Products products;
  double logit_error, coefficient_error;  // relative to sizes of at least 1
};
constexpr Form forms[] = {
    {"bfloat16", Stored::bfloat16, cuda::ElementType::bfloat16, cuda::Float32Products::exact, 1e-4, 1e-2},
    {"float16", Stored::float16, cuda::ElementType::float16, cuda::Float32Products::exact, 1e-4, 2e-3},
    {"float32", Stored::float32, cuda::ElementType::float32, cuda::Float32Products::exact, 1e-4, 1e-4},
    {"tf32x3", Stored::float32, cuda::ElementType::float32, cuda::Float32Products::tf32x3, 1e-4, 1e-4},
    {"tf32", Stored::float32, cuda::ElementType::float32, cuda::Float32Products::tf32, 2e-2, 4e-2},
};

constexpr float nan = std::numeric_limits<float>::quiet_NaN();

int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <class T>
T* at(std::vector<T>& values, int first = 0) {
  return values.empty() ? nullptr : values.data() + first;
}

// (lines, length) of what is wanted.
struct SumBuffers {
  Floats max, sum, mass, weight;

  struct Wanted {
    bool sums = false, masses = false, weights = false;
  };
  static SumBuffers totals(Wanted wanted, int length) {
    const auto zeros = [length](bool is_wanted) { return Floats(is_wanted ? length : 0); };
    return {Floats(wanted.sums ? length : 0, -HUGE_VALF), zeros(wanted.sums), zeros(wanted.masses),
            zeros(wanted.weights)};
  }
  SumBuffers partials(int lines, int length) const {
    const auto unwritten = [=](const Floats& totals) { return Floats(totals.empty() ? 0 : lines * length, nan); };
    return {unwritten(max), unwritten(sum), unwritten(mass), unwritten(weight)};
  }
  Sums from(int first) { return {at(max, first), at(sum, first), at(mass, first), at(weight, first)}; }
};

class Case {
 public:
  Case(Random& random, const Form& form) : random_(random), form_(form) {
    const int unit = form.stored == Stored::float32 ? 4 : 8;  // elements of 16 bytes
    p_.rows = random.one_of<std::int64_t>({1, 2, 17, 63, 64, 65, 100, 128, 129, 140});
    p_.cols = random.one_of<std::int64_t>({1, 3, 63, 64, 65, 100, 129, 140});
    p_.depth = unit * random.one_of<std::int64_t>({1, 2, 3, 7, 8, 9, 13, 16, 16, 17, 24});
    anchors_ = random_embeddings<float>(random, p_.rows, p_.depth, form.stored, p_.x, unit);
    const bool masks = random.chance(0.6);
    if (masks) choose_masks();
    if (!masks && random.chance(0.3)) spoil_anchor();  // a masked pair of such a row may carry the NaN on
    candidates_ = random_embeddings<float>(random, p_.cols, p_.depth, form.stored, p_.y, unit);
    if (random.chance(0.8)) choose_positives();
    for (std::int64_t i = 0; i < p_.rows; ++i)
      scale_.push_back(static_cast<float>(8 / std::sqrt(double(p_.depth)) * random.uniform(0.2, 1)));
    scale_.shrink_to_fit();
    p_.scale.assign(scale_.begin(), scale_.end());
    truth_ = dense_stats(p_);
    pairs_ = {anchors_.view.data,       candidates_.view.data,       form.type,           form.products,
              anchors_.view.row_stride, candidates_.view.row_stride, rows(),              cols(),
              depth(),                  scale_.data(),               address(p_.positives), address(p_.row_groups),
              address(p_.col_groups),   p_.self_offset.has_value(),  int(p_.self_offset.value_or(0))};
  }

  std::string run() {
    statistics();
    choose_weights();
    coefficients();
    if (form_.stored != Stored::float32 && depth() <= cuda::most_fused_features) gradients();
    finish_rows();
    return sums_.failure.empty() ? products_.failure : sums_.failure;
  }

  std::string describe() const {
    return std::string(form_.name) + ", N " + std::to_string(rows()) + ", M " + std::to_string(cols()) + ", D " +
           std::to_string(depth());
  }

 private:
  int rows() const { return int(p_.rows); }
  int cols() const { return int(p_.cols); }
  int depth() const { return int(p_.depth); }
  static const std::int64_t* address(const std::optional<Ids>& ids) { return ids ? ids->data() : nullptr; }

  void spoil_anchor() {
    const std::int64_t row = random_.below(p_.rows), k = random_.below(p_.depth);
    const std::int64_t place = row * anchors_.view.row_stride + k;
    if (anchors_.reals.empty())
      anchors_.halves[place] = nan_half;
    else
      anchors_.reals[place] = nan;
    p_.x[row * p_.depth + k] = nan;
  }

  void choose_masks() {
    const auto groups = [&](std::int64_t size) {
      Ids ids(size);
      for (std::int64_t& id : ids) id = random_.below(1 + size / 3);
      return ids;
    };
    if (random_.chance(0.7)) {
      p_.row_groups = groups(p_.rows);
      p_.col_groups = groups(p_.cols);
    }
    if (random_.chance(0.5)) p_.self_offset = random_.below(p_.cols + 20) - 10;
  }

  void choose_positives() {
    p_.positives = Ids(p_.rows);
    for (std::int64_t& positive : *p_.positives) positive = random_.below(p_.cols);
  }

  // All pairs: at once, or in windows of one or two tiles either way.
  std::vector<Window> windows(Tiles tile) {
    const bool whole = random_.chance(0.5);
    const int high = whole ? rows() : tile.rows * int(1 + random_.below(2));
    const int wide = whole ? cols() : tile.cols * int(1 + random_.below(2));
    std::vector<Window> found;
    for (int row = 0; row < rows(); row += high)
      for (int col = 0; col < cols(); col += wide)
        found.push_back({row, col, std::min(high, rows() - row), std::min(wide, cols() - col)});
    return found;
  }

  // launch(window, row_sums, col_sums) window by window; the tiles' sums are merged into the totals.
  template <class Launch>
  void sweep(Tiles tile, SumBuffers& row_totals, SumBuffers& col_totals, Launch launch) {
    for (const Window& window : windows(tile)) {
      const int down = ceil_div(window.rows, tile.rows), across = ceil_div(window.cols, tile.cols);
      SumBuffers by_row = row_totals.partials(across, window.rows), by_col = col_totals.partials(down, window.cols);
      launch(window, by_row.from(0), by_col.from(0));
      cuda::launch_merge(by_row.from(0), row_totals.from(window.first_row), across, window.rows, nullptr);
      cuda::launch_merge(by_col.from(0), col_totals.from(window.first_col), down, window.cols, nullptr);
    }
  }

  void check_sums(const SumBuffers& by_row, const SumBuffers& by_col) {
    const Vector row_lse = logs(truth_.row_sum), col_lse = logs(truth_.col_sum);
    sums_.compare("row log-sum-exp", log_sums(by_row.max, by_row.sum), row_lse, magnitudes(row_lse));
    sums_.compare("column log-sum-exp", log_sums(by_col.max, by_col.sum), col_lse, magnitudes(col_lse));
    if (by_row.mass.empty() && by_row.weight.empty() && by_col.mass.empty()) return;
    const DenseGrads truth = dense_grads(p_, truth_, weights_);
    sums_.compare("row mass", by_row.mass, truth.row_mass, magnitudes(truth.row_mass));
    sums_.compare("column mass", by_col.mass, truth.col_mass, magnitudes(truth.col_mass));
    sums_.compare("row weight", by_row.weight, truth.row_weight, magnitudes(truth.row_weight));
  }

  void statistics() {
    Floats positive_logit;
    if (p_.positives) {
      positive_logit.assign(p_.rows, nan);
      cuda::launch_positives(pairs_, at(positive_logit), nullptr);
      sums_.compare("positive logit", positive_logit, truth_.positive_logit, magnitudes(truth_.positive_logit));
    }
    Ids ranks(p_.positives && random_.chance(0.6) ? p_.rows : 0);
    SumBuffers by_row = SumBuffers::totals({.sums = true}, rows());
    SumBuffers by_col = SumBuffers::totals({.sums = random_.chance(0.7)}, cols());
    sweep(cuda::tiles_of_sums(), by_row, by_col, [&](const Window& window, Sums row_sums, Sums col_sums) {
      cuda::launch_statistics(pairs_, window, row_sums, col_sums, at(positive_logit), at(ranks), nullptr);
    });
    check_sums(by_row, by_col);
    for (std::size_t i = 0; i < ranks.size(); ++i) check_rank(i, double(ranks[i]));
  }

  // Logits closer than rounding may fall on either side of the positive's.
  void check_rank(std::size_t i, double rank) {
    if (std::isnan(truth_.positive_logit[i])) return;
    const double close = 10 * form_.logit_error;
    double fewest = 0, most = 0;
    for (std::int64_t j = 0; j < p_.cols; ++j) {
      if (p_.kind(i, j) != Pair::negative) continue;
      const double lead = truth_.logits[i * p_.cols + j] - truth_.positive_logit[i];
      fewest += !(lead <= close);
      most += !(lead <= -close);
    }
    if (rank < fewest || rank > most) sums_.compare("rank", Vector{rank}, Vector{rank < fewest ? fewest : most}, {0});
  }

  // Shifts near the log-sum-exps, so that both sides of the cap occur. A sigmoid's may lie anywhere.
  void choose_weights() {
    using Truth = contrastile::cpu::WeightFunction;
    const auto function = random_.one_of<std::pair<Truth, cuda::WeightFunction>>(
        {{Truth::exponential, cuda::WeightFunction::exponential},
         {Truth::capped, cuda::WeightFunction::capped},
         {Truth::sigmoid, cuda::WeightFunction::sigmoid}});
    weights_.function = function.first;
    const double away = function.first == Truth::sigmoid ? random_.one_of({0.0, 0.0, 6.0, 1e4, -1e4}) : 0;
    const auto term = [&](const Vector& sums, Floats& shift, Floats& gain) {
      for (const double sum : sums) {
        shift.push_back(float((sum > 0 ? std::log(sum) : 0) + random_.uniform(-2, 1) + away));
        gain.push_back(float(random_.uniform(0.5, 1.5)));
      }
      shift.shrink_to_fit();
      gain.shrink_to_fit();
      return DenseTerm{{shift.begin(), shift.end()}, {gain.begin(), gain.end()}};
    };
    const auto directions = random_.below(3);  // both, rows, columns
    if (directions != 2) weights_.row = term(truth_.row_sum, row_shift_, row_gain_);
    if (directions != 1) weights_.col = term(truth_.col_sum, col_shift_, col_gain_);
    if (p_.positives)
      for (std::int64_t i = 0; i < p_.rows; ++i) positive_coeff_.push_back(float(random_.uniform(-1, 0.5)));
    positive_coeff_.shrink_to_fit();
    weights_.positive_coeff.assign(positive_coeff_.begin(), positive_coeff_.end());
    handed_ = {at(row_shift_), at(row_gain_), at(col_shift_), at(col_gain_), at(positive_coeff_), function.second};
    if (random_.chance(0.5)) factor_ = {float(std::ldexp(1, int(random_.below(7)) - 3))};
  }
  double factor() const { return factor_.empty() ? 1 : factor_[0]; }

  SumBuffers sums_by_row(bool wanted) {
    const bool has_term = wanted && !row_shift_.empty(), is_sigmoid = handed_.function == cuda::WeightFunction::sigmoid;
    return SumBuffers::totals({wanted && random_.chance(0.5), has_term, has_term && is_sigmoid && random_.chance(0.7)},
                              rows());
  }
  SumBuffers sums_by_col(bool wanted) {
    return SumBuffers::totals({wanted && random_.chance(0.5), wanted && !col_shift_.empty()}, cols());
  }

  double value_of(const void* strip, std::int64_t place, bool is_float32) const {
    if (is_float32) return static_cast<const float*>(strip)[place];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(strip)[place];
    const int infinity = form_.stored == Stored::bfloat16 ? 0x7f80 : 0x7c00;
    return (bits & 0x7fff) > infinity ? nan : value_of_half(bits, form_.stored);
  }

  void coefficients() {
    const bool sums = random_.chance(0.5), is_float32 = form_.stored == Stored::float32 || random_.chance(0.3);
    SumBuffers by_row = sums_by_row(sums), by_col = sums_by_col(sums);
    std::vector<char> wanted_rows(!sums && random_.chance(0.3) ? p_.rows : 0);
    for (char& wanted : wanted_rows) wanted = random_.chance(0.02);
    const Tiles tile = cuda::tiles_of_sums();
    sweep(tile, by_row, by_col, [&](const Window& window, Sums row_sums, Sums col_sums) {
      const int together = is_float32 ? 4 : 8, stride = ceil_div(window.cols, together) * together;
      std::vector<char> strip(std::size_t(window.rows) * stride * (is_float32 ? 4 : 2), char(0xff));
      cuda::launch_coefficients(pairs_, window, handed_,
                                {strip.data(), is_float32, stride, at(factor_),
                                 reinterpret_cast<bool*>(at(wanted_rows))},
                                row_sums, col_sums, nullptr);
      Vector ours, truth;
      for (int i = 0; i < window.rows; ++i)
        for (int j = 0; j < window.cols; ++j) {
          const int first = i / tile.rows * tile.rows, end = std::min(first + tile.rows, window.rows);
          const bool none_wanted = !wanted_rows.empty() && std::none_of(wanted_rows.begin() + window.first_row + first,
                                                                       wanted_rows.begin() + window.first_row + end,
                                                                       [](char wanted) { return wanted; });
          const std::int64_t row = window.first_row + i, col = window.first_col + j;
          const double s = truth_.logits[row * p_.cols + col];
          ours.push_back(value_of(strip.data(), std::int64_t(i) * stride + j, is_float32) / factor());
          truth.push_back(none_wanted ? nan : p_.scale[row] * coefficient_of(p_, weights_, row, col, s));
        }
      products_.compare("coefficient", ours, truth, magnitudes(truth));
    });
    check_sums(by_row, by_col);
  }

  void gradients() {
    const auto sides = random_.below(3);  // both, anchors, candidates
    const bool sums = random_.chance(0.5);
    SumBuffers by_row = sums_by_row(sums), by_col = sums_by_col(sums);
    Floats dx(sides == 2 ? 0 : p_.rows * p_.depth), dy(sides == 1 ? 0 : p_.cols * p_.depth);
    sweep(cuda::tiles_of_gradient(), by_row, by_col, [&](const Window& window, Sums row_sums, Sums col_sums) {
      cuda::launch_gradient(pairs_, window, handed_, {at(dx), at(dy), at(factor_)}, row_sums, col_sums, nullptr);
    });
    check_sums(by_row, by_col);
    const DenseGrads truth = dense_grads(p_, truth_, weights_);
    for (Floats* gradient : {&dx, &dy})
      for (float& value : *gradient) value /= float(factor());
    products_.compare("dX", dx, truth.dx, truth.dx_size);
    products_.compare("dY", dy, truth.dy, truth.dy_size);
  }

  void finish_rows() {
    const auto some = [&](std::int64_t size, bool wanted) {
      Floats values(wanted ? size : 0);
      for (float& value : values) value = float(random_.uniform(-1, 1));
      return values;
    };
    const std::int64_t size = p_.rows * p_.depth;
    Floats values = some(size, true), others = some(size, random_.chance(0.5));
    Floats factors = some(p_.rows, random_.chance(0.5));
    const bool rounds = form_.stored != Stored::float32 && random_.chance(0.6);
    std::vector<char> gradient(size * (rounds ? 2 : 4), char(0xff));
    Floats moments(random_.chance(0.6) ? p_.rows : 0, nan);
    cuda::launch_finish_rows({values.data(), at(others), at(factors), at(factor_), anchors_.view.data,
                              anchors_.view.row_stride, form_.type, gradient.data(), rounds, at(moments), rows(),
                              depth()},
                             nullptr);
    Vector ours, truth, moment(p_.rows);
    for (std::int64_t k = 0; k < size; ++k) {
      const double own = values[k] * factor() * (factors.empty() ? 1 : factors[k / p_.depth]);
      moment[k / p_.depth] += own * p_.x[k];
      truth.push_back(own + (others.empty() ? 0 : others[k] * factor()));
      ours.push_back(value_of(gradient.data(), k, !rounds));
    }
    products_.compare("finished gradient", ours, truth, magnitudes(truth));
    sums_.compare("moment", moments, moment, Vector(p_.rows, double(p_.depth) * factor()));
  }

  Random& random_;
  const Form& form_;
  Judge sums_{form_.logit_error, {}}, products_{form_.coefficient_error, {}};
  DenseProblem p_;
  Embeddings<float> anchors_, candidates_;
  Floats scale_, row_shift_, row_gain_, col_shift_, col_gain_, positive_coeff_, factor_;
  DenseStats truth_;
  DenseWeights weights_;
  cuda::Pairs pairs_{};
  cuda::Weights handed_{};
};

std::string failure_of(unsigned seed) {
  Random random(seed);
  Case one(random, forms[seed % std::size(forms)]);
  try {
    const std::string failure = one.run();
    return failure.empty() ? failure : one.describe() + ": " + failure;
  } catch (const std::exception& stopped) {
    return one.describe() + ": " + stopped.what();
  }
}

}  // namespace

int main(int count, char** arguments) {
  using namespace contrastile::host;
  const unsigned cases = count > 1 ? unsigned(std::atoi(arguments[1])) : 40;
  const unsigned first = count > 2 ? unsigned(std::atoi(arguments[2])) : 0;
  const std::string schedule = count > 3 ? arguments[3] : "natural";
  if (schedule == "reversed") settings.blocks = Order::reversed;
  if (schedule == "random") settings.blocks = Order::random;
  settings.random_threads = schedule == "random";
  if (count > 4) settings.left_out = arguments[4];
  unsigned failures = 0;
  for (unsigned seed = first; seed < first + cases; ++seed) {
    settings.seed = seed;
    const std::string failure = failure_of(seed);
    failures += !failure.empty();
    if (!failure.empty()) std::printf("seed %u (%s)\n", seed, failure.c_str());
  }
  std::printf("%u cases, %u failures, %llu unwritten bytes read, %llu bank conflicts\n", cases, failures,
              (unsigned long long)total_report.unwritten_bytes_read,
              (unsigned long long)(total_report.loads.conflicts + total_report.stores.conflicts +
                                   total_report.matrix_loads.conflicts));
  return failures != 0;
}
