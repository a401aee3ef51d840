// What both sweeps must return, by double loops over all pairs in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/vector_kernels.h"

namespace contrastile::test {

using Vector = std::vector<double>;
using Ids = std::vector<std::int64_t>;

enum class Pair : char { negative, positive, masked };

// Values as the sweep sees them, after rounding to the element type.
struct DenseProblem {
  std::int64_t rows, cols, depth;
  Vector x, y, scale;            // (N, D), (M, D), (N,)
  std::optional<Ids> positives;  // (N,)
  std::optional<Ids> row_groups, col_groups;
  std::optional<std::vector<char>> above_ceiling;  // (N, M): logits above the row's
  std::optional<std::int64_t> self_offset;

  Pair kind(std::int64_t i, std::int64_t j) const {
    if (positives && (*positives)[i] == j) return Pair::positive;
    if (row_groups && (*row_groups)[i] == (*col_groups)[j]) return Pair::masked;
    if (above_ceiling && (*above_ceiling)[i * cols + j]) return Pair::masked;
    if (self_offset && i + *self_offset == j) return Pair::masked;
    return Pair::negative;
  }
};

struct DenseStats {
  Vector logits;            // (N, M)
  Vector row_sum, col_sum;  // of exp(s) over the negatives
  Vector positive_logit;    // (N,)
};

inline DenseStats dense_stats(const DenseProblem& p) {
  DenseStats out{Vector(p.rows * p.cols), Vector(p.rows), Vector(p.cols), Vector(p.rows, -HUGE_VAL)};
  for (std::int64_t i = 0; i < p.rows; ++i)
    for (std::int64_t j = 0; j < p.cols; ++j) {
      double dot = 0;
      for (std::int64_t k = 0; k < p.depth; ++k) dot += p.x[i * p.depth + k] * p.y[j * p.depth + k];
      const double s = out.logits[i * p.cols + j] = p.scale[i] * dot;
      if (p.kind(i, j) == Pair::positive) out.positive_logit[i] = s;
      if (p.kind(i, j) != Pair::negative) continue;
      out.row_sum[i] += std::exp(s);
      out.col_sum[j] += std::exp(s);
    }
  return out;
}

// Puts a ceiling on each row, in the widest gap between its larger logits: no rounding moves one across it.
inline Vector choose_ceilings(DenseProblem& p) {
  const Vector logits = dense_stats(p).logits;
  Vector ceilings;
  p.above_ceiling = std::vector<char>(logits.size());
  for (std::int64_t i = 0; i < p.rows; ++i) {
    Vector row(logits.begin() + i * p.cols, logits.begin() + (i + 1) * p.cols);
    double ceiling = HUGE_VAL, widest = 0;
    if (std::none_of(row.begin(), row.end(), [](double s) { return std::isnan(s); })) {
      std::sort(row.begin(), row.end());
      for (std::int64_t j = p.cols / 2; j + 1 < p.cols; ++j)
        if (row[j + 1] - row[j] > widest) widest = row[j + 1] - row[j], ceiling = (row[j + 1] + row[j]) / 2;
    }
    ceilings.push_back(ceiling);
    for (std::int64_t j = 0; j < p.cols; ++j) (*p.above_ceiling)[i * p.cols + j] = logits[i * p.cols + j] > ceiling;
  }
  return ceilings;
}

// One direction of the coefficient; empty shift: absent.
struct DenseTerm {
  Vector shift, gain;
};

struct DenseWeights {
  DenseTerm row, col;
  Vector positive_coeff;  // (N,), empty without positives
  cpu::WeightFunction function = cpu::WeightFunction::exponential;
};

// `size` of each sum is the sum of the magnitudes of its terms: what its rounding error is relative to.
struct DenseGrads {
  Vector dx, dx_size, dy, dy_size, moment, moment_size, row_mass, col_mass, row_weight;
};

inline double weight_of(double t, cpu::WeightFunction function) {
  if (function == cpu::WeightFunction::sigmoid) return 1 / (1 + std::exp(-t));
  return function == cpu::WeightFunction::capped && t > 0 ? 1 : std::exp(t);
}

inline double mass_of(double t, cpu::WeightFunction function) {
  if (function == cpu::WeightFunction::sigmoid) return std::fmax(t, 0) + std::log1p(std::exp(-std::fabs(t)));
  return function == cpu::WeightFunction::capped && t > 0 ? 1 + t : std::exp(t);
}

// Of the pair (i, j), whose logit is s.
inline double coefficient_of(const DenseProblem& p, const DenseWeights& w, std::int64_t i, std::int64_t j, double s) {
  const Pair kind = p.kind(i, j);
  if (kind == Pair::masked) return 0;
  if (kind == Pair::positive) return w.positive_coeff.empty() ? 0 : w.positive_coeff[i];
  double coefficient = 0;
  if (!w.row.shift.empty()) coefficient += w.row.gain[i] * weight_of(s - w.row.shift[i], w.function);
  if (!w.col.shift.empty()) coefficient += w.col.gain[j] * weight_of(s - w.col.shift[j], w.function);
  return coefficient;
}

inline DenseGrads dense_grads(const DenseProblem& p, const DenseStats& stats, const DenseWeights& w) {
  DenseGrads out;
  for (Vector* dx : {&out.dx, &out.dx_size}) dx->resize(p.rows * p.depth);
  for (Vector* dy : {&out.dy, &out.dy_size}) dy->resize(p.cols * p.depth);
  for (Vector* row : {&out.moment, &out.moment_size, &out.row_mass, &out.row_weight}) row->resize(p.rows);
  out.col_mass.resize(p.cols);
  for (std::int64_t i = 0; i < p.rows; ++i)
    for (std::int64_t j = 0; j < p.cols; ++j) {
      const double s = stats.logits[i * p.cols + j], coefficient = coefficient_of(p, w, i, j, s);
      const Pair kind = p.kind(i, j);
      if (kind == Pair::negative && !w.row.shift.empty()) {
        out.row_mass[i] += mass_of(s - w.row.shift[i], w.function);
        out.row_weight[i] += weight_of(s - w.row.shift[i], w.function);
      }
      if (kind == Pair::negative && !w.col.shift.empty()) out.col_mass[j] += mass_of(s - w.col.shift[j], w.function);
      if (kind != Pair::masked) {
        out.moment[i] += coefficient * s;
        out.moment_size[i] += std::abs(coefficient * s);
      }
      for (std::int64_t k = 0; k < p.depth; ++k) {
        const double to_x = p.scale[i] * coefficient * p.y[j * p.depth + k];
        const double to_y = p.scale[i] * coefficient * p.x[i * p.depth + k];
        out.dx[i * p.depth + k] += to_x;
        out.dx_size[i * p.depth + k] += std::abs(to_x);
        out.dy[j * p.depth + k] += to_y;
        out.dy_size[j * p.depth + k] += std::abs(to_y);
      }
    }
  return out;
}

// Coefficients of gain * sum_i (logsumexp_j s_ij - s_i,pos), plus the same over columns: the weights that a sweep
// finds by itself. `mirrored`: one triangle, where a row's normaliser is its column's too.
inline DenseWeights softmax_weights(const DenseProblem& p, const DenseStats& stats, bool columns, bool mirrored,
                                    double gain) {
  DenseWeights w;
  const auto direction = [gain](const Vector& negatives, const Vector& positive, Vector& positive_part) {
    DenseTerm term{Vector(negatives.size()), Vector(negatives.size())};
    positive_part.assign(negatives.size(), 0);
    for (std::size_t i = 0; i < negatives.size(); ++i) {
      const double total = negatives[i] + std::exp(positive[i]);
      term.gain[i] = total == 0 ? 0 : gain / total;
      positive_part[i] = total == 0 ? 0 : -gain * negatives[i] / total;
    }
    return term;
  };
  Vector row_part, col_part, col_positive(p.cols, -HUGE_VAL);
  w.row = direction(stats.row_sum, stats.positive_logit, row_part);
  if (p.positives)
    for (std::int64_t i = 0; i < p.rows; ++i) col_positive[(*p.positives)[i]] = stats.positive_logit[i];
  if (columns || mirrored) w.col = direction(stats.col_sum, col_positive, col_part);
  if (p.positives) {
    w.positive_coeff = row_part;
    if (columns || mirrored)
      for (std::int64_t i = 0; i < p.rows; ++i) w.positive_coeff[i] += col_part[(*p.positives)[i]];
  }
  return w;
}

}  // namespace contrastile::test
