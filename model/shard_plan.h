// Which slice of which checkpoint tensor each rank owns (Megatron style), and
// how slices are fused into the matrices the forward pass uses. Pure: made from
// a ModelConfig and (tp_size, rank) alone, before any file is opened.
//
//   qkv, gate_up   column-parallel: rows of the stored matrix, fused in that order
//   o, down        row-parallel: columns of the stored matrix; bias added once
//   embedding, head  rows, vocabulary padded to a multiple of tp_size
//   KV heads       split; replicated over tp_size / num_kv_heads ranks when fewer
//   norms, row-parallel biases   replicated
#ifndef LOCKSTEP_MODEL_SHARD_PLAN_H_
#define LOCKSTEP_MODEL_SHARD_PLAN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "model/model_config.h"

namespace lockstep {

// A rectangle of a stored matrix [rows, cols] (a vector is [rows, 1]).
struct TensorSlice {
  std::string name;  // in the checkpoint; the first that exists of name and alternatives
  std::vector<std::string> alternatives;
  int64_t rows = 0, cols = 0;  // of the whole stored tensor, to check its shape
  int64_t row_begin = 0, row_end = 0;
  int64_t col_begin = 0, col_end = 0;
};

// One matrix or vector in a rank's memory: slices stacked by rows, then zero
// rows up to `rows` (vocabulary padding).
struct LocalTensor {
  std::string name;  // "layers.3.qkv.weight", "embedding.weight", ...
  int64_t rows = 0, cols = 0;
  std::vector<TensorSlice> slices;
  // Matrices keep the serving dtype; norms and biases are float32 in memory.
  bool is_matrix = true;
};

// The local sizes the forward pass needs. All "local" counts are this rank's.
struct ShardPlan {
  int64_t tp_size = 1, rank = 0;
  int64_t local_heads = 0, local_kv_heads = 0;
  int64_t first_head = 0, first_kv_head = 0;
  int64_t local_intermediate = 0;
  int64_t padded_vocab = 0, local_vocab = 0, first_vocab = 0;
  // Row-parallel products are summed per fixed slice of K and added as a binary
  // tree over all slices, so that the sum is the same at every tp_size that
  // divides the number of slices. *_slices: of the whole model.
  int64_t attention_slices = 1, mlp_slices = 1;
  std::vector<LocalTensor> tensors;  // with the tied head absent: the embedding serves as head
};

// Refuses a tp_size that cannot work, with the sizes that can, in one line.
absl::StatusOr<ShardPlan> MakeShardPlan(const ModelConfig& config, int64_t tp_size, int64_t rank);

// Ascending tp sizes up to `limit` that MakeShardPlan accepts.
std::vector<int64_t> ValidTpSizes(const ModelConfig& config, int64_t limit);

// "heads 0-3 of 8, kv heads 0-1 of 4, mlp columns 0-511 of 1024, vocabulary 0-639 of 1280".
std::string DescribeShard(const ModelConfig& config, const ShardPlan& plan);

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_SHARD_PLAN_H_
