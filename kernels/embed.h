// Rows by index: the vocabulary-parallel embedding, rows gathered for the head,
// and the tokens a step sampled, put where the next step finds them.
//
// All read 16 bytes a thread where width and addresses allow, and anything else
// element by element. Launchers check sizes and types only: cudaErrorInvalidValue.
#ifndef LOCKSTEP_KERNELS_EMBED_H_
#define LOCKSTEP_KERNELS_EMBED_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/types.h"

namespace lockstep::kernels {

// out[i] = table[tokens[slot[i]][position[i]] - first_vocab], or zeros where that
// token is another rank's or the row is padding. A stored -0 becomes +0, as it
// would by adding the other ranks' zeros: tp sizes stay bitwise equal.
struct EmbedRowsArgs {
  Type type = Type::kBF16;
  const void* table = nullptr;  // [local_vocab, dim]
  int first_vocab = 0;
  int local_vocab = 0;
  int dim = 0;
  const int32_t* tokens = nullptr;  // [slots, tokens_stride]
  int tokens_stride = 0;
  StepRows rows = {};  // block_table is not read
  int num_rows = 0;
  void* out = nullptr;  // [num_rows, dim]
};
cudaError_t EmbedRows(const Launch& launch, const EmbedRowsArgs& args);

// Of rows that several ranks have dealt out among them, one rank's: each `of`th, and in one of two
// ranges. As it is: all.
struct HeldRows {
  int of = 1, rank = 0;
  int begin[2] = {0, 0}, end[2] = {INT32_MAX, 0};
};

// out[i] = in[index[i]]; zeros where index[i] is -1, or not held.
struct GatherRowsArgs {
  Type type = Type::kBF16;
  const void* in = nullptr;        // [any, width]
  const int32_t* index = nullptr;  // [num_rows]
  int num_rows = 0;
  int width = 0;
  void* out = nullptr;  // [num_rows, width]
  HeldRows held = {};
};
cudaError_t GatherRows(const Launch& launch, const GatherRowsArgs& args);

// tokens[slot[i]][position[i] + 1] = sampled[i]. Nothing where the slot is -1,
// sampled[i] is negative, or the sequence's row of `tokens` is full.
struct AppendTokensArgs {
  int32_t* tokens = nullptr;  // [slots, tokens_stride]
  int tokens_stride = 0;
  const int32_t* slot = nullptr;      // [count]
  const int32_t* position = nullptr;  // [count]
  const int32_t* sampled = nullptr;   // [count]
  int count = 0;
};
cudaError_t AppendTokens(const Launch& launch, const AppendTokensArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_EMBED_H_
