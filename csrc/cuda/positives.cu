// Logits of the positives, as the tiles of the sweeps compute them.
//
//   reads   anchors twice, as a tile is twice as high as its diagonal; the candidate of each positive once
//   writes  4 bytes a row
//   work    a tile's product for its diagonal alone: a tile's rows / M of a sweep
//   takes   registers and shared memory of each chip: docs/cuda.md
//   bound   DRAM bandwidth
//
// A dot product summed in another order would differ from a tile's logit in the last bit, and a duplicate of the
// positive would then rank above or below it by chance. Hence the same products, of which only the diagonal is kept.
#include "checks.h"
#include "instances.h"
#include "kernels.h"
#include "launch.h"
#include "negatives.h"
#include "product.h"

namespace contrastile::cuda {
namespace {

struct PositiveArguments {
  Pairs pairs;
  float* positive_logit;  // (N,), written
};

template <class Tile>
__global__ void __launch_bounds__(Tile::threads, 1)
    positives_kernel(const __grid_constant__ PositiveArguments arguments) {
  constexpr int rows = Tile::block_rows < Tile::block_cols ? Tile::block_rows : Tile::block_cols;  // of the diagonal
  const Pairs& pairs = arguments.pairs;
  const Place<Tile> place;
  const int first_row = block_id() * rows;
  const auto anchor_at = [&](int row) { return first_row + row; };
  const auto candidate_at = [&](int col) {
    const int row = first_row + col;
    return row < pairs.rows ? static_cast<int>(pairs.positives[row]) : 0;
  };
  Values<Tile> logits =
      tile_products(pairs, device::dynamic_shared<char>(), place, anchor_at, candidate_at);
  multiply_by_scale(logits, pairs, {.row = first_row}, place);
  logits.for_each([&](int r, int c, float logit) {
    const int row = place.row(r);
    if (row == place.col(c) && row < rows && first_row + row < pairs.rows)
      arguments.positive_logit[first_row + row] = logit;
  });
}

}  // namespace

void launch_positives(const Pairs& pairs, float* positive_logit, Stream stream) {
  check_embeddings("positives", pairs);
  if (pairs.rows == 0) return;
  with_sums_tile(pairs, [&]<class Tile>(Tile) {
    constexpr int rows = Tile::block_rows < Tile::block_cols ? Tile::block_rows : Tile::block_cols;
    launch<positives_kernel<Tile>>("positives", ceil_div(pairs.rows, rows), Tile::threads, shared_bytes<Tile>, stream,
                                   PositiveArguments{pairs, positive_logit});
  });
}

}  // namespace contrastile::cuda
