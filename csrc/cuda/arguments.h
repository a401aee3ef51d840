// What the kernels of this folder take. Pointers are addresses on the device; null means that the thing is absent.
// Embeddings are rows of `depth` elements of one type; they start on 16 bytes and are multiples of that.
#pragma once

#include <cstdint>

namespace contrastile::cuda {

enum class ElementType { float16, bfloat16, float32 };

// How float32 embeddings are multiplied: by multiply-adds; by three products of their TF32 parts, to about 2^-21; or by
// one product of their leading parts, to about 2^-11.
enum class Float32Products { exact, tf32x3, tf32 };

struct Pairs {
  const void* anchors;     // (N, D)
  const void* candidates;  // (M, D)
  ElementType type;
  Float32Products float32_products;
  std::int64_t anchor_stride;  // elements from a row to the next
  std::int64_t candidate_stride;
  std::int32_t rows, cols, depth;  // N, M, D
  const float* scale;              // (N,)
  const std::int64_t* positives;   // (N,)
  const std::int64_t* row_groups;  // (N,)
  const std::int64_t* col_groups;  // (M,)
  const float* row_ceiling;        // (N,): a logit above it is masked
  bool masks_self;                 // row i and column i + self_offset are one sample
  std::int32_t self_offset;
};

// A launch covers a window of pairs. Its sides are multiples of the tile's, unless they end with the problem.
struct Window {
  std::int32_t first_row, first_col, rows, cols;
};

// Sums of exponentials, by row or by column: one line for each tile on the way.
struct Sums {
  float* max;     // (tiles, length): a shift, at most 55 above the sum's logarithm (14 in totals); -inf without one
  float* sum;     // (tiles, length): sum of exp(logit - shift)
  float* mass;    // (tiles, length): sum of phi
  float* weight;  // (tiles, length): sum of f; of sigmoids, by row alone
};

// f of a coefficient gain * f(s - shift), and phi, whose derivative it is.
enum class WeightFunction {
  exponential,  // f = phi = exp
  capped,       // f = min(exp, 1), phi(t) = exp(t) below 0 and 1 + t above
  sigmoid,      // f(t) = 1 / (1 + exp(-t)), phi(t) = log(1 + exp(t))
};

// Coefficients C_ij = row_gain_i f(s_ij - row_shift_i) + col_gain_j f(s_ij - col_shift_j) of negatives; the given value
// at positives; 0 at masked pairs. A direction without a shift is absent.
struct Weights {
  const float* row_shift;       // (N,)
  const float* row_gain;        // (N,)
  const float* col_shift;       // (M,)
  const float* col_gain;        // (M,)
  const float* positive_coeff;  // (N,)
  WeightFunction function;
};

// Where coefficients go, in the embeddings' type or float32: `stride` elements from a row of the window to the next.
struct Strip {
  void* coefficients;  // rows start on 16 bytes; null: only sums are wanted
  bool is_float32;
  std::int64_t stride;  // a multiple of 16 bytes
  const float* factor;  // (1,) that all are multiplied with, to fit float16
  const bool* rows;     // (N,): tiles without any of these rows stay as they are and leave no sums; null: of no effect
};

// What the products are added to, contiguous float32; at least one is not null, and where X is Y they are two arrays.
// With both, the candidates' is added to atomically.
struct Gradients {
  float* anchors;       // (N, D)
  float* candidates;    // (M, D)
  const float* factor;  // (1,) that all coefficients are multiplied with, to fit float16
};

// dX or dY as the sweeps leave it, and what becomes of it: a gradient, and the dot product of every row with its own.
struct RowSums {
  const float* values;        // (N, D) contiguous
  const float* other_values;  // (N, D) contiguous: of the same rows in their other role, no part of the moment
  const float* row_factors;   // (N,) of `values`
  const float* factor;        // (1,) of both
  const void* embeddings;     // (N, D), read for moments
  std::int64_t embedding_stride;
  ElementType type;  // of the embeddings
  void* gradient;    // (N, D) contiguous, of the embeddings' type if `rounds`, else float32
  bool rounds;
  float* moments;  // (N,)
  std::int32_t rows, depth;
};

struct Tiles {
  int rows, cols;  // pairs of one
};

}  // namespace contrastile::cuda
