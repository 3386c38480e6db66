// Which rows a prefill tile holds and what they see. The query heads of a KV head
// lie side by side: row m of a span is head m % group of its position m / group.
#ifndef LOCKSTEP_KERNELS_ATTENTION_PREFILL_ROWS_CUH_
#define LOCKSTEP_KERNELS_ATTENTION_PREFILL_ROWS_CUH_

#include "kernels/attention_prefill_launch.h"
#include "kernels/device.cuh"

namespace lockstep::kernels::prefill {

struct TileRows {
  PrefillSpan span;
  int first = 0;      // row of the span
  int count = 0;      // rows of the tile that exist; 0: nothing to do
  int see_begin = 0;  // the positions that any row sees
  int see_end = 0;
  int first_position = 0;  // of the tile's first and last row
  int last_position = 0;
};

__device__ __forceinline__ TileRows FindRows(const Params& p, const PrefillSpan& span, int tile,
                                             int tile_rows) {
  TileRows t;
  t.span = span;
  t.first = tile * tile_rows;
  t.count = span.slot < 0 ? 0 : min(tile_rows, span.count * p.group - t.first);
  if (t.count <= 0) {
    t.count = 0;
    return t;
  }
  t.first_position = span.begin + t.first / p.group;
  t.last_position = span.begin + (t.first + t.count - 1) / p.group;
  t.see_begin = p.window > 0 ? max(0, t.first_position + 1 - p.window) : 0;
  t.see_end = t.last_position + 1;
  return t;
}

// Where row `m` of the tile is in q or out, counted in elements.
__device__ __forceinline__ int64_t RowOffset(const Params& p, const TileRows& t, int m, int stride,
                                             int kv_head) {
  const int row = t.first + m, position = row / p.group, head = row - position * p.group;
  return static_cast<int64_t>(t.span.first_row + position) * stride +
         (kv_head * p.group + head) * p.head_dim;
}

}  // namespace lockstep::kernels::prefill

#endif  // LOCKSTEP_KERNELS_ATTENTION_PREFILL_ROWS_CUH_
