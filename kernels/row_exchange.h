// All-reduce of a long message [rows][hidden] beside other kernels, whose
// multiprocessors it leaves alone:
//
//   scatter   copy engines carry every rank's rows of the message into that rank's inbox
//   sum       each rank adds up its own rows, fp32, in rank order
//             what else a layer makes of rows, each rank makes of its own alone
//   gather    copy engines carry that to all other ranks
//
// Behind the copies of either half one warp tells every other rank that they are there,
// and waits for theirs. Bytes a rank sends, M the message: (size - 1) / size of M
// twice, the second time of whatever is gathered. Results are bitwise equal on all ranks
// and from run to run.
//
// One inbox is enough: a rank scatters again only after every other one has gathered,
// and those had added up before. For the same reason what is gathered may be written
// to where the last was read by kernels ahead of the next scatter on its stream.
//
// All ranks make the same calls in the same order, each in the order of one stream. Not for
// CUDA graphs: exchanges are counted by the caller. Waits end as all_reduce.h says.
#ifndef LOCKSTEP_KERNELS_ROW_EXCHANGE_H_
#define LOCKSTEP_KERNELS_ROW_EXCHANGE_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/peers.h"
#include "kernels/types.h"

namespace lockstep::kernels {

struct RowExchange {
  Peers peers;
  size_t offset = 0;       // of its part of every rank's region, a multiple of 256
  size_t inbox_bytes = 0;  // of the rows that one rank owns of a message, a multiple of 256
};

// Of that part.
size_t RowExchangeBytes(size_t inbox_bytes, int size);
// As ClearExchangeRegion: before the first exchange, on every rank.
cudaError_t ClearRowExchange(std::byte* part, cudaStream_t stream);
// Once, before the first exchange: see InitAllReduce.
cudaError_t InitRowExchange();

// A rank's rows of a message.
struct RowShare {
  int first = 0, rows = 0;
};
constexpr int MostRowsOfShare(int rows, int size) { return (rows + size - 1) / size; }
constexpr RowShare ShareOf(int rows, int rank, int size) {
  const int most = MostRowsOfShare(rows, size);
  const int first = rank * most < rows ? rank * most : rows;
  return {first, first + most < rows ? most : rows - first};
}

// The scatter and the sum. Of `data` [rows][hidden] this rank's rows become the sums, the
// others stay. hidden * sizeof(T) and data's address: multiples of 16. number: 2 above that of
// the exchange before, at first 1.
struct SumRowsArgs {
  Type type = Type::kBF16;
  int rows = 0;
  int hidden = 0;
  void* data = nullptr;
  uint32_t number = 0;
};
cudaError_t SumRows(cudaStream_t stream, const RowExchange& exchange, const SumRowsArgs& args);

// The gather of the same exchange, of one or more arrays in every rank's region.
struct GatheredRows {
  size_t offset = 0;  // of row 0, from the exchange's part of the region, behind RowExchangeBytes
  size_t row_bytes = 0;
};
cudaError_t GatherRows(cudaStream_t stream, const RowExchange& exchange, const GatheredRows* arrays,
                       int num_arrays, int rows, uint32_t number);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_ROW_EXCHANGE_H_
