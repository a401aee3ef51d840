// The kernels as a host program starts them. Each launch is put on a stream and not waited for. Arguments that do not
// fit throw a std::invalid_argument with the kernel and the embeddings' shapes; what the driver refuses, which may be
// an earlier kernel's failure, a std::runtime_error with the kernel, its blocks, threads and shared memory. A window
// without pairs starts nothing.
#pragma once

#include <cstdint>

#include "arguments.h"

struct CUstream_st;

namespace contrastile::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// Sums over the negatives of each tile; with `row_rank` also, for every row, how many logits are not at most
// `positive_logit`, added to what is there.
void launch_statistics(const Pairs&, const Window&, const Sums& row_sums, const Sums& col_sums,
                       const float* positive_logit, std::int64_t* row_rank, Stream);
// Coefficients of each tile into a strip, and the sums met on the way.
void launch_coefficients(const Pairs&, const Window&, const Weights&, const Strip&, const Sums& row_sums,
                         const Sums& col_sums, Stream);
// Gradients, and sums as above; embeddings of 16 bits with at most `most_fused_features` features.
void launch_gradient(const Pairs&, const Window&, const Weights&, const Gradients&, const Sums& row_sums,
                     const Sums& col_sums, Stream);
// `lines` lines of sums into totals (length,), joined with what these hold.
void launch_merge(const Sums& tiles, const Sums& totals, int lines, int length, Stream);
// (N,) logits of the positives.
void launch_positives(const Pairs&, float* positive_logit, Stream);
void launch_finish_rows(const RowSums&, Stream);

constexpr int most_fused_features = 128;

// Pairs of one tile of the statistics and coefficients kernels, and of the gradient kernel.
Tiles tiles_of_sums();
Tiles tiles_of_gradient();

}  // namespace contrastile::cuda
