// Bytes per rank, from a ModelConfig alone. The same code sizes the KV cache at
// start and answers `lockstep plan`.
//
//   weights       every LocalTensor of the shard plan: matrices in the serving
//                 dtype (fp8: one byte and a float32 scale a row), vectors in
//                 float32 (cpu) or the serving dtype (cuda)
//   KV            2 (K and V) x layers x local_kv_heads x head_dim x bytes of kv_dtype a token
//   activations   of the largest step: max_batched_tokens rows of every buffer
//                 between two matrices, the logits of a chunk of rows, and, on
//                 rank 0, those of the whole vocabulary; on cpu also the scratch
//                 of 16 threads; on cuda room for widened keys and values of one byte
//   communication buffers of the collectives
//   runtime       what libraries take for themselves
//
// Every rank of a group has the same shapes; rank 0 holds a little more than
// the others, because it samples.
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
  DType dtype = DType::kFloat32;  // of weights in memory
  std::optional<DType> kv_dtype;  // of keys and values; nothing: dtype (see CheckKvDType)
  // "" or "fp8": the matrices of the layers in one byte an element, with a
  // float32 scale a row; embedding, head, norms and biases as without it.
  std::string quantization;
  int64_t block_size = 16;  // tokens
  int64_t max_num_seqs = 24;
  int64_t max_batched_tokens = 2048;
  int64_t max_model_len = 8192;
  // Share of the memory that serving may use; read by PlanForMemory alone.
  double memory_utilization = 0.9;
};

struct RankMemory {
  int64_t weight_bytes = 0;
  int64_t kv_bytes_per_token = 0;
  int64_t activation_bytes = 0;
  int64_t communication_bytes = 0;
  int64_t runtime_bytes = 0;  // library contexts (CUDA, cuBLAS); 0 on cpu

  int64_t overhead_bytes() const { return activation_bytes + communication_bytes + runtime_bytes; }
  int64_t fixed_bytes() const { return weight_bytes + overhead_bytes(); }  // all but KV
};

// InvalidArgument: a tp_size that cannot work, with this quantization or at all, or a shape out of
// bounds.
absl::StatusOr<RankMemory> PredictRankMemory(const ModelConfig& config, const ServingShape& shape,
                                             int64_t tp_size, int64_t rank, BackendKind backend);

// Bytes of a shard plan's tensors as the worker allocates them.
int64_t WeightBytes(const ShardPlan& plan, DType dtype, const std::string& quantization,
                    BackendKind backend = BackendKind::kCpu);

// Tokens of all heads whose keys and values of one byte the cuda backend keeps in 16 bits
// while a step's prompts attend to them: one sequence of the longest, or a step's rows.
int64_t WidenedKvTokens(int64_t max_model_len, int64_t max_batched_tokens);

// Whether --quantization touches it: the matrices of the layers. The embedding
// and the head are looked up and multiplied in the serving dtype by every fp8
// checkpoint there is.
bool IsQuantizedMatrix(const LocalTensor& tensor);

// KV blocks that fit into available_bytes beside everything else; the smallest over ranks.
// ResourceExhausted, with required against available and the flag that would help, when
// not even one sequence of max_model_len fits.
absl::StatusOr<int64_t> KvBlocksThatFit(const ModelConfig& config, const ServingShape& shape,
                                        int64_t tp_size, BackendKind backend,
                                        int64_t available_bytes);

// One line of `lockstep plan`.
struct PlanRow {
  int64_t tp_size = 1;
  // One sequence of max_model_len fits within memory_utilization.
  bool fits = false;
  std::string reason;  // why not, or what is left
  RankMemory memory;   // of the largest rank; zero where tp_size cannot work
  // KV of max_num_seqs x max_model_len tokens.
  int64_t peak_kv_bytes = 0;
  int64_t kv_tokens = 0;      // that memory_utilization leaves room for
  int64_t max_model_len = 0;  // largest for one sequence, capped by the model's
  // weights + peak KV + overhead <= 85 % of the memory. Implies fits.
  bool headroom = false;
};

struct PlanReport {
  std::vector<PlanRow> rows;               // tp 1, 2, 4, 8
  std::optional<int64_t> minimum_tp_size;  // of the first row with headroom
};

constexpr double kPlanHeadroom = 0.15;

absl::StatusOr<PlanReport> PlanForMemory(const ModelConfig& config, const ServingShape& shape,
                                         BackendKind backend, int64_t memory_bytes);

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_MEMORY_MODEL_H_
