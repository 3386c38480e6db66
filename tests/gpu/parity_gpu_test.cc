// The cuda backend on one GPU against the recorded outputs of transformers
// (tests/golden) and against the cpu backend: float32 gives the same tokens,
// 16-bit types stay within a bound of the float32 log-probabilities.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <vector>

#include "tests/worker/group_runner.h"
#include "worker/gpu.h"

namespace lockstep {
namespace {

// |log-probability - float32's| of a 16-bit run on these models, whose random
// weights spread logits over tens: the widest seen are 1.00 (bfloat16) and 0.16
// (float16, three bits more).
constexpr double kBFloat16Bound = 1.25, kFloat16Bound = 0.2;

std::string GoldenDir() {
  const char* root = std::getenv("LOCKSTEP_GOLDEN");
  return root != nullptr ? std::string(root) + "/"
                         : std::string(LOCKSTEP_SOURCE_DIR) + "/tests/golden/";
}

std::vector<std::string> GoldenModels() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(GoldenDir())) {
    if (std::filesystem::exists(entry.path() / "model.safetensors") ||
        std::filesystem::exists(entry.path() / "model.safetensors.index.json"))
      names.push_back(entry.path().filename());
  }
  std::sort(names.begin(), names.end());
  return names;
}

Gpu& TheGpu() {
  static const std::unique_ptr<Gpu> gpu = [] {
    absl::StatusOr<std::unique_ptr<Gpu>> opened = Gpu::Open(0);
    if (!opened.ok()) std::fprintf(stderr, "%s\n", opened.status().ToString().c_str());
    return opened.ok() ? *std::move(opened) : nullptr;
  }();
  return *gpu;
}

GroupOptions OnGpu(DType dtype, bool graphs) {
  GroupOptions options;
  options.dtype = dtype;
  options.block_size = 16;
  options.make_backend = [dtype, graphs](const ModelConfig& config, const ShardPlan& plan,
                                         const Checkpoint* checkpoint, const BackendLimits& limits,
                                         ThreadPool* pool) {
    return TheGpu().Load(
        config, plan,
        {.checkpoint = checkpoint, .dtype = dtype, .limits = limits, .graphs = graphs}, pool);
  };
  return options;
}

class GpuParity : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    std::ifstream file(GoldenDir() + GetParam() + "/golden.json");
    golden_ = nlohmann::json::parse(file);
    for (const auto& c : golden_["cases"]) {
      TestRequest request{c["prompt"].get<std::vector<TokenId>>(),
                          static_cast<uint32_t>(c["greedy"].size()), GreedySampling()};
      request.sampling.logprobs = 5;
      if (c.contains("prompt_logprobs")) request.sampling.prompt_logprobs = 2;
      requests_.push_back(request);
    }
  }
  std::unique_ptr<GroupRunner> Load(const GroupOptions& options) {
    auto group = GroupRunner::Load(GoldenDir() + GetParam(), options);
    EXPECT_TRUE(group.ok()) << group.status();
    return group.ok() ? *std::move(group) : nullptr;
  }

  nlohmann::json golden_;
  std::vector<TestRequest> requests_;
};

TEST_P(GpuParity, Float32GivesTheReferenceTokensHoweverTheWorkIsCut) {
  std::unique_ptr<GroupRunner> cpu = Load({});
  ASSERT_NE(cpu, nullptr);
  auto reference = cpu->Run(requests_, {.one_by_one = true});
  ASSERT_TRUE(reference.ok()) << reference.status();
  for (const bool graphs : {false, true}) {
    std::unique_ptr<GroupRunner> group = Load(OnGpu(DType::kFloat32, graphs));
    ASSERT_NE(group, nullptr);
    for (const TestSchedule& schedule :
         {TestSchedule{.one_by_one = true}, {.chunk = 1000}, {.chunk = 3}, {.shuffle = 1}}) {
      auto outputs = group->Run(requests_, schedule);
      ASSERT_TRUE(outputs.ok()) << outputs.status();
      for (size_t i = 0; i < requests_.size(); ++i) {
        const TestOutput &got = (*outputs)[i], &want = (*reference)[i];
        EXPECT_EQ(got.tokens, golden_["cases"][i]["greedy"].get<std::vector<TokenId>>())
            << "case " << i << " graphs " << graphs << " chunk " << schedule.chunk;
        ASSERT_EQ(got.logprobs.size(), want.logprobs.size());
        for (size_t t = 0; t < want.logprobs.size(); ++t) {
          EXPECT_NEAR(got.logprobs[t].logprob, want.logprobs[t].logprob, 5e-4);
          EXPECT_EQ(got.logprobs[t].rank, want.logprobs[t].rank);
          EXPECT_EQ(got.logprobs[t].top.size(), want.logprobs[t].top.size());
        }
        ASSERT_EQ(got.prompt_logprobs.size(), want.prompt_logprobs.size());
        for (size_t t = 0; t < want.prompt_logprobs.size(); ++t) {
          EXPECT_NEAR(got.prompt_logprobs[t].logprob, want.prompt_logprobs[t].logprob, 5e-4);
        }
      }
    }
  }
}

// The reference's own tokens are fed, one prompt a position, so that one
// difference does not hide the rest: the next token's log-probability is the
// float32 one within the bound, and where another token wins, the float32's two
// best are closer than it.
TEST_P(GpuParity, SixteenBitsStayWithinTheBound) {
  std::unique_ptr<GroupRunner> cpu = Load({});
  ASSERT_NE(cpu, nullptr);
  std::vector<TestRequest> prefixes;
  for (size_t i = 0; i < requests_.size(); ++i) {
    const auto greedy = golden_["cases"][i]["greedy"].get<std::vector<TokenId>>();
    for (size_t t = 0; t < greedy.size(); t += 4) {
      TestRequest request = requests_[i];
      request.prompt.insert(request.prompt.end(), greedy.begin(), greedy.begin() + t);
      request.max_tokens = 1;
      request.sampling.prompt_logprobs = -1;
      prefixes.push_back(request);
    }
  }
  auto reference = cpu->Run(prefixes, {});
  ASSERT_TRUE(reference.ok()) << reference.status();
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    std::unique_ptr<GroupRunner> group = Load(OnGpu(dtype, true));
    ASSERT_NE(group, nullptr);
    auto outputs = group->Run(prefixes, {});
    ASSERT_TRUE(outputs.ok()) << outputs.status();
    const double bound = dtype == DType::kBFloat16 ? kBFloat16Bound : kFloat16Bound;
    double worst = 0.0;
    size_t equal = 0;
    for (size_t i = 0; i < prefixes.size(); ++i) {
      const TokenLogprobs &got = (*outputs)[i].logprobs[0], &want = (*reference)[i].logprobs[0];
      for (const auto& [id, logprob] : want.top) {
        for (const auto& [other, value] : got.top) {
          if (id == other) worst = std::max(worst, std::abs(double{logprob} - value));
        }
      }
      if ((*outputs)[i].tokens == (*reference)[i].tokens) {
        ++equal;
      } else {
        EXPECT_LT(want.top[0].second - want.top[1].second, bound) << "prefix " << i;
      }
    }
    EXPECT_LT(worst, bound);
    std::printf("%s %s: %zu of %zu tokens equal, largest log-probability error %.4f\n",
                GetParam().c_str(), std::string(DTypeName(dtype)).c_str(), equal, prefixes.size(),
                worst);
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, GpuParity, testing::ValuesIn(GoldenModels()),
                         [](const auto& name) { return name.param; });

}  // namespace
}  // namespace lockstep
