// Joins the sums that tiles left behind into running totals, in the order of the tiles.
//
//   reads   4 bytes for every tile, entry and sum, once
//   writes  4 bytes for every entry and sum
//   takes   registers and shared memory of each chip: docs/cuda.md
//   bound   DRAM bandwidth
#include "device.h"
#include "kernels.h"
#include "launch.h"
#include "negatives.h"

namespace contrastile::cuda {
namespace {

constexpr int merge_threads = 256;

// So a total's shift is at most 14 above its logarithm. A tile's may be 55 above: a gradient sweep that then takes a
// shift 40 above the row's would lose the row to underflow.
constexpr float smallest_total = 0x1p-20f;

struct MergeArguments {
  Sums tiles, totals;
  int lines, length;
};

__device__ void add_lines(float* total, const float* lines, int count, int length, int entry) {
  float sum = total[entry];
  for (int line = 0; line < count; ++line) sum += lines[line * length + entry];
  total[entry] = sum;
}

__global__ void __launch_bounds__(merge_threads) merge_kernel(const __grid_constant__ MergeArguments arguments) {
  const Sums &tiles = arguments.tiles, &totals = arguments.totals;
  const int length = arguments.length, entry = block_id() * merge_threads + device::thread_id();
  if (entry >= length) return;
  if (totals.max) {
    float max = totals.max[entry], sum = totals.sum[entry];
    for (int line = 0; line < arguments.lines; ++line) {
      const float tile_max = tiles.max[line * length + entry], tile_sum = tiles.sum[line * length + entry];
      const float joint = fmaxf(max, tile_max), shift = finite(joint);
      sum = sum * exponential(max - shift) + tile_sum * exponential(tile_max - shift);
      max = joint;
    }
    if (sum > 0 && sum < smallest_total) {
      const float nearer = max + device::log2_approx(sum) / log2_e;
      sum *= exponential(max - nearer);
      max = nearer;
    }
    totals.max[entry] = max;
    totals.sum[entry] = sum;
  }
  if (totals.mass) add_lines(totals.mass, tiles.mass, arguments.lines, length, entry);
  if (totals.weight) add_lines(totals.weight, tiles.weight, arguments.lines, length, entry);
}

}  // namespace

void launch_merge(const Sums& tiles, const Sums& totals, int lines, int length, Stream stream) {
  if (length == 0) return;
  launch<merge_kernel>("merge", ceil_div(length, merge_threads), merge_threads, 0, stream,
                       MergeArguments{tiles, totals, lines, length});
}

}  // namespace contrastile::cuda
