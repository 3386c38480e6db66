#include "cli/bench/bench_target.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <random>
#include <string_view>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/bench/request_log.h"
#include "cli/client.h"
#include "common/version.h"
#include "model/byte_size.h"

namespace lockstep {
namespace {

constexpr int64_t kConnectTimeoutMs = 10'000;
// What was measured on the cards the targets were set for (H200).
constexpr double kCudaBytesPerS = 4.3e12;
constexpr double kCudaFlopsPerS = 770e12;
// What others' best products of FP8 matrices reach there: a floor is not set by ours.
constexpr double kCudaQuantizedFlopsPerS = 1350e12;
// Of one byte against two, at the most: where only --compute is known.
constexpr double kQuantizedSpeedup = 2;
constexpr double kLeastCompute = 1e12;

bool HasFlag(const std::vector<std::string>& flags, const std::string& name) {
  return std::any_of(flags.begin(), flags.end(), [&](const std::string& flag) {
    return flag == name || flag.rfind(name + "=", 0) == 0;
  });
}

std::vector<std::string> ServeArgs(const BenchFlags& flags, const ServerNeeds& needs) {
  std::vector<std::string> args = {"--model", flags.model, "--tensor-parallel-size",
                                   absl::StrCat(flags.tensor_parallel_size)};
  const auto add = [&](const std::string& name, const std::string& value) {
    if (value.empty() || HasFlag(flags.serve_flags, name)) return;
    args.push_back(name);
    args.push_back(value);
  };
  const auto number = [](uint32_t n) { return n == 0 ? std::string() : absl::StrCat(n); };
  add("--backend", flags.backend);
  add("--dtype", flags.dtype);
  add("--load-format", flags.load_format);
  add("--quantization", flags.quantization);
  add("--kv-cache-dtype", flags.kv_cache_dtype);
  add("--max-num-seqs", number(needs.sequences));
  add("--max-queued-requests", number(needs.requests));
  add("--max-model-len", number(needs.tokens));
  if (!HasFlag(flags.serve_flags, "--enable-prefix-caching")) {
    args.push_back("--no-enable-prefix-caching");
  }
  args.insert(args.end(), flags.serve_flags.begin(), flags.serve_flags.end());
  return args;
}

bool OnCuda(const BenchFlags& flags, const v1::GetModelInfoResponse& info) {
  if (flags.backend == "cuda") return true;
  return info.ranks_size() > 0 && info.ranks(0).device().find("NVIDIA") != std::string::npos;
}

// "770TFLOPS", "770T" or a plain number; "4.3TB/s" or "4.3TB".
absl::StatusOr<double> ParseRate(std::string_view flag, std::string text) {
  const auto cut = [&](std::string_view end) {
    if (text.size() > end.size() && text.ends_with(end)) text.resize(text.size() - end.size());
  };
  if (flag == "--bandwidth") {
    cut("/s");
    const absl::StatusOr<int64_t> bytes = ParseByteSize(text);
    if (bytes.ok()) return static_cast<double>(*bytes);
    return absl::InvalidArgumentError(
        absl::StrCat("--bandwidth: ", bytes.status().message(), "; as in 4.3TB/s"));
  }
  cut("FLOPS");
  double scale = 1;
  if (text.ends_with("T")) {
    cut("T");
    scale = 1e12;
  }
  double value = 0;
  if (absl::SimpleAtod(text, &value) && value > 0) {
    // A unit was forgotten, and every floor would be days.
    if (value * scale >= kLeastCompute) return value * scale;
    return absl::InvalidArgumentError(absl::StrFormat(
        "--compute: %g operations a second are below 1 TFLOP/s; as in 770TFLOPS", value * scale));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("--compute: \"", text, "\" is no rate; as in 770TFLOPS"));
}

// A served model's name need not be UTF-8.
std::string Dump(const nlohmann::ordered_json& report) {
  return report.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

absl::StatusOr<Hardware> HardwareOf(const BenchFlags& flags, const v1::GetModelInfoResponse& info) {
  Hardware hardware;
  if (OnCuda(flags, info)) hardware = {kCudaBytesPerS, kCudaFlopsPerS, kCudaQuantizedFlopsPerS};
  if (!flags.bandwidth.empty()) {
    const absl::StatusOr<double> rate = ParseRate("--bandwidth", flags.bandwidth);
    if (!rate.ok()) return rate.status();
    hardware.bytes_per_s = *rate;
  }
  if (!flags.compute.empty()) {
    const absl::StatusOr<double> rate = ParseRate("--compute", flags.compute);
    if (!rate.ok()) return rate.status();
    hardware.flops_per_s = *rate;
    hardware.quantized_flops_per_s = kQuantizedSpeedup * *rate;
  }
  return hardware;
}

// What --model's config.json says of the target.
absl::Status FillFromModel(const BenchFlags& flags, BenchTarget* target) {
  const v1::GetModelInfoResponse& info = target->info;
  const absl::StatusOr<Hardware> hardware = HardwareOf(flags, info);
  if (!hardware.ok()) return hardware.status();
  if (!flags.quantization.empty()) target->quantization = flags.quantization;
  if (flags.model.empty()) return absl::OkStatus();
  const absl::StatusOr<ModelConfig> config = LoadModelConfig(flags.model);
  if (!config.ok()) return config.status();
  if (config->architecture != info.architecture()) {
    return absl::InvalidArgumentError(absl::StrCat("--model: ", flags.model, " is a ",
                                                   config->architecture, ", and ", target->address,
                                                   " serves a ", info.architecture()));
  }
  target->quantization = Quantization(*config, flags.quantization, flags.serve_flags);
  if (hardware->bytes_per_s == 0) return absl::OkStatus();
  const absl::StatusOr<DType> dtype = ParseDType(info.dtype());
  if (!dtype.ok()) return dtype.status();
  // A server of before FP8 KV does not say.
  const absl::StatusOr<DType> kv_dtype =
      info.kv_cache_dtype().empty() ? dtype : ParseDType(info.kv_cache_dtype());
  if (!kv_dtype.ok()) return kv_dtype.status();
  absl::StatusOr<Floor> floor =
      Floor::Make(*config, *dtype, *kv_dtype, *target->quantization, info.tp_size(), *hardware);
  if (!floor.ok()) return floor.status();
  target->floor = *std::move(floor);
  return absl::OkStatus();
}

}  // namespace

void AddBenchFlags(CLI::App* app, BenchFlags* flags) {
  std::string group = "Server";
  app->add_option("--server,--address", flags->server, "Measure this one: host:port or unix:path")
      ->group(group);
  AddAccessFlags(app, &flags->access);
  app->add_option("--model", flags->model,
                  "Serve this directory just for the measurement; with --server: where its "
                  "config.json is, for the floor")
      ->group(group);
  app->add_option("--tp,--tensor-parallel-size", flags->tensor_parallel_size,
                  "Workers, with --model")
      ->group(group)
      ->capture_default_str();
  app->add_option("--backend", flags->backend, "cpu or cuda, with --model")->group(group);
  app->add_option("--dtype", flags->dtype, "As serve's, with --model")->group(group);
  app->add_option("--load-format", flags->load_format, "auto or dummy, with --model")->group(group);
  app->add_option("--quantization", flags->quantization,
                  "fp8, with --model; with --server: what it has, for the floor")
      ->group(group);
  app->add_option("--kv-cache-dtype", flags->kv_cache_dtype, "auto or fp8, with --model")
      ->group(group);
  app->add_option("serve-flags", flags->serve_flags,
                  "After --, with --model: further flags of `lockstep serve`")
      ->group(group);
  app->add_option("--server-log", flags->server_log,
                  "Keep what a server that was started here said in this file")
      ->group(group);
  group = "Report";
  app->add_option("--bandwidth", flags->bandwidth,
                  "Memory bandwidth of a rank, for the floor (cuda: 4.3TB/s)")
      ->group(group);
  app->add_option("--compute", flags->compute,
                  "Arithmetic rate of a rank, for prefill's floor (cuda: 770TFLOPS)")
      ->group(group);
  app->add_option("--seed", flags->seed, "Of the prompts; 0: drawn and reported")->group(group);
  app->add_flag("--json", flags->json, "Print JSON instead of the table")->group(group);
  app->add_option("--output", flags->output, "Write the JSON to this file as well")->group(group);
}

absl::StatusOr<BenchTarget> OpenBenchTarget(const BenchFlags& flags, const ServerNeeds& needs) {
  if (flags.server.empty() && flags.model.empty()) {
    return absl::InvalidArgumentError(
        "--server: give the address of a server, or --model DIR to start one");
  }
  if (!flags.server.empty() && !flags.serve_flags.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(flags.serve_flags.front(), ": flags after -- need --model without --server"));
  }
  BenchTarget target;
  target.address = flags.server;
  if (!flags.server.empty()) target.access = flags.access;
  target.seed = flags.seed != 0 ? flags.seed : std::random_device()();
  if (flags.server.empty()) {
    std::fprintf(stderr, "starting %s at tp %u\n", flags.model.c_str(), flags.tensor_parallel_size);
    const int64_t begin_ns = NowNs();
    absl::StatusOr<std::unique_ptr<LocalServer>> local =
        LocalServer::Start(ServeArgs(flags, needs));
    if (!local.ok()) return local.status();
    target.local = *std::move(local);
    target.address = target.local->address();
    target.started_s = static_cast<double>(NowNs() - begin_ns) * 1e-9;
  }
  absl::StatusOr<v1::GetModelInfoResponse> info =
      Client(target.address, target.access).WaitReady(kConnectTimeoutMs);
  if (absl::IsUnauthenticated(info.status())) {
    return absl::UnauthenticatedError(
        absl::StrCat("--api-key: ", target.address, ": ", std::string(info.status().message())));
  }
  if (!info.ok()) {
    return absl::Status(info.status().code(),
                        absl::StrCat("--server: no server answers at ", target.address, " (",
                                     std::string(info.status().message()), ")"));
  }
  target.info = *std::move(info);
  if (absl::Status filled = FillFromModel(flags, &target); !filled.ok()) return filled;
  return target;
}

absl::Status CheckNeeds(const v1::GetModelInfoResponse& info, const ServerNeeds& needs) {
  const auto small = [](const char* what, uint64_t has, uint64_t wanted, const char* flag) {
    return absl::FailedPreconditionError(
        absl::StrFormat("the server has %u %s and %u are needed: start it with %s %u", has, what,
                        wanted, flag, wanted));
  };
  if (needs.tokens > info.max_model_len()) {
    return small("tokens a sequence", info.max_model_len(), needs.tokens, "--max-model-len");
  }
  if (needs.sequences > info.max_num_seqs()) {
    return small("sequences at once", info.max_num_seqs(), needs.sequences, "--max-num-seqs");
  }
  const uint64_t each = (needs.tokens + info.block_size() - 1) / std::max(info.block_size(), 1u);
  const uint64_t blocks = each * needs.sequences;
  if (blocks > info.num_kv_blocks()) {
    return small("KV blocks", info.num_kv_blocks(), blocks, "--num-kv-blocks");
  }
  return absl::OkStatus();
}

nlohmann::ordered_json DescribeTarget(const BenchFlags& flags, const BenchTarget& target) {
  const v1::GetModelInfoResponse& info = target.info;
  nlohmann::ordered_json json = {
      {"lockstep", kVersion},
      {"server_version", info.version()},
      {"model", info.model()},
      {"architecture", info.architecture()},
      {"dtype", info.dtype()},
      {"quantization", nullptr},
      {"kv_cache_dtype", info.kv_cache_dtype()},
      {"tensor_parallel_size", info.tp_size()},
      {"device", info.ranks_size() > 0 ? info.ranks(0).device() : ""},
      {"max_num_seqs", info.max_num_seqs()},
      {"kv_tokens", uint64_t{info.num_kv_blocks()} * info.block_size()},
      {"seed", target.seed},
      {"serve_flags", flags.serve_flags},
  };
  if (target.quantization) json["quantization"] = *target.quantization;
  if (target.local != nullptr) json["start_seconds"] = target.started_s;
  if (target.floor) json["weight_bytes_read_a_step"] = target.floor->weight_bytes();
  return json;
}

std::string TargetLine(const BenchTarget& target) {
  const v1::GetModelInfoResponse& info = target.info;
  std::string line = absl::StrFormat(
      "%s (%s, %s%s%s), tp %u on %s", info.model(), info.architecture(), info.dtype(),
      target.quantization.value_or("").empty() ? "" : " with " + *target.quantization + " matrices",
      info.kv_cache_dtype() == info.dtype() || info.kv_cache_dtype().empty()
          ? ""
          : ", KV " + info.kv_cache_dtype(),
      info.tp_size(), info.ranks_size() > 0 ? info.ranks(0).device() : "?");
  if (target.local != nullptr) absl::StrAppendFormat(&line, ", ready in %.2f s", target.started_s);
  if (target.floor) {
    absl::StrAppendFormat(&line, "; a step reads %s of weights a rank",
                          FormatBytes(target.floor->weight_bytes()));
  }
  return line + "\n";
}

std::string CachedLine(const nlohmann::ordered_json& report) {
  const uint64_t cached = report.at("cached_prompt_tokens").get<uint64_t>();
  if (cached == 0) return "";
  return absl::StrFormat("       %u prompt tokens came from the prefix cache\n", cached);
}

absl::Status WriteReportFile(const std::string& flag, const std::string& path,
                             const std::string& text) {
  if (path.empty()) return absl::OkStatus();
  std::ofstream file(path, std::ios::trunc);
  file << text << std::flush;
  if (file) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat(flag, " ", path, ": cannot be written"));
}

void BenchOutput::Text(const std::string& text) const {
  if (flags_.json) return;
  std::fputs(text.c_str(), stdout);
  std::fflush(stdout);
}

absl::Status BenchOutput::Begin() const { return Save(nlohmann::ordered_json::object()); }

absl::Status BenchOutput::Save(nlohmann::ordered_json report) const {
  report["complete"] = false;
  return WriteReportFile("--output", flags_.output, Dump(report));
}

absl::Status BenchOutput::Finish(nlohmann::ordered_json report) const {
  report["complete"] = true;
  if (flags_.json) std::fputs(Dump(report).c_str(), stdout);
  std::fflush(stdout);
  return WriteReportFile("--output", flags_.output, Dump(report));
}

}  // namespace lockstep
