#include "coordinator/serving_plan.h"

#include <algorithm>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <system_error>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/log.h"
#include "coordinator/api/limits.h"
#include "model/model_digest.h"
#include "model/safetensors.h"
#include "model/shard_plan.h"
#include "model/tensor_match.h"

namespace lockstep {
namespace {

constexpr double kCpuMemoryShare = 0.6;
constexpr int64_t kCpuKvBytes = int64_t{4} << 30;
constexpr int64_t kMaxKvBlocks = 1 << 24;
constexpr int64_t kDefaultMaxModelLen = 8'192;
// Arithmetic nobody is slower than, for the patience with a first step.
constexpr double kCpuFlops = 5e9, kCudaFlops = 1e12;

absl::Status Bad(const std::string& message) { return absl::InvalidArgumentError(message); }

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

absl::Status CheckDirectory(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_directory(path, error)) {
    return Bad(absl::StrCat("--model ", path, ": no such directory"));
  }
  if (!std::filesystem::is_regular_file(path + "/config.json", error)) {
    return Bad(absl::StrCat("--model ", path,
                            ": no config.json in it; expected a Hugging Face model directory"));
  }
  return absl::OkStatus();
}

// "demo" of "models/demo/".
std::string DirectoryName(const std::string& path) {
  std::error_code error;
  const std::filesystem::path canonical = std::filesystem::canonical(path, error);
  return error ? path : canonical.filename().string();
}

// What every door would list and no request may say is no name.
absl::StatusOr<std::string> ServedName(const CoordinatorOptions& o) {
  const bool given = !o.served_model_name.empty();
  std::string name = given ? o.served_model_name : DirectoryName(o.model);
  const auto printable = [](char c) { return c >= 0x20 && c <= 0x7e; };
  if (!name.empty() && name.size() <= limits::kIdentifierBytes &&
      std::all_of(name.begin(), name.end(), printable)) {
    return name;
  }
  return Bad(absl::StrCat(given ? "--served-model-name '" : "--model: its folder's name '",
                          OneLine(name, limits::kEchoedCharacters), "' is not 1 to ",
                          limits::kIdentifierBytes, " bytes of printable ASCII",
                          given ? "" : "; --served-model-name gives another name"));
}

absl::StatusOr<int64_t> ChooseMaxModelLen(const ModelConfig& model, const CoordinatorOptions& o) {
  const int64_t of_model = model.max_position_embeddings;
  if (o.max_model_len == 0) {
    int64_t chosen = std::min(of_model, kDefaultMaxModelLen);
    if (o.num_kv_blocks != 0) {
      chosen = std::min(chosen, int64_t{o.num_kv_blocks} * o.block_size);
    }
    return chosen;
  }
  if (o.max_model_len > of_model) {
    return Bad(absl::StrCat("--max-model-len ", o.max_model_len,
                            ": config.json says max_position_embeddings ", of_model));
  }
  if (o.num_kv_blocks != 0 && int64_t{o.num_kv_blocks} * o.block_size < o.max_model_len) {
    return Bad(absl::StrCat("--num-kv-blocks ", o.num_kv_blocks, " of ", o.block_size,
                            " tokens hold no sequence of --max-model-len ", o.max_model_len,
                            "; it needs ", CeilDiv(o.max_model_len, o.block_size)));
  }
  return o.max_model_len;
}

absl::StatusOr<DType> KvDType(const std::string& flag, DType dtype, BackendKind backend) {
  absl::StatusOr<DType> kv_dtype = ParseKvCacheDType(flag, dtype);
  absl::Status status = kv_dtype.status();
  if (status.ok()) status = CheckKvDType(*kv_dtype, dtype, backend);
  if (status.ok()) return kv_dtype;
  return Bad(absl::StrCat("--kv-cache-dtype ", flag, ": ", std::string(status.message())));
}

int64_t MaxSequences(BackendKind backend) { return backend == BackendKind::kCpu ? 64 : 256; }

// Bytes that one rank may use, on the rank that has least.
int64_t AvailableBytes(const ServingPlan& plan, const CoordinatorOptions& options,
                       const std::vector<WorkerMemory>& workers) {
  std::map<std::string, int> ranks_on_host;
  for (const WorkerMemory& worker : workers) ++ranks_on_host[worker.host];
  double least = static_cast<double>(std::numeric_limits<int64_t>::max());
  for (const WorkerMemory& worker : workers) {
    const auto total = static_cast<double>(worker.total_bytes);
    const auto free = static_cast<double>(worker.free_bytes);
    const double available = plan.backend == BackendKind::kCpu
                                 ? kCpuMemoryShare * free / ranks_on_host[worker.host]
                                 : options.gpu_memory_utilization * total - (total - free);
    least = std::min(least, std::max(0.0, available));
  }
  return static_cast<int64_t>(least);
}

absl::StatusOr<int64_t> BlocksThatFit(const ServingPlan& plan, const CoordinatorOptions& options,
                                      int64_t max_num_seqs, int64_t available_bytes) {
  ServingShape shape = plan.shape;
  shape.max_num_seqs = max_num_seqs;
  return KvBlocksThatFit(plan.model, shape, options.tensor_parallel_size, plan.backend,
                         available_bytes);
}

// That the weights are what config.json says, from their headers. A coordinator
// apart from its workers may have none.
absl::Status CheckWeights(const CoordinatorOptions& options, ServingPlan* plan) {
  std::unique_ptr<Checkpoint> checkpoint;
  if (options.load_format != "dummy") {
    absl::StatusOr<std::unique_ptr<Checkpoint>> opened = Checkpoint::Open(options.model);
    if (absl::IsNotFound(opened.status())) return absl::OkStatus();
    if (!opened.ok()) return opened.status();
    checkpoint = *std::move(opened);
    absl::Status matches = MatchCheckpoint(*checkpoint, plan->model);
    if (!matches.ok()) return matches;
  }
  const absl::StatusOr<uint64_t> digest = DigestModel(options.model, checkpoint.get());
  if (!digest.ok()) return digest.status();
  plan->model_digest = *digest;
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ServingPlan> PlanServing(const CoordinatorOptions& options) {
  if (absl::Status found = CheckDirectory(options.model); !found.ok()) return found;
  ServingPlan plan;
  absl::StatusOr<ModelConfig> model = LoadModelConfig(options.model);
  if (!model.ok()) return model.status();
  plan.model = *std::move(model);
  absl::StatusOr<GenerationConfig> generation = LoadGenerationConfig(options.model);
  if (!generation.ok()) return generation.status();
  plan.generation = *std::move(generation);
  plan.backend = options.backend == "cpu" ? BackendKind::kCpu : BackendKind::kCuda;
  if (plan.backend == BackendKind::kCpu && !options.quantization.empty()) {
    return Bad(absl::StrCat("--quantization ", options.quantization,
                            ": the cpu backend computes with unquantised weights only"));
  }
  if (absl::Status servable = CheckServable(plan.model, plan.backend); !servable.ok()) {
    return servable;
  }
  absl::StatusOr<std::string> served_name = ServedName(options);
  if (!served_name.ok()) return served_name.status();
  plan.served_name = *std::move(served_name);

  absl::StatusOr<int64_t> max_model_len = ChooseMaxModelLen(plan.model, options);
  if (!max_model_len.ok()) return max_model_len.status();
  absl::StatusOr<DType> dtype =
      options.dtype == "auto" ? plan.model.dtype : ParseDType(options.dtype);
  if (!dtype.ok()) return dtype.status();
  ServingShape& shape = plan.shape;
  shape.dtype = *dtype;
  absl::StatusOr<DType> kv_dtype = KvDType(options.kv_cache_dtype, *dtype, plan.backend);
  if (!kv_dtype.ok()) return kv_dtype.status();
  shape.kv_dtype = *kv_dtype;
  shape.quantization =
      options.quantization.empty() ? plan.model.quantization : options.quantization;
  if (!shape.quantization.empty() && *dtype == DType::kFloat32) {
    return Bad(absl::StrCat("--dtype ", options.dtype,
                            ": float32, but with FP8 weights products "
                            "give 16 bits; use --dtype bfloat16 or float16"));
  }
  shape.block_size = options.block_size;
  shape.max_model_len = *max_model_len;
  shape.max_batched_tokens = options.max_num_batched_tokens != 0 ? options.max_num_batched_tokens
                             : plan.backend == BackendKind::kCpu ? 2'048
                                                                 : 8'192;
  shape.max_num_seqs = options.max_num_seqs != 0
                           ? int64_t{options.max_num_seqs}
                           : std::min(MaxSequences(plan.backend), shape.max_batched_tokens);

  for (uint32_t rank = 0; rank < options.tensor_parallel_size; ++rank) {
    absl::StatusOr<RankMemory> memory =
        PredictRankMemory(plan.model, shape, options.tensor_parallel_size, rank, plan.backend);
    if (!memory.ok()) {
      return Bad(absl::StrCat("--tensor-parallel-size ", options.tensor_parallel_size, ": ",
                              std::string(memory.status().message())));
    }
    plan.predicted.push_back(*memory);
  }

  if (absl::Status weights = CheckWeights(options, &plan); !weights.ok()) return weights;

  plan.scheduler.max_num_seqs = options.max_num_seqs;
  plan.scheduler.max_batched_tokens = static_cast<uint32_t>(shape.max_batched_tokens);
  plan.scheduler.max_model_len = static_cast<uint32_t>(shape.max_model_len);
  plan.scheduler.block_size = options.block_size;
  plan.scheduler.max_queued_requests = options.max_queued_requests;
  plan.scheduler.vocab_size = static_cast<uint32_t>(plan.model.vocab_size);
  plan.scheduler.enable_prefix_caching = options.enable_prefix_caching;
  return plan;
}

absl::StatusOr<GroupSizes> SizeGroup(const ServingPlan& plan, const CoordinatorOptions& options,
                                     const std::vector<WorkerMemory>& workers) {
  const int64_t available_bytes = AvailableBytes(plan, options, workers);
  const int64_t block_size = plan.shape.block_size;
  const int64_t blocks_a_sequence = CeilDiv(plan.shape.max_model_len, block_size);
  int64_t sequences = plan.shape.max_num_seqs;
  int64_t blocks = options.num_kv_blocks;
  if (blocks == 0) {
    absl::StatusOr<int64_t> fit = BlocksThatFit(plan, options, sequences, available_bytes);
    // Fewer sequences need less beside the KV.
    while (!fit.ok() && options.max_num_seqs == 0 && sequences > 4) {
      sequences = std::max<int64_t>(4, sequences / 4);
      fit = BlocksThatFit(plan, options, sequences, available_bytes);
    }
    if (!fit.ok()) return fit.status();
    blocks = *fit;
  }
  if (plan.backend == BackendKind::kCpu && options.num_kv_blocks == 0) {
    const int64_t block_bytes =
        std::max<int64_t>(1, plan.predicted.front().kv_bytes_per_token * block_size);
    blocks = std::min(blocks, std::max(blocks_a_sequence, kCpuKvBytes / block_bytes));
  }
  if (options.max_num_seqs == 0) {
    const int64_t fit = 4 * blocks * block_size / plan.shape.max_model_len;
    sequences = std::min(sequences, std::max<int64_t>(4, fit));
  }
  if (plan.backend == BackendKind::kCpu && options.num_kv_blocks == 0) {
    blocks = std::min(blocks, sequences * blocks_a_sequence);
  }
  GroupSizes sizes;
  sizes.num_kv_blocks = static_cast<uint32_t>(std::min(blocks, kMaxKvBlocks));
  sizes.max_num_seqs = static_cast<uint32_t>(sequences);
  return sizes;
}

std::vector<MemoryParts> PredictGroup(const ServingPlan& plan, const GroupSizes& sizes) {
  ServingShape shape = plan.shape;
  shape.max_num_seqs = sizes.max_num_seqs;
  const int64_t kv_tokens = int64_t{sizes.num_kv_blocks} * shape.block_size;
  const auto tp_size = static_cast<int64_t>(plan.predicted.size());
  const auto bytes = [](int64_t value) { return static_cast<uint64_t>(value); };
  std::vector<MemoryParts> ranks;
  for (int64_t rank = 0; rank < tp_size; ++rank) {
    const absl::StatusOr<RankMemory> memory =
        PredictRankMemory(plan.model, shape, tp_size, rank, plan.backend);
    if (!memory.ok()) return {};
    ranks.push_back({.weights = bytes(memory->weight_bytes),
                     .kv = bytes(kv_tokens * memory->kv_bytes_per_token),
                     .activations = bytes(memory->activation_bytes),
                     .communication = bytes(memory->communication_bytes),
                     .runtime = bytes(memory->runtime_bytes)});
  }
  return ranks;
}

GroupOptions MakeGroupOptions(const ServingPlan& plan, const CoordinatorOptions& options) {
  GroupOptions group;
  group.tp_size = options.tensor_parallel_size;
  group.backend = options.backend;
  worker::v1::Configure& configure = group.configure;
  configure.set_group("0");
  std::error_code error;
  const std::filesystem::path absolute = std::filesystem::absolute(options.model, error);
  configure.set_model_path(error ? options.model : absolute.lexically_normal().string());
  configure.set_model_digest(plan.model_digest);
  configure.set_dtype(std::string(DTypeName(plan.shape.dtype)));
  if (const DType kv = plan.shape.kv_dtype.value_or(plan.shape.dtype); kv != plan.shape.dtype) {
    configure.set_kv_dtype(std::string(DTypeName(kv)));
  }
  configure.set_load_format(options.load_format);
  configure.set_quantization(plan.shape.quantization);
  configure.set_block_size(options.block_size);
  configure.set_max_batched_tokens(static_cast<uint32_t>(plan.shape.max_batched_tokens));
  configure.set_max_model_len(static_cast<uint32_t>(plan.shape.max_model_len));
  configure.set_cpu_threads(options.cpu_threads);
  // A backstop only: the coordinator's own deadlines come first.
  configure.set_max_skew_ms(30'000);
  group.timeouts.reload_ms = static_cast<int64_t>(options.recovery_timeout_s * 1000);
  group.size = [plan, options](const std::vector<WorkerMemory>& workers) {
    return SizeGroup(plan, options, workers);
  };
  int64_t largest = 0;
  for (const RankMemory& memory : plan.predicted) {
    largest = std::max(largest, memory.weight_bytes);
  }
  group.predict = [plan](const GroupSizes& sizes) { return PredictGroup(plan, sizes); };
  const double weights = static_cast<double>(largest) / DTypeBytes(plan.shape.dtype);
  const double flops = plan.backend == BackendKind::kCpu ? kCpuFlops : kCudaFlops;
  group.timeouts.step.first_step_ms_per_token = 1 + 2 * weights / flops * 1000;
  return group;
}

}  // namespace lockstep
