// All-reduce of [rows][hidden] with what follows it in a decoder layer, each row by the rank
// that owns it (row % size, however many launches it takes):
//
//   residual = round(in of rank 0 + in of rank 1 + ... + bias + residual)     fp32, in rank order
//   normed   = round(residual / rms(residual) * weight)                      or e4m3 of it
//
// Every rank pushes a row to its owner, which does all of this and pushes the result to every
// other rank: two crossings, 2 (size - 1) / size of the message sent, the second time in
// e4m3 where that is asked for. Residual and norm are made once, not by every rank; only the
// owner's rows of `residual` are read and written. Bitwise the same on every rank and in every run.
//
// Flags, slots, aborts and order of calls as of kernels/all_reduce.h; also in CUDA graphs.
#ifndef LOCKSTEP_KERNELS_ROW_REDUCE_H_
#define LOCKSTEP_KERNELS_ROW_REDUCE_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/peers.h"
#include "kernels/types.h"

namespace lockstep::kernels {

struct RowReduce {
  Peers peers;
  size_t offset = 0;            // of its part of every rank's region, a multiple of 256
  int max_rows = 0;             // of one launch, `size` or more: more rows follow one another
  size_t row_bytes = 0;         // of the widest row
  uint64_t* counter = nullptr;  // in this device's memory, 0 before the first
};

// Of that part, which is all ones before the first exchange.
size_t RowReduceBytes(int max_rows, size_t row_bytes, int size);
// Once, before the first: see InitAllReduce.
cudaError_t InitRowReduce();

struct RowReduceArgs {
  Type type = Type::kBF16;
  int rows = 0;
  int hidden = 0;
  const void* in = nullptr;
  const void* bias = nullptr;         // [hidden], or nullptr
  void* residual = nullptr;           // [rows][hidden]
  const void* norm_weight = nullptr;  // [hidden]
  float eps = 1e-5f;
  bool plus_one = false;
  // One of the two, of every row.
  void* normed = nullptr;          // [rows][hidden]; may be `in`
  QuantizedRows quantized = {};    // hidden a multiple of 16
  const int32_t* slots = nullptr;  // as AllReduceArgs'
};

// A row must be whole vectors of 16 bytes, at most 2,048 of them.
bool RowReduceTakes(const RowReduceArgs& args, const RowReduce& reduce);
cudaError_t ReduceRows(const Launch& launch, const RowReduce& reduce, const RowReduceArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_ROW_REDUCE_H_
