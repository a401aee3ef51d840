// The pairwise operations on a CPU. What they compute is defined in
// python/contrastile/pairs.py; names here are the names there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "embeddings.h"
#include "vector_kernels.h"

namespace contrastile::cpu {

// Real is the accumulation type: float, or double for float64 embeddings.
template <class Real>
struct PairProblem {
  EmbeddingView anchors;           // (N, D)
  EmbeddingView candidates;        // (M, D)
  const Real* scale;               // (N,)
  const std::int64_t* positives;   // (N,) or null
  const std::int64_t* row_groups;  // (N,) or null
  const std::int64_t* col_groups;  // (M,) or null
  const Real* row_ceiling;         // (N,) or null
  std::optional<std::int64_t> self_offset;
  bool self_similarity;
};

// Null: not asked for. row_rank needs positives.
template <class Real>
struct PairStats {
  Real* row_max;           // (N,)
  Real* row_sum;           // (N,)
  Real* col_max;           // (M,)
  Real* col_sum;           // (M,)
  Real* positive_logit;    // (N,)
  std::int64_t* row_rank;  // (N,)
};

template <class Real>
struct GivenWeights {
  const Real* row_shift;       // (N,) or null
  const Real* row_gain;        // (N,) or null
  const Real* col_shift;       // (M,) or null
  const Real* col_gain;        // (M,) or null
  const Real* positive_coeff;  // (N,) or null
  WeightFunction function;
};

// All overwritten. Null: not asked for.
template <class Real>
struct PairGrads {
  Real* dx;          // (N, D)
  Real* dy;          // (M, D)
  Real* row_moment;  // (N,)
  Real* row_mass;    // (N,)
  Real* col_mass;    // (M,)
  Real* row_weight;  // (N,), of sigmoids alone
};

struct Execution {
  int threads;
  std::int64_t workspace_bytes;  // for tiles of logits; everything else is O(N + M)
};

// scale_i <x_i, y_positive>, (N,).
template <class Real>
void positive_logits(const PairProblem<Real>&, Real* logits, const Execution&);

// Row statistics are always computed; column statistics where asked for.
template <class Real>
void pair_stats(const PairProblem<Real>&, const PairStats<Real>&, const Execution&);

// stats: row_max null means that no statistics are wanted.
template <class Real>
void pair_grad_given(const PairProblem<Real>&, const GivenWeights<Real>&, const PairGrads<Real>&,
                     const PairStats<Real>& stats, const Execution&);

// gain times the weights of the softmax over rows, and over columns where
// stats.col_max is given (or with self_similarity, where rows serve as columns).
// Fills stats as well.
template <class Real>
void pair_grad_softmax(const PairProblem<Real>&, double gain, const PairGrads<Real>&, const PairStats<Real>& stats,
                       const Execution&);

}  // namespace contrastile::cpu
