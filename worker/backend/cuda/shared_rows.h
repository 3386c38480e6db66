// Where the rows lie that the ranks exchange by kernels/row_exchange.h and row_reduce.h, in
// every rank's region:
//
//   [words, inbox | normed [rows, hidden] | the same as e4m3, its scales [rows] | row_reduce.h's]
#ifndef LOCKSTEP_WORKER_BACKEND_CUDA_SHARED_ROWS_H_
#define LOCKSTEP_WORKER_BACKEND_CUDA_SHARED_ROWS_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/row_exchange.h"
#include "kernels/row_reduce.h"

namespace lockstep::cuda {

// Of one launch of row_reduce.h.
inline constexpr int64_t kMaxReducedBytes = 8 << 20;

struct SharedRows {
  size_t inbox_bytes = 0, row_bytes = 0;
  size_t normed = 0, quantized = 0, scales = 0;  // offsets, of the part
  size_t reduce = 0;                             // the same
  int reduce_rows = 0;                           // of one launch
  size_t bytes = 0;                              // of the part; 0: nothing is shared

  SharedRows() = default;
  // rows: of a step; part_rows: of a message; bytes_of_row: of it.
  SharedRows(int64_t rows, int64_t part_rows, int hidden, size_t bytes_of_row, bool fp8, int size) {
    if (size == 1 || bytes_of_row % 16 != 0) return;
    using kernels::AlignedInRegion;
    row_bytes = bytes_of_row;
    inbox_bytes =
        AlignedInRegion(kernels::MostRowsOfShare(static_cast<int>(part_rows), size) * row_bytes);
    normed = AlignedInRegion(kernels::RowExchangeBytes(inbox_bytes, size));
    quantized = normed + AlignedInRegion(rows * row_bytes);
    scales = quantized + (fp8 ? AlignedInRegion(rows * hidden) : 0);
    reduce = scales + (fp8 ? AlignedInRegion(rows * sizeof(float)) : 0);
    reduce_rows = static_cast<int>(std::min<int64_t>(rows, kMaxReducedBytes / row_bytes));
    bytes = reduce + AlignedInRegion(kernels::RowReduceBytes(reduce_rows, row_bytes, size));
  }
};

}  // namespace lockstep::cuda

#endif  // LOCKSTEP_WORKER_BACKEND_CUDA_SHARED_ROWS_H_
