// Statistics sweep: sums of exponentials of S = scale * X Y^T over the negatives, by row and by column.
//
//   reads   X and Y once per tile column and tile row, mostly from the L2 cache in the grouped order of tiles
//   writes  (shift, sum) of every row of a tile, and of every column if asked: 8 bytes for a tile's side and direction
//   work    one product, 2 N M D flop; one exponential a pair for both directions; with ranks one comparison more
//   takes   registers and shared memory of each chip: docs/cuda.md
//   bound   matrix pipe; multiply-adds for exact products of float32
//
// One block computes one tile. Rows and columns share its largest logit as their shift, and so share the exponentials:
// a row's sum is then exact unless all of the row lies far below that largest logit. A tile where the smallest sum says
// so (or is no number) does it again with a maximum for every row and every column. merge.cu joins the tiles' sums in a
// fixed order, so results repeat bit for bit.
#include "checks.h"
#include "instances.h"
#include "kernels.h"
#include "launch.h"
#include "negatives.h"
#include "product.h"

namespace contrastile::cuda {
namespace {

struct StatisticsArguments {
  Pairs pairs;
  Window window;
  Sums row_sums, col_sums;
  const float* positive_logit;  // (N,), read for ranks
  std::int64_t* row_rank;       // (N,), counted up by every tile; null: no ranks
};

// Adds to each row's rank: its logits that are not at most the positive's; a NaN counts.
template <class Tile>
__device__ void count_ranks(const Values<Tile>& logits, const StatisticsArguments& arguments, const Origin& origin,
                            const Place<Tile>& place) {
#pragma unroll
  for (int r = 0; r < Tile::thread_rows; ++r) {
    const int row = origin.row + place.row(r);
    const bool is_row = row < arguments.pairs.rows;
    const float positive = is_row ? arguments.positive_logit[row] : 0;
    unsigned long long above = 0;
#pragma unroll
    for (int c = 0; c < Tile::thread_cols; ++c)
      above += origin.col + place.col(c) < arguments.pairs.cols && !(logits.at[r][c] <= positive);
    for (int lanes = 1; lanes < 4; lanes *= 2) above += device::shuffle_xor(above, lanes);
    if (is_row && device::lane_id() % 4 == 0 && above)
      device::atomic_add(reinterpret_cast<unsigned long long*>(arguments.row_rank + row), above);
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::threads, 1)
    statistics_kernel(const __grid_constant__ StatisticsArguments arguments) {
  const Pairs& pairs = arguments.pairs;
  const Place<Tile> place;
  const Origin origin = origin_of_block<Tile>(arguments.window);
  char* shared = device::dynamic_shared<char>();
  auto* exchange = reinterpret_cast<Exchange<Tile>*>(shared);

  Values<Tile> logits = tile_products(pairs, shared, place, origin.row, origin.col);
  multiply_by_scale(logits, pairs, origin, place);
  keep_negatives(logits, pairs, origin, place);
  if (arguments.row_rank) count_ranks(logits, arguments, origin, place);

  float largest = -infinity;
  logits.for_each([&](int, int, float logit) { largest = fmaxf(largest, logit); });
  const float shift = finite(combine_block<Larger>(largest, exchange));
  RowValues<Tile> row_max, row_sum;
  ColValues<Tile> col_max, col_sum;
  fill(row_max, shift);
  fill(col_max, shift);
  fill(row_sum, 0);
  fill(col_sum, 0);
  logits.for_each([&](int r, int c, float logit) {
    const float term = exponential(logit - shift);
    row_sum.of[r] += term;
    col_sum.of[c] += term;
  });
  combine_rows_and_cols<Add>(row_sum, col_sum, place, exchange);
  bool exact = are_exact(row_sum, pairs, origin, place);
  if (arguments.col_sums.max) exact = exact && are_exact(col_sum, pairs, origin, place);
  if (!all_of_block(exact, exchange))
    sums_by_own_maxima(logits, place, exchange, row_max, row_sum, col_max, col_sum);

  store(arguments.row_sums.max, row_max, arguments.window, origin, place);
  store(arguments.row_sums.sum, row_sum, arguments.window, origin, place);
  store(arguments.col_sums.max, col_max, arguments.window, origin, place);
  store(arguments.col_sums.sum, col_sum, arguments.window, origin, place);
}

}  // namespace

void launch_statistics(const Pairs& pairs, const Window& window, const Sums& row_sums, const Sums& col_sums,
                       const float* positive_logit, std::int64_t* row_rank, Stream stream) {
  check_launch("statistics", pairs, window, tiles_of_sums());
  if (is_empty(window)) return;
  with_sums_tile(pairs, [&]<class Tile>(Tile) {
    launch<statistics_kernel<Tile>>("statistics", tiles_of<Tile>(window), Tile::threads, shared_bytes<Tile>, stream,
                                    StatisticsArguments{pairs, window, row_sums, col_sums, positive_logit, row_rank});
  });
}

}  // namespace contrastile::cuda
