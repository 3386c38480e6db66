// Bytes per rank, from a ModelConfig alone. The same code sizes the KV cache at
// start and answers `lockstep plan`.
//
//   weights       every LocalTensor of the shard plan at its dtype
//   KV            2 (K and V) x layers x local_kv_heads x head_dim x bytes a token
//   activations   of the largest step (max_batched_tokens, max_num_seqs logits rows)
//   communication buffers of the collectives
#ifndef LOCKSTEP_MODEL_MEMORY_MODEL_H_
#define LOCKSTEP_MODEL_MEMORY_MODEL_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "model/model_config.h"
#include "model/shard_plan.h"

namespace lockstep {

struct ServingShape {
  DType dtype = DType::kFloat32;  // of weights and KV in memory
  std::string quantization;       // "" or "fp8": matrices of one byte and per-channel scales
  int64_t block_size = 16;        // tokens
  int64_t max_num_seqs = 24;
  int64_t max_batched_tokens = 2048;
  int64_t max_model_len = 8192;
};

struct RankMemory {
  int64_t weight_bytes = 0;
  int64_t kv_bytes_per_token = 0;
  int64_t activation_bytes = 0;
  int64_t communication_bytes = 0;
  int64_t runtime_bytes = 0;  // library contexts (CUDA, NCCL); 0 on cpu
};

absl::StatusOr<RankMemory> PredictRankMemory(const ModelConfig& config, const ServingShape& shape,
                                             int64_t tp_size, int64_t rank, BackendKind backend);

// Bytes of a shard plan's tensors as the worker allocates them.
int64_t WeightBytes(const ShardPlan& plan, DType dtype, const std::string& quantization);

// KV blocks that fit into available_bytes beside everything else; the smallest over ranks.
// ResourceExhausted, with required against available and the flag that would help, when
// not even one sequence of max_model_len fits.
absl::StatusOr<int64_t> KvBlocksThatFit(const ModelConfig& config, const ServingShape& shape,
                                        int64_t tp_size, BackendKind backend,
                                        int64_t available_bytes);

// One line of `lockstep plan`.
struct PlanRow {
  int64_t tp_size = 1;
  bool fits = false;
  std::string reason;         // why not, or what is left
  RankMemory memory;          // of the largest rank
  int64_t kv_tokens = 0;      // that fit after weights and overhead
  int64_t max_model_len = 0;  // largest for one sequence, capped by the model's
  bool headroom = false;      // weights + peak KV + overhead <= 85 % of the memory
};

struct PlanReport {
  std::vector<PlanRow> rows;  // tp 1, 2, 4, 8
  std::optional<int64_t> minimum_tp_size;
};

// Peak KV is max_num_seqs x max_model_len tokens.
absl::StatusOr<PlanReport> PlanForMemory(const ModelConfig& config, const ServingShape& shape,
                                         BackendKind backend, int64_t memory_bytes);

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_MEMORY_MODEL_H_
