#include "cli/plan_command.h"

#include <algorithm>
#include <filesystem>
#include <memory>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "model/byte_size.h"
#include "model/memory_model.h"
#include "model/model_config.h"
#include "model/safetensors.h"
#include "model/strings.h"
#include "model/tensor_match.h"
#include "nlohmann/json.hpp"

namespace lockstep {
namespace {

constexpr int64_t kDefaultMaxModelLen = 8192;

// Everything the report says.
struct Question {
  ModelConfig config;
  BackendKind backend = BackendKind::kCuda;
  ServingShape shape;
  int64_t memory_bytes = 0;
  int64_t checkpoint_files = 0;  // whose headers agree with the config; 0: config.json alone
};

absl::Status Flag(std::string_view flag, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat("--", AbslView(flag), ": ", status.message()));
}

// How many files' headers were checked against the config.
absl::StatusOr<int64_t> CheckHeaders(const std::string& model, const ModelConfig& config) {
  std::error_code error;
  if (!std::filesystem::is_directory(model, error)) return 0;
  const absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = Checkpoint::Open(model);
  if (absl::IsNotFound(checkpoint.status())) return 0;
  if (!checkpoint.ok()) return checkpoint.status();
  if (absl::Status status = MatchCheckpoint(**checkpoint, config); !status.ok()) return status;
  return static_cast<int64_t>((*checkpoint)->files().size());
}

absl::StatusOr<Question> Understand(const PlanOptions& options) {
  Question question;
  const absl::StatusOr<int64_t> memory = ParseByteSize(options.gpu_memory);
  if (!memory.ok()) return Flag("gpu-memory", memory.status());
  // Whoever writes 80 means 80 GiB.
  constexpr int64_t kLeastMemory = int64_t{1} << 20;
  if (*memory < kLeastMemory) {
    return Flag("gpu-memory", absl::InvalidArgumentError(absl::StrCat(
                                  options.gpu_memory, " is ", FormatBytes(*memory),
                                  "; expected at least 1 MiB, with a unit, as in 80GiB")));
  }
  question.memory_bytes = *memory;
  if (options.backend != "cuda" && options.backend != "cpu") {
    return Flag("backend", absl::InvalidArgumentError(absl::StrCat(
                               "\"", options.backend, "\" is not a backend; cuda or cpu")));
  }
  question.backend = options.backend == "cpu" ? BackendKind::kCpu : BackendKind::kCuda;
  if (!(options.gpu_memory_utilization > 0 && options.gpu_memory_utilization <= 1)) {
    return Flag("gpu-memory-utilization",
                absl::InvalidArgumentError(
                    absl::StrCat(options.gpu_memory_utilization, "; expected above 0, at most 1")));
  }

  absl::StatusOr<ModelConfig> config = LoadModelConfig(options.model);
  if (!config.ok()) return config.status();
  question.config = *std::move(config);
  const absl::StatusOr<int64_t> files = CheckHeaders(options.model, question.config);
  if (!files.ok()) return files.status();
  question.checkpoint_files = *files;

  ServingShape& shape = question.shape;
  const absl::StatusOr<DType> dtype =
      options.dtype == "auto" ? question.config.dtype : ParseDType(options.dtype);
  if (!dtype.ok()) return Flag("dtype", dtype.status());
  shape.dtype = *dtype;
  const absl::StatusOr<DType> kv_dtype = ParseKvCacheDType(options.kv_cache_dtype, *dtype);
  absl::Status keeps = kv_dtype.status();
  if (keeps.ok()) keeps = CheckKvDType(*kv_dtype, *dtype, question.backend);
  if (!keeps.ok()) return Flag("kv-cache-dtype", keeps);
  shape.kv_dtype = *kv_dtype;
  shape.quantization =
      options.quantization.empty() ? question.config.quantization : options.quantization;
  shape.block_size = options.block_size;
  shape.max_num_seqs = options.max_num_seqs;
  shape.max_batched_tokens = options.max_num_batched_tokens != 0 ? options.max_num_batched_tokens
                             : question.backend == BackendKind::kCpu ? 2048
                                                                     : 8192;
  shape.max_model_len =
      options.max_model_len != 0
          ? options.max_model_len
          : std::min(kDefaultMaxModelLen, question.config.max_position_embeddings);
  shape.memory_utilization = options.gpu_memory_utilization;
  return question;
}

std::string_view UnitName(BackendKind backend) {
  return backend == BackendKind::kCuda ? "a GPU" : "a rank";
}

void PrintTable(const Question& q, const PlanReport& report, std::ostream& out) {
  const ModelConfig& config = q.config;
  const DType kv_dtype = q.shape.kv_dtype.value_or(q.shape.dtype);
  out << absl::StreamFormat(
      "%s: %d layers, %d heads (%d KV), %s%s%s; read from %s\n", config.architecture,
      config.num_layers, config.num_heads, config.num_kv_heads,
      std::string(DTypeName(q.shape.dtype)),
      q.shape.quantization.empty() ? "" : absl::StrCat(" with ", q.shape.quantization, " matrices"),
      kv_dtype == q.shape.dtype ? "" : absl::StrCat(" and KV of ", AbslView(DTypeName(kv_dtype))),
      q.checkpoint_files == 0
          ? "config.json alone"
          : absl::StrCat("config.json, with the headers of ", q.checkpoint_files,
                         q.checkpoint_files == 1 ? " file" : " files", " checked"));
  out << absl::StreamFormat("%d sequences of %d tokens in %s %s, on %s; bytes of one rank:\n\n",
                            q.shape.max_num_seqs, q.shape.max_model_len,
                            FormatBytes(q.memory_bytes), std::string(UnitName(q.backend)),
                            std::string(BackendName(q.backend)));
  constexpr char kRow[] = "%3s  %-4s  %-8s  %11s  %11s  %11s  %10s  %11s\n";
  out << absl::StreamFormat(kRow, "tp", "fits", "headroom", "weights", "overhead", "peak KV",
                            "KV tokens", "longest");
  for (const PlanRow& row : report.rows) {
    const bool possible = row.memory.weight_bytes > 0;
    const auto bytes = [&](int64_t n) { return possible ? FormatBytes(n) : std::string("-"); };
    const auto count = [&](int64_t n) { return possible ? absl::StrCat(n) : std::string("-"); };
    out << absl::StreamFormat(kRow, absl::StrCat(row.tp_size), row.fits ? "yes" : "no",
                              row.headroom ? "yes" : "no", bytes(row.memory.weight_bytes),
                              bytes(row.memory.overhead_bytes()), bytes(row.peak_kv_bytes),
                              count(row.kv_tokens), count(row.max_model_len));
  }
  out << "\n";
  for (const PlanRow& row : report.rows) {
    out << absl::StreamFormat("tp %d: %s\n", row.tp_size, row.reason);
  }
  if (report.minimum_tp_size.has_value()) {
    out << absl::StreamFormat("\nminimum tensor parallel size: %d\n", *report.minimum_tp_size);
  } else {
    out << "\nminimum tensor parallel size: none up to 8\n";
  }
}

nlohmann::ordered_json RowJson(const PlanRow& row) {
  return {
      {"tensor_parallel_size", row.tp_size},
      {"fits", row.fits},
      {"headroom", row.headroom},
      {"reason", row.reason},
      {"weight_bytes", row.memory.weight_bytes},
      {"activation_bytes", row.memory.activation_bytes},
      {"communication_bytes", row.memory.communication_bytes},
      {"runtime_bytes", row.memory.runtime_bytes},
      {"kv_bytes_per_token", row.memory.kv_bytes_per_token},
      {"peak_kv_bytes", row.peak_kv_bytes},
      {"kv_tokens", row.kv_tokens},
      {"max_model_len", row.max_model_len},
  };
}

void PrintJson(const std::string& model, const Question& q, const PlanReport& report,
               std::ostream& out) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const PlanRow& row : report.rows) rows.push_back(RowJson(row));
  nlohmann::ordered_json json = {
      {"model", model},
      {"architecture", q.config.architecture},
      {"backend", std::string(BackendName(q.backend))},
      {"dtype", std::string(DTypeName(q.shape.dtype))},
      {"quantization", q.shape.quantization},
      {"kv_cache_dtype", std::string(DTypeName(q.shape.kv_dtype.value_or(q.shape.dtype)))},
      {"memory_bytes", q.memory_bytes},
      {"max_num_seqs", q.shape.max_num_seqs},
      {"max_model_len", q.shape.max_model_len},
      {"max_num_batched_tokens", q.shape.max_batched_tokens},
      {"checked_files", q.checkpoint_files},
      {"minimum_tensor_parallel_size", nullptr},
      {"rows", rows},
  };
  if (report.minimum_tp_size.has_value()) {
    json["minimum_tensor_parallel_size"] = *report.minimum_tp_size;
  }
  // A path need not be UTF-8.
  out << json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
}

}  // namespace

int RunPlan(const PlanOptions& options, std::ostream& out, std::ostream& err) {
  const auto fail = [&](const absl::Status& status) {
    err << "lockstep plan: " << std::string(status.message()) << "\n";
    return 1;
  };
  const absl::StatusOr<Question> question = Understand(options);
  if (!question.ok()) return fail(question.status());
  const absl::StatusOr<PlanReport> report =
      PlanForMemory(question->config, question->shape, question->backend, question->memory_bytes);
  if (!report.ok()) return fail(report.status());
  if (options.json) {
    PrintJson(options.model, *question, *report, out);
  } else {
    PrintTable(*question, *report, out);
  }
  return 0;
}

}  // namespace lockstep
