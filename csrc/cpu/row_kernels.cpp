// Losses of single rows, compiled once per instruction set (CONTRASTILE_ISA
// names it).
//
// reads   every input once from memory; further passes find the row in the
//         first-level cache
// writes  every gradient once
// bound   memory bandwidth
//
// A row that is not whole vectors of Reals is copied, widened and padded with
// zeros, into scratch, and its gradients are formed there: no loop has a tail.
#include "row_kernels.h"

#include "elements.h"
#include "vector_math.h"

namespace {

using contrastile::cpu::DotProducts;
using contrastile::cpu::most_row_inputs;
using contrastile::cpu::RowOperands;

template <class Real>
constexpr std::int64_t padded(std::int64_t depth) {
  return contrastile::cpu::round_up(depth, Lanes<Real>::count);
}

template <class Real>
std::int64_t scratch(std::int64_t depth) {
  return 2 * most_row_inputs * padded<Real>(depth);
}

// The rows of `count` inputs and gradients as whole vectors of Reals.
template <class Real, class Element, int count>
class Rows {
 public:
  Rows(const RowOperands& row, std::int64_t depth, Real* scratch) : row_(row), depth_(depth), width_(padded<Real>(depth)) {
    for (int i = 0; i < count; ++i) {
      Real* const widened = scratch + 2 * i * width_;
      Real* const formed = widened + width_;
      input_[i] = in_place() ? static_cast<const Real*>(row.inputs[i]) : widen(stored(row.inputs[i]), widened);
      gradient_[i] = !row.gradients[i] ? nullptr : in_place() ? static_cast<Real*>(row.gradients[i]) : formed;
    }
  }

  std::int64_t width() const { return width_; }
  Vec<Real> input(int i, std::int64_t k) const { return load(input_[i] + k); }
  bool wants(int i) const { return gradient_[i]; }
  void set(int i, std::int64_t k, Vec<Real> gradient) const { store(gradient_[i] + k, gradient); }

  void finish() const {
    if (in_place()) return;
    for (int i = 0; i < count; ++i)
      if (gradient_[i])
        for (std::int64_t k = 0; k < depth_; ++k) stored(row_.gradients[i])[k] = Element::narrow(gradient_[i][k]);
  }

 private:
  using Stored = typename Element::Stored;

  bool in_place() const { return sizeof(Stored) == sizeof(Real) && width_ == depth_; }
  static const Stored* stored(const void* row) { return static_cast<const Stored*>(row); }
  static Stored* stored(void* row) { return static_cast<Stored*>(row); }

  const Real* widen(const Stored* from, Real* to) const {
    for (std::int64_t k = 0; k < depth_; ++k) to[k] = Element::convert(from[k]);
    for (std::int64_t k = depth_; k < width_; ++k) to[k] = 0;
    return to;
  }

  const RowOperands& row_;
  const std::int64_t depth_, width_;
  const Real* input_[count];
  Real* gradient_[count];
};

// sum over k of term(k), a vector each; in several chains, to hide the latency of an addition.
template <class Real, class Term>
Real sum_of(std::int64_t width, const Term& term) {
  constexpr int lanes = Lanes<Real>::count, chains = 4;
  Vec<Real> sum[chains] = {};
  std::int64_t k = 0;
  for (; k + chains * lanes <= width; k += chains * lanes)
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c) sum[c] += term(k + c * lanes);
  for (; k < width; k += lanes) sum[0] += term(k);
  return sum_of_lanes<Real>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class Real, class Work>
void for_vectors(std::int64_t width, const Work& work) {
  for (std::int64_t k = 0; k < width; k += Lanes<Real>::count) work(k);
}

template <class Real, class Element>
Real bridge_of(const RowOperands& operands, std::int64_t depth, Real time, Real gain, Real* scratch) {
  const Rows<Real, Element, 3> row(operands, depth, scratch);
  const Real rest = 1 - time;
  const auto mean = [&](std::int64_t k) { return row.input(1, k) * time + row.input(2, k) * rest; };
  const Real square = sum_of<Real>(row.width(), [&](std::int64_t k) { return mean(k) * mean(k); });
  const Real inverse = square == 0 ? Real(0) : 1 / Real(__builtin_sqrt(square));
  const auto residual = [&](std::int64_t k) { return row.input(0, k) - mean(k) * inverse; };
  const Real value = sum_of<Real>(row.width(), [&](std::int64_t k) { return residual(k) * residual(k); });
  if (row.wants(1) || row.wants(2)) {
    // The mean's direction has no part along itself.
    const Real along = inverse * sum_of<Real>(row.width(), [&](std::int64_t k) { return residual(k) * mean(k); });
    for_vectors<Real>(row.width(), [&](std::int64_t k) {
      const Vec<Real> away = residual(k);
      const Vec<Real> d_mean = (away - mean(k) * (inverse * along)) * (-2 * gain * inverse);
      if (row.wants(0)) row.set(0, k, away * (2 * gain));
      if (row.wants(1)) row.set(1, k, d_mean * time);
      if (row.wants(2)) row.set(2, k, d_mean * rest);
    });
  } else if (row.wants(0)) {
    for_vectors<Real>(row.width(), [&](std::int64_t k) { row.set(0, k, residual(k) * (2 * gain)); });
  }
  row.finish();
  return value;
}

template <class Real, class Element>
Real dot_products_of(const RowOperands& operands, std::int64_t depth, DotProducts kind, Real gain, Real* scratch) {
  const Rows<Real, Element, 4> row(operands, depth, scratch);
  Real dot[2];
  for (int pair = 0; pair < 2; ++pair)
    dot[pair] = sum_of<Real>(row.width(),
                             [&](std::int64_t k) { return row.input(2 * pair, k) * row.input(2 * pair + 1, k); });
  const Real difference = dot[0] - dot[1];
  const bool squares = kind == DotProducts::squares;
  const Real factor[2] = {2 * gain * (squares ? dot[0] : difference), 2 * gain * (squares ? dot[1] : -difference)};
  for (int i = 0; i < 4; ++i)
    if (row.wants(i))
      for_vectors<Real>(row.width(), [&](std::int64_t k) { row.set(i, k, row.input(i ^ 1, k) * factor[i / 2]); });
  row.finish();
  return squares ? dot[0] * dot[0] + dot[1] * dot[1] : difference * difference;
}

template <class Real>
Real bridge(const RowOperands& row, std::int64_t depth, ElementType type, Real time, Real gain, Real* scratch) {
  return with_element<Real>(
      type, [&]<class Element>() { return bridge_of<Real, Element>(row, depth, time, gain, scratch); });
}

template <class Real>
Real dot_products(const RowOperands& row, std::int64_t depth, ElementType type, DotProducts kind, Real gain,
                  Real* scratch) {
  return with_element<Real>(
      type, [&]<class Element>() { return dot_products_of<Real, Element>(row, depth, kind, gain, scratch); });
}

template <class Real>
constexpr contrastile::cpu::RowKernels<Real> all_kernels() {
  return {scratch<Real>, bridge<Real>, dot_products<Real>};
}

}  // namespace

namespace contrastile::cpu::CONTRASTILE_ISA {

extern const RowKernels<float> row_kernels_single;
extern const RowKernels<double> row_kernels_double;
const RowKernels<float> row_kernels_single = all_kernels<float>();
const RowKernels<double> row_kernels_double = all_kernels<double>();

}  // namespace contrastile::cpu::CONTRASTILE_ISA
