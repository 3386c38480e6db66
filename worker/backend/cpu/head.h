// The end of a step: rows of the final hidden states to logits, logits to tokens
// and scores on rank 0, tokens to every rank's slots.
//
//   Begin -> (Logits -> Sample) for each chunk of rows -> Publish -> TakeOutput
//
// Each rank holds a stretch of the vocabulary; rank 0 gathers the stretches of a
// chunk, side by side in order of ids.
#ifndef LOCKSTEP_WORKER_BACKEND_CPU_HEAD_H_
#define LOCKSTEP_WORKER_BACKEND_CPU_HEAD_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "model/model_config.h"
#include "model/shard_plan.h"
#include "worker/backend/cpu/gemm.h"
#include "worker/backend/cpu/kernels.h"
#include "worker/backend/cpu/layer_weights.h"
#include "worker/backend/cpu/slot_table.h"
#include "worker/batch.h"
#include "worker/comm/communicator.h"
#include "worker/sampler.h"
#include "worker/thread_pool.h"

namespace lockstep::cpu {

class Head {
 public:
  // Everything referred to outlives the head.
  Head(const ModelConfig& config, const ShardPlan& plan, const ModelWeights& model,
       const Kernels& kernels, ThreadPool& pool, GemmWorkspace& workspace, int64_t max_step_rows);

  int64_t max_rows() const { return max_rows_; }
  int64_t bytes() const;  // of logits and what they are made of

  // `rows`: the step's; used until Publish.
  void Begin(absl::Span<const BatchSpan> spans, absl::Span<const StepRow> rows);
  // hidden: [rows of the step, hidden_size].
  absl::Status Logits(absl::Span<const LogitRow> chosen, const float* hidden, Communicator* comm);
  // The rows of the last Logits.
  void Sample(absl::Span<const LogitRow> chosen);
  // Appends the sampled tokens to their slots, on every rank.
  absl::Status Publish(Communicator* comm);
  // Tokens and scores are rank 0's; the communicator's counts are left to the caller.
  StepOutput TakeOutput();

 private:
  struct Pending {  // a token sampled in this step
    SlotState* slot = nullptr;
    SampledToken result;
  };

  float* RowLogits(int64_t i, int64_t count, int thread);
  void ChooseRow(const LogitRow& row, absl::Span<float> logits, int thread, SampledToken* chosen);
  void Score(const LogitRow& row, SampledToken scored);

  const ModelConfig& config_;
  const ShardPlan& plan_;
  const ModelWeights& model_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  GemmWorkspace& workspace_;
  const int64_t max_rows_;

  // Of the step.
  absl::Span<const BatchSpan> spans_;
  absl::Span<const StepRow> rows_;
  std::vector<Pending> pending_;
  StepOutput output_;

  std::vector<float> hidden_;                    // [max_rows, hidden]
  std::vector<float> projected_;                 // [max_rows, embedding_dim], with project_out
  std::vector<float> local_logits_;              // [max_rows, local_vocab]
  std::vector<float> gathered_;                  // rank 0 of several: [ranks, rows, local_vocab]
  std::vector<std::vector<float>> row_logits_;   // rank 0 of several, per thread: [padded_vocab]
  std::vector<SamplerScratch> sampler_scratch_;  // per thread
};

}  // namespace lockstep::cpu

#endif  // LOCKSTEP_WORKER_BACKEND_CPU_HEAD_H_
