#include "tests/worker/group_runner.h"

#include <algorithm>
#include <optional>
#include <thread>

#include "absl/strings/str_cat.h"
#include "model/safetensors.h"
#include "tests/fakes/thread_communicator.h"
#include "wire/plan_digest.h"
#include "worker/backend/cpu/cpu_backend.h"
#include "worker/weights.h"

namespace lockstep {
namespace {

// One request on its way, with the coordinator's idea of its slot.
struct Running {
  const TestRequest* request;
  TestOutput* output;
  std::vector<TokenId> tokens;  // known
  std::optional<Slot> slot;
  uint32_t computed = 0;
  std::vector<BlockId> table;

  bool done() const { return output->tokens.size() >= request->max_tokens; }
};

template <typename T>
T TakeAt(std::vector<T>& from, size_t at) {
  T value = from[at];
  from.erase(from.begin() + static_cast<int64_t>(at));
  return value;
}

absl::StatusOr<std::unique_ptr<Backend>> MakeCpu(const ModelConfig& config, const ShardPlan& plan,
                                                 const Checkpoint* checkpoint,
                                                 const BackendLimits& limits, DType dtype,
                                                 ThreadPool* pool) {
  const WeightOptions options = {.dtype = dtype, .progress = {}};
  absl::StatusOr<std::unique_ptr<Weights>> weights =
      checkpoint == nullptr ? Weights::Dummy(plan, config, options, pool)
                            : Weights::Load(*checkpoint, plan, options, pool);
  if (!weights.ok()) return weights.status();
  return MakeCpuBackend(config, plan, *std::move(weights), limits, dtype, pool);
}

}  // namespace

SlotSampling GreedySampling() {
  SlotSampling s;
  s.temperature = 0.0f;
  return s;
}

absl::StatusOr<std::unique_ptr<GroupRunner>> GroupRunner::Load(const std::string& model_dir,
                                                               const GroupOptions& options) {
  absl::StatusOr<ModelConfig> config = LoadModelConfig(model_dir);
  if (!config.ok()) return config.status();
  return Make(*config, model_dir, options);
}

absl::StatusOr<std::unique_ptr<GroupRunner>> GroupRunner::Dummy(const ModelConfig& config,
                                                                const GroupOptions& options) {
  return Make(config, "", options);
}

absl::StatusOr<std::unique_ptr<GroupRunner>> GroupRunner::Make(const ModelConfig& config,
                                                               const std::string& model_dir,
                                                               const GroupOptions& options) {
  std::unique_ptr<GroupRunner> group(new GroupRunner(config, options));
  for (int rank = 0; rank < options.tp_size; ++rank) {
    Rank& r = group->ranks_.emplace_back();
    r.pool = std::make_unique<ThreadPool>(options.threads);
    absl::StatusOr<ShardPlan> plan = MakeShardPlan(config, options.tp_size, rank);
    if (!plan.ok()) return plan.status();
    std::unique_ptr<Checkpoint> checkpoint;
    if (!model_dir.empty()) {
      absl::StatusOr<std::unique_ptr<Checkpoint>> opened = Checkpoint::Open(model_dir);
      if (!opened.ok()) return opened.status();
      checkpoint = *std::move(opened);
    }
    const BackendLimits limits = {.max_num_seqs = options.max_num_seqs,
                                  .max_batched_tokens = options.max_batched_tokens,
                                  .max_model_len = options.max_model_len,
                                  .block_size = options.block_size,
                                  .num_kv_blocks = options.num_kv_blocks};
    absl::StatusOr<std::unique_ptr<Backend>> backend =
        options.make_backend
            ? options.make_backend(config, *plan, checkpoint.get(), limits, r.pool.get())
            : MakeCpu(config, *plan, checkpoint.get(), limits, options.dtype, r.pool.get());
    if (!backend.ok()) return backend.status();
    r.decoder = std::make_unique<Decoder>(config, *plan, *std::move(backend));
  }
  if (absl::Status status = group->NewEpoch(); !status.ok()) return status;
  return group;
}

absl::Status GroupRunner::NewEpoch() {
  ++epoch_;
  comms_ = MakeThreadCommunicators(options_.tp_size);
  const ExecutorLimits limits{.max_num_seqs = options_.max_num_seqs,
                              .max_batched_tokens = options_.max_batched_tokens,
                              .max_model_len = options_.max_model_len,
                              .block_size = options_.block_size,
                              .num_kv_blocks = options_.num_kv_blocks,
                              .vocab_size = static_cast<uint32_t>(config_.vocab_size)};
  for (size_t rank = 0; rank < ranks_.size(); ++rank) {
    Rank& r = ranks_[rank];
    if (absl::Status status = r.decoder->Attach(comms_[rank].get()); !status.ok()) return status;
    r.executor = std::make_unique<StepExecutor>(limits, epoch_, r.decoder.get());
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<StepResult>> GroupRunner::Step(const StepPlan& plan) {
  std::vector<absl::StatusOr<StepResult>> outcomes(ranks_.size());
  std::vector<std::thread> threads;
  for (size_t rank = 1; rank < ranks_.size(); ++rank) {
    threads.emplace_back(
        [&, rank] { outcomes[rank] = ranks_[rank].executor->Run(plan, /*plan_received_ns=*/7); });
  }
  outcomes[0] = ranks_[0].executor->Run(plan, /*plan_received_ns=*/7);
  for (std::thread& t : threads) t.join();
  std::vector<StepResult> results;
  for (auto& outcome : outcomes) {
    if (!outcome.ok()) return outcome.status();
    results.push_back(*std::move(outcome));
  }
  for (const StepResult& r : results) {
    if (r.num_collectives != results[0].num_collectives || r.digest != results[0].digest) {
      return absl::InternalError("ranks ran a different number of collectives");
    }
  }
  return results;
}

absl::StatusOr<std::vector<TestOutput>> GroupRunner::Run(const std::vector<TestRequest>& requests,
                                                         const TestSchedule& schedule) {
  if (absl::Status status = NewEpoch(); !status.ok()) return status;
  std::mt19937 random(schedule.shuffle);
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  std::vector<TestOutput> outputs(requests.size());
  std::vector<Running> running;
  for (size_t i = 0; i < requests.size(); ++i) {
    running.push_back({&requests[i], &outputs[i], requests[i].prompt, {}, 0, {}});
  }
  std::vector<Slot> free_slots;
  for (uint32_t i = 0; i < options_.max_num_seqs; ++i) free_slots.emplace_back(i);
  std::vector<BlockId> free_blocks;
  for (uint32_t i = 0; i < options_.num_kv_blocks; ++i) free_blocks.emplace_back(i);
  if (schedule.shuffle != 0) {
    std::shuffle(free_slots.begin(), free_slots.end(), random);
    std::shuffle(free_blocks.begin(), free_blocks.end(), random);
  }

  uint64_t step = 0;
  while (std::any_of(running.begin(), running.end(), [](const Running& r) { return !r.done(); })) {
    StepPlan plan{.epoch = epoch_,
                  .step = ++step,
                  .digest = 0,
                  .finished_slots = {},
                  .new_sequences = {},
                  .grown_tables = {},
                  .spans = {}};
    PlanDigest digest(plan.epoch, plan.step);
    std::vector<Running*> spanned;
    const auto release = [&](Running& r) {
      plan.finished_slots.push_back(*r.slot);
      free_slots.push_back(*r.slot);
      free_blocks.insert(free_blocks.end(), r.table.begin(), r.table.end());
      r.slot.reset();
      r.table.clear();
      r.computed = 0;
    };
    for (Running& r : running) {
      const bool preempt = schedule.shuffle != 0 && below(12) == 0;
      if (r.slot && (r.done() || preempt)) release(r);
    }
    uint32_t budget = options_.max_batched_tokens;
    bool busy = false;
    for (Running& r : running) {
      if (r.done() || budget == 0 || (schedule.one_by_one && busy)) continue;
      busy = true;
      if (!r.slot && free_slots.empty()) continue;
      if (schedule.shuffle != 0 && below(4) == 0) continue;
      const uint32_t known = static_cast<uint32_t>(r.tokens.size());
      uint32_t count = std::min({schedule.chunk, known - r.computed, budget});
      if (schedule.shuffle != 0) count = 1 + static_cast<uint32_t>(below(count));
      std::vector<BlockId> grown;
      while ((r.table.size() + grown.size()) * options_.block_size < r.computed + count) {
        if (free_blocks.empty()) return absl::InternalError("the test needs more blocks");
        grown.push_back(TakeAt(free_blocks, schedule.shuffle != 0 ? below(free_blocks.size()) : 0));
      }
      r.table.insert(r.table.end(), grown.begin(), grown.end());
      if (!r.slot) {
        r.slot = TakeAt(free_slots, schedule.shuffle != 0 ? below(free_slots.size()) : 0);
        plan.new_sequences.push_back({*r.slot, r.tokens,
                                      static_cast<uint32_t>(r.request->prompt.size()), 0, r.table,
                                      r.request->sampling});
        // After a preemption the prompt has been scored already.
        if (!r.output->tokens.empty()) plan.new_sequences.back().sampling.prompt_logprobs = -1;
      } else if (!grown.empty()) {
        plan.grown_tables.push_back({*r.slot, grown});
      }
      digest.Add(*r.slot, r.computed, count, static_cast<uint32_t>(r.table.size()),
                 r.computed + count == known);
      plan.spans.push_back({*r.slot, count});
      r.computed += count;
      budget -= count;
      spanned.push_back(&r);
    }
    if (plan.spans.empty() && plan.finished_slots.empty()) {
      --step;
      continue;
    }
    plan.digest = digest.value();
    absl::StatusOr<std::vector<StepResult>> results = Step(plan);
    if (!results.ok()) return results.status();

    for (const SlotPromptLogprobs& scored : results->front().prompt_logprobs) {
      for (Running* r : spanned) {
        if (*r->slot != scored.slot) continue;
        // A prompt computed again after a preemption is scored again, alike.
        r->output->prompt_logprobs.resize(scored.first_position - 1);
        for (const TokenLogprobs& entry : scored.entries)
          r->output->prompt_logprobs.push_back(entry);
      }
    }
    size_t next = 0;
    for (Running* r : spanned) {
      if (r->computed != r->tokens.size()) continue;
      if (next == results->front().sampled.size()) return absl::InternalError("too few tokens");
      const SampledToken& sampled = results->front().sampled[next++];
      if (sampled.slot != *r->slot) return absl::InternalError("tokens out of span order");
      r->tokens.push_back(sampled.token);
      r->output->tokens.push_back(sampled.token);
      r->output->poisoned |= sampled.poisoned;
      if (sampled.has_logprobs) r->output->logprobs.push_back(sampled.logprobs);
    }
    if (next != results->front().sampled.size()) return absl::InternalError("too many tokens");
  }
  return outputs;
}

}  // namespace lockstep
