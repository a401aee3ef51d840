// InfoNCE over several prefixes of the features at once (Matryoshka).
//
// With prefixes d_1 < ... < d_K = D, and P_k the products over the first d_k
// features, P_k = P_(k-1) + X_seg Y_seg^T over the segment of features between:
// the K matrices of logits
//
//     s_k,ij = scale_i a_k,i b_k,j P_k,ij      a, b: inverse norms of the prefixes,
//                                              or 1 without normalize
//
// come from one product over D. So do the gradients: with C_k the coefficients
// dL/ds_k, E_k = scale a_k b_k C_k and F_k = E_k + F_(k+1),
//
//     dX_seg = F_k Y_seg      dY_seg = F_k^T X_seg
//
// less, where rows are normalised, what their norm takes: x_i a_k,i^2 times
// the moment sum_j C_k,ij s_k,ij of every prefix, and the same for columns.
//
//     statistics   one product, 2 N M D flop; K N M exponentials
//     gradient     one more product each for dX and dY; the logits again unless
//                  they are still in the workspace; K N M exponentials
//     memory       one workspace, in which a pair has K logits; O(K (N + M))
//                  vectors; dX and dY are the only N x D accumulators
//     bound        the matrix products while D / K is above about 30, else the
//                  exponentials and the passes over K logits
//
// It is none of the two sweeps of python/contrastile/pairs.py because a pair has
// K logits, of which none is formed without the others'.
//
// Work is shared out as in tile_sweep.h: a tile column has one owner, and so
// has a block of dX; results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "embeddings.h"
#include "sweeps.h"

namespace contrastile::cpu {

template <class Real>
struct PrefixProblem {
  EmbeddingView anchors;           // (N, D)
  EmbeddingView candidates;        // (M, D)
  const Real* scale;               // (N,)
  const std::int64_t* positives;   // (N,)
  std::vector<std::int64_t> ends;  // (K,) ascending lengths of the prefixes, the last is D
  std::vector<double> gains;       // (K,) of every row's loss, and with columns of every column's
  bool columns;                    // a softmax over columns too
  bool normalize;                  // prefixes to unit rows, as torch's F.normalize does it
};

// All overwritten.
template <class Real>
struct PrefixResults {
  Real* row_max;         // (K, N), of the negatives' logits
  Real* row_sum;         // (K, N)
  Real* col_max;         // (K, M) or null
  Real* col_sum;         // (K, M) or null
  Real* positive_logit;  // (K, N)
  Real* dx;              // (N, D) or null
  Real* dy;              // (M, D) or null
  Real* row_moment;      // (N,) or null, the sum over prefixes
};

// Gradients are those of sum_k gain_k (sum_i loss_k,i + sum_j column loss_k,j).
// Only statistics are found where neither dx, dy nor row_moment is asked for.
template <class Real>
void prefix_softmax(const PrefixProblem<Real>&, const PrefixResults<Real>&, const Execution&);

}  // namespace contrastile::cpu
