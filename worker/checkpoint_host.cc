#include "worker/checkpoint_host.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "model/memory_shortage.h"
#include "model/model_config.h"
#include "model/model_digest.h"
#include "model/safetensors.h"
#include "model/shard_plan.h"
#include "worker/backend/backend.h"
#include "worker/backend/cpu/cpu_backend.h"
#include "worker/decoder.h"
#include "worker/device_info.h"
#include "worker/gpu.h"
#include "worker/step_executor.h"
#include "worker/thread_pool.h"
#include "worker/weights.h"

namespace lockstep {
namespace {

using worker::v1::Configure;
using Clock = std::chrono::steady_clock;

// What a Configure asks to have in memory: without what belongs to an epoch.
std::string Wish(Configure configure) {
  configure.clear_epoch();
  configure.clear_group();
  configure.clear_communicator();
  configure.clear_max_skew_ms();
  return configure.SerializeAsString();
}

absl::StatusOr<DType> KvDType(const Configure& configure, DType dtype, BackendKind backend) {
  if (configure.kv_dtype().empty()) return dtype;
  absl::StatusOr<DType> kv_dtype = ParseDType(configure.kv_dtype());
  absl::Status status = kv_dtype.status();
  if (status.ok()) status = CheckKvDType(*kv_dtype, dtype, backend);
  if (status.ok()) return kv_dtype;
  return absl::InvalidArgumentError(absl::StrCat("Configure.kv_dtype ", configure.kv_dtype(), ": ",
                                                 std::string(status.message())));
}

// Calls `body`, whose containers may run out of memory, at the border where
// exceptions end.
template <typename Body>
auto WithoutThrowing(const char* what, Body body) -> decltype(body()) {
  try {
    return body();
  } catch (const std::exception& e) {
    return absl::ResourceExhaustedError(absl::StrCat(what, ": ", e.what()));
  }
}

// One configuration in memory.
struct Loaded {
  std::string wish;
  LoadReport report;
  ExecutorLimits limits;
  std::unique_ptr<ThreadPool> pool;  // before the decoder, whose backend uses it
  std::unique_ptr<Decoder> decoder;
};

class CheckpointHost final : public ModelHost {
 public:
  CheckpointHost(uint32_t threads, Gpu* gpu) : threads_(threads), gpu_(gpu) {}

  absl::StatusOr<LoadReport> Load(const Configure& configure, const Progress& progress) override {
    const std::string wish = Wish(configure);
    if (loaded_ != nullptr && loaded_->wish == wish) {
      LoadReport report = loaded_->report;
      report.phases.clear();
      return report;
    }
    // First, so that two models are never in memory at once.
    rank_ = -1;
    held_bytes_ = 0;
    loaded_.reset();
    auto loaded = std::make_unique<Loaded>();
    loaded->wish = wish;
    const absl::Status status =
        WithoutThrowing("loading", [&] { return LoadInto(*loaded, configure, progress); });
    if (!status.ok()) return status;
    loaded_ = std::move(loaded);
    rank_ = static_cast<int>(configure.rank());
    held_bytes_ = loaded_->report.weight_bytes + loaded_->report.kv_bytes;
    return loaded_->report;
  }

  absl::Status Begin(uint64_t epoch, Communicator* comm) override {
    return WithoutThrowing("an epoch's buffers", [&]() -> absl::Status {
      if (absl::Status status = loaded_->decoder->Attach(comm); !status.ok()) return status;
      executor_ = std::make_unique<StepExecutor>(loaded_->limits, epoch, loaded_->decoder.get());
      return absl::OkStatus();
    });
  }

  absl::Status Submit(const StepPlan& plan, uint64_t plan_received_ns) override {
    return WithoutThrowing("a step's buffers",
                           [&] { return executor_->Submit(plan, plan_received_ns); });
  }
  bool Done() override { return executor_->Done(); }
  absl::StatusOr<StepResult> Collect() override {
    return WithoutThrowing("a step's result", [&] { return executor_->Collect(); });
  }

  bool End() override {
    executor_.reset();
    return loaded_ == nullptr || loaded_->decoder->Drain();
  }
  int loaded_rank() const override { return rank_; }
  uint64_t held_bytes() const override { return held_bytes_; }

 private:
  absl::Status LoadInto(Loaded& loaded, const Configure& configure, const Progress& progress);

  const uint32_t threads_;
  Gpu* const gpu_;  // null: the cpu backend
  std::atomic<int> rank_{-1};
  std::atomic<uint64_t> held_bytes_{0};
  std::unique_ptr<Loaded> loaded_;
  std::unique_ptr<StepExecutor> executor_;  // of an epoch; uses loaded_
};

absl::Status CheckpointHost::LoadInto(Loaded& loaded, const Configure& configure,
                                      const Progress& progress) {
  Clock::time_point start = Clock::now();
  LoadReport& report = loaded.report;
  const auto end_phase = [&](const std::string& name) {
    const Clock::time_point now = Clock::now();
    report.phases.emplace_back(name, std::chrono::duration<double>(now - start).count());
    start = now;
  };
  const bool dummy = configure.load_format() == "dummy";
  const absl::StatusOr<DType> dtype = ParseDType(configure.dtype());
  if (!dtype.ok()) return dtype.status();
  const BackendKind kind = gpu_ == nullptr ? BackendKind::kCpu : BackendKind::kCuda;
  const absl::StatusOr<DType> kv_dtype = KvDType(configure, *dtype, kind);
  if (!kv_dtype.ok()) return kv_dtype.status();
  const absl::StatusOr<ModelConfig> config = LoadModelConfig(configure.model_path());
  if (!config.ok()) return config.status();
  if (absl::Status servable = CheckServable(*config, kind); !servable.ok()) return servable;
  const absl::StatusOr<ShardPlan> plan =
      MakeShardPlan(*config, configure.tp_size(), configure.rank());
  if (!plan.ok()) return plan.status();
  std::unique_ptr<Checkpoint> checkpoint;
  if (!dummy) {
    absl::StatusOr<std::unique_ptr<Checkpoint>> opened = Checkpoint::Open(configure.model_path());
    if (!opened.ok()) return opened.status();
    checkpoint = *std::move(opened);
  }
  const absl::StatusOr<uint64_t> digest = DigestModel(configure.model_path(), checkpoint.get());
  if (!digest.ok()) return digest.status();
  report.model_digest = *digest;
  if (configure.model_digest() != 0 && configure.model_digest() != *digest) {
    return absl::FailedPreconditionError(absl::StrCat(
        configure.model_path(),
        ": not the model that the coordinator has, or not any more: digest of config.json and "
        "weights ",
        absl::Hex(*digest, absl::kZeroPad16), " here, ",
        absl::Hex(configure.model_digest(), absl::kZeroPad16), " there"));
  }
  uint32_t threads = threads_ != 0 ? threads_ : configure.cpu_threads();
  if (threads == 0) threads = ReadDeviceInfo().num_threads;
  loaded.pool = std::make_unique<ThreadPool>(static_cast<int>(threads));
  end_phase("open");

  BackendLimits limits;
  limits.max_num_seqs = configure.max_num_seqs();
  limits.max_batched_tokens = configure.max_batched_tokens();
  limits.max_model_len = configure.max_model_len();
  limits.block_size = configure.block_size();
  limits.num_kv_blocks = configure.num_kv_blocks();
  const auto on_progress = [&](int64_t done, int64_t total) {
    progress(static_cast<uint64_t>(done), static_cast<uint64_t>(total));
  };
  const int64_t free_bytes =
      gpu_ == nullptr ? 0 : static_cast<int64_t>(gpu_->Info().memory_free_bytes);
  absl::StatusOr<std::unique_ptr<Backend>> backend = absl::UnknownError("not loaded");
  int64_t checkpoint_bytes = 0;
  if (gpu_ != nullptr) {
    backend = gpu_->Load(*config, *plan,
                         {.checkpoint = checkpoint.get(),
                          .dtype = *dtype,
                          .kv_dtype = *kv_dtype,
                          .quantization = configure.quantization(),
                          .limits = limits,
                          .progress = on_progress,
                          .end_phase = end_phase,
                          .checkpoint_bytes = &checkpoint_bytes},
                         loaded.pool.get());
  } else {
    const WeightOptions options = {.dtype = *dtype, .progress = on_progress};
    absl::StatusOr<std::unique_ptr<Weights>> weights =
        dummy ? Weights::Dummy(*plan, *config, options, loaded.pool.get())
              : Weights::Load(*checkpoint, *plan, options, loaded.pool.get());
    if (!weights.ok()) return weights.status();
    checkpoint_bytes = (*weights)->checkpoint_bytes();
    end_phase("load");
    backend =
        MakeCpuBackend(*config, *plan, *std::move(weights), limits, *kv_dtype, loaded.pool.get());
  }
  if (gpu_ != nullptr && absl::IsResourceExhausted(backend.status())) {
    const ServingShape shape = {.dtype = *dtype,
                                .kv_dtype = *kv_dtype,
                                .quantization = configure.quantization(),
                                .block_size = limits.block_size,
                                .max_num_seqs = limits.max_num_seqs,
                                .max_batched_tokens = limits.max_batched_tokens,
                                .max_model_len = limits.max_model_len};
    return ExplainShortage(*config, shape, plan->tp_size, plan->rank, BackendKind::kCuda,
                           limits.num_kv_blocks, free_bytes, backend.status());
  }
  if (!backend.ok()) return backend.status();
  report.checkpoint_bytes = static_cast<uint64_t>(checkpoint_bytes);
  report.weight_bytes = static_cast<uint64_t>((*backend)->weight_bytes());
  report.kv_bytes = static_cast<uint64_t>((*backend)->kv_bytes());
  const auto unsigned_of = [](int64_t bytes) { return static_cast<uint64_t>(bytes); };
  if (const auto bytes = (*backend)->activation_bytes()) {
    report.activation_bytes = unsigned_of(*bytes);
  }
  if (const auto bytes = (*backend)->runtime_bytes()) report.runtime_bytes = unsigned_of(*bytes);
  report.shared_bytes = unsigned_of((*backend)->shared_bytes());
  report.shard = DescribeShard(*config, *plan);
  loaded.limits = {limits.max_num_seqs,  limits.max_batched_tokens,
                   limits.max_model_len, limits.block_size,
                   limits.num_kv_blocks, static_cast<uint32_t>(config->vocab_size)};
  loaded.decoder = std::make_unique<Decoder>(*config, *plan, *std::move(backend));
  end_phase("buffers");
  return absl::OkStatus();
}

}  // namespace

std::unique_ptr<ModelHost> MakeCheckpointHost(uint32_t threads, Gpu* gpu) {
  return std::make_unique<CheckpointHost>(threads, gpu);
}

}  // namespace lockstep
