// Where the rows of a long step lie that the ranks exchange by kernels/row_exchange.h, in
// every rank's region:
//
//   [words, inbox | normed [rows, hidden] | the same as e4m3, and its scales [rows]]
#ifndef LOCKSTEP_WORKER_BACKEND_CUDA_SHARED_ROWS_H_
#define LOCKSTEP_WORKER_BACKEND_CUDA_SHARED_ROWS_H_

#include <cstddef>
#include <cstdint>

#include "kernels/row_exchange.h"

namespace lockstep::cuda {

struct SharedRows {
  size_t inbox_bytes = 0;
  size_t normed = 0, quantized = 0, scales = 0;  // offsets, of the part
  size_t bytes = 0;                              // of the part; 0: nothing is shared

  SharedRows() = default;
  // rows: of a step; part_rows: of a message; row_bytes: of it.
  SharedRows(int64_t rows, int64_t part_rows, int hidden, size_t row_bytes, bool fp8, int size) {
    if (size == 1 || row_bytes % 16 != 0) return;
    using kernels::AlignedInRegion;
    inbox_bytes =
        AlignedInRegion(kernels::MostRowsOfShare(static_cast<int>(part_rows), size) * row_bytes);
    normed = AlignedInRegion(kernels::RowExchangeBytes(inbox_bytes, size));
    quantized = normed + AlignedInRegion(rows * row_bytes);
    scales = quantized + (fp8 ? AlignedInRegion(rows * hidden) : 0);
    bytes = scales + (fp8 ? AlignedInRegion(rows * sizeof(float)) : 0);
  }
};

}  // namespace lockstep::cuda

#endif  // LOCKSTEP_WORKER_BACKEND_CUDA_SHARED_ROWS_H_
