// A tensor-parallel group inside one test: one executor, decoder and cpu backend
// a rank, ranks as threads, and a small scheduler that makes plans as the
// coordinator does. How it cuts the work into steps is the test's to choose; what
// comes out must not depend on it.
//
//   auto group = GroupRunner::Load(dir, {.tp_size = 2});
//   auto outputs = (*group)->Run({{.prompt = {5, 6}, .max_tokens = 8}}, {.chunk = 3});
#ifndef LOCKSTEP_TESTS_WORKER_GROUP_RUNNER_H_
#define LOCKSTEP_TESTS_WORKER_GROUP_RUNNER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/model_config.h"
#include "model/safetensors.h"
#include "model/shard_plan.h"
#include "wire/step_plan.h"
#include "worker/backend/backend.h"
#include "worker/comm/communicator.h"
#include "worker/decoder.h"
#include "worker/step_executor.h"
#include "worker/thread_pool.h"

namespace lockstep {

struct GroupOptions {
  int tp_size = 1;
  int threads = 1;  // a rank
  uint32_t block_size = 4;
  uint32_t num_kv_blocks = 256;
  uint32_t max_num_seqs = 8;
  uint32_t max_batched_tokens = 128;
  uint32_t max_model_len = 160;
  DType dtype = DType::kFloat32;  // of weights and KV
  // Null: the cpu backend.
  std::function<absl::StatusOr<std::unique_ptr<Backend>>(
      const ModelConfig& config, const ShardPlan& plan, const Checkpoint* checkpoint,
      const BackendLimits& limits, ThreadPool* pool)>
      make_backend = nullptr;
};

struct TestRequest {
  std::vector<TokenId> prompt;
  uint32_t max_tokens = 1;
  SlotSampling sampling;
};

struct TestOutput {
  std::vector<TokenId> tokens;
  std::vector<TokenLogprobs> logprobs;         // of each token, where asked for
  std::vector<TokenLogprobs> prompt_logprobs;  // of prompt tokens 1, 2, ...
  bool poisoned = false;
  bool operator==(const TestOutput&) const = default;
};

struct TestSchedule {
  uint32_t chunk = 1000;    // most tokens of a span
  bool one_by_one = false;  // no batch mates
  uint32_t shuffle = 0;     // not 0: a seed; random chunks, sequences left out, slots and
                            // blocks in random order, and preemptions
};

// A small greedy or sampled request that asks for every token's log-probability.
SlotSampling GreedySampling();

class GroupRunner {
 public:
  static absl::StatusOr<std::unique_ptr<GroupRunner>> Load(const std::string& model_dir,
                                                           const GroupOptions& options);
  static absl::StatusOr<std::unique_ptr<GroupRunner>> Dummy(const ModelConfig& config,
                                                            const GroupOptions& options);

  // A new epoch, then every request to its end.
  absl::StatusOr<std::vector<TestOutput>> Run(const std::vector<TestRequest>& requests,
                                              const TestSchedule& schedule);

  // One plan on every rank, with the digest filled in from `plan` as checked by
  // rank 0's books; the results by rank.
  absl::StatusOr<std::vector<StepResult>> Step(const StepPlan& plan);
  absl::Status NewEpoch();
  uint64_t epoch() const { return epoch_; }
  const ModelConfig& config() const { return config_; }
  const Decoder& decoder(int rank) const { return *ranks_[rank].decoder; }
  Communicator& communicator(int rank) { return *comms_[rank]; }

 private:
  struct Rank {
    std::unique_ptr<ThreadPool> pool;
    std::unique_ptr<Decoder> decoder;
    std::unique_ptr<StepExecutor> executor;
  };

  static absl::StatusOr<std::unique_ptr<GroupRunner>> Make(const ModelConfig& config,
                                                           const std::string& model_dir,
                                                           const GroupOptions& options);
  GroupRunner(const ModelConfig& config, const GroupOptions& options)
      : config_(config), options_(options) {}

  const ModelConfig config_;
  const GroupOptions options_;
  uint64_t epoch_ = 0;
  std::vector<std::unique_ptr<Communicator>> comms_;
  std::vector<Rank> ranks_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_WORKER_GROUP_RUNNER_H_
