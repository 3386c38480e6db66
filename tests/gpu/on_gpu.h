// What tests of the whole backend on a GPU share: the golden models, the first GPU,
// a group of one rank on it, and where two runs part.
#ifndef LOCKSTEP_TESTS_GPU_ON_GPU_H_
#define LOCKSTEP_TESTS_GPU_ON_GPU_H_

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/worker/group_runner.h"
#include "worker/gpu.h"

namespace lockstep {

inline std::string GoldenDir() {
  const char* root = std::getenv("LOCKSTEP_GOLDEN");
  return root != nullptr ? std::string(root) + "/"
                         : std::string(LOCKSTEP_SOURCE_DIR) + "/tests/golden/";
}

inline std::vector<std::string> GoldenModels() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(GoldenDir())) {
    if (std::filesystem::exists(entry.path() / "model.safetensors") ||
        std::filesystem::exists(entry.path() / "model.safetensors.index.json"))
      names.push_back(entry.path().filename());
  }
  std::sort(names.begin(), names.end());
  return names;
}

inline Gpu& TheGpu() {
  static const std::unique_ptr<Gpu> gpu = [] {
    absl::StatusOr<std::unique_ptr<Gpu>> opened = Gpu::Open(0);
    if (!opened.ok()) std::fprintf(stderr, "%s\n", opened.status().ToString().c_str());
    return opened.ok() ? *std::move(opened) : nullptr;
  }();
  return *gpu;
}

inline GroupOptions OnGpu(DType dtype, bool graphs, const std::string& quantization = "",
                          std::optional<DType> kv_dtype = std::nullopt, bool row_stack = true) {
  GroupOptions options;
  options.dtype = dtype;
  options.block_size = 16;
  options.make_backend = [dtype, graphs, quantization, kv_dtype, row_stack](
                             const ModelConfig& config, const ShardPlan& plan,
                             const Checkpoint* checkpoint, const BackendLimits& limits,
                             ThreadPool* pool) {
    return TheGpu().Load(config, plan,
                         {.checkpoint = checkpoint,
                          .dtype = dtype,
                          .kv_dtype = kv_dtype,
                          .quantization = quantization,
                          .limits = limits,
                          .graphs = graphs,
                          .row_stack = row_stack},
                         pool);
  };
  return options;
}

// Where two runs first differ: "request 2, token 0", or nothing.
inline std::string FirstDifference(const std::vector<TestOutput>& a,
                                   const std::vector<TestOutput>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) continue;
    for (size_t t = 0; t < a[i].logprobs.size(); ++t) {
      if (a[i].tokens[t] == b[i].tokens[t] &&
          a[i].logprobs[t].logprob == b[i].logprobs[t].logprob) {
        continue;
      }
      return absl::StrCat("request ", i, ", token ", t, ": ", a[i].tokens[t], " at ",
                          a[i].logprobs[t].logprob, " and ", b[i].tokens[t], " at ",
                          b[i].logprobs[t].logprob);
    }
    return absl::StrCat("request ", i);
  }
  return "";
}

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_GPU_ON_GPU_H_
