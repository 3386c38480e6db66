// The forward pass against Hugging Face transformers: the recorded outputs of
// tests/golden, at tp 1, 2 and 4, alone and batched, in chunks, with preemption.
// Tokens must be equal, logits close, and everything bit for bit the same
// however the work was cut.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <vector>

#include "tests/worker/group_runner.h"

namespace lockstep {
namespace {

std::string GoldenDir() { return std::string(LOCKSTEP_SOURCE_DIR) + "/tests/golden/"; }

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

class ParityTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    std::ifstream file(GoldenDir() + GetParam() + "/golden.json");
    golden_ = nlohmann::json::parse(file);
    absl::StatusOr<ModelConfig> config = LoadModelConfig(GoldenDir() + GetParam());
    ASSERT_TRUE(config.ok()) << config.status();
    for (const auto& c : golden_["cases"]) {
      TestRequest request{c["prompt"].get<std::vector<TokenId>>(),
                          static_cast<uint32_t>(c["greedy"].size()), GreedySampling()};
      request.sampling.logprobs = static_cast<int32_t>(config->vocab_size);
      if (c.contains("prompt_logprobs")) request.sampling.prompt_logprobs = 2;
      requests_.push_back(request);
    }
  }

  std::unique_ptr<GroupRunner> Load(int tp_size, int threads = 1) {
    // The references are computed in float32 from the stored weights.
    auto group =
        GroupRunner::Load(GoldenDir() + GetParam(), {.tp_size = tp_size, .threads = threads});
    EXPECT_TRUE(group.ok()) << group.status();
    return group.ok() ? *std::move(group) : nullptr;
  }

  nlohmann::json golden_;
  std::vector<TestRequest> requests_;
};

// log_softmax of recorded logits, as doubles.
std::vector<double> LogSoftmax(const std::vector<double>& logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (const double l : logits) sum += std::exp(l - max);
  std::vector<double> out;
  for (const double l : logits) out.push_back(l - max - std::log(sum));
  return out;
}

TEST_P(ParityTest, TokensAndLogitsAreTransformers) {
  std::unique_ptr<GroupRunner> group = Load(1);
  ASSERT_NE(group, nullptr);
  auto outputs = group->Run(requests_, {.one_by_one = true});
  ASSERT_TRUE(outputs.ok()) << outputs.status();
  for (size_t i = 0; i < requests_.size(); ++i) {
    const auto& expected = golden_["cases"][i];
    const TestOutput& output = (*outputs)[i];
    EXPECT_EQ(output.tokens, expected["greedy"].get<std::vector<TokenId>>()) << "case " << i;
    if (expected.contains("last_logits")) {
      const std::vector<double> logprobs =
          LogSoftmax(expected["last_logits"].get<std::vector<double>>());
      const double tolerance = 2e-4 + 2 * expected["noise"].get<double>();
      ASSERT_EQ(output.logprobs[0].top.size(), logprobs.size());
      for (const auto& [id, logprob] : output.logprobs[0].top) {
        EXPECT_NEAR(logprob, logprobs[id], tolerance) << "token " << id << " of case " << i;
      }
    }
    if (expected.contains("prompt_logprobs")) {
      const auto& scores = expected["prompt_logprobs"];
      ASSERT_EQ(output.prompt_logprobs.size() + 1, scores.size());
      for (size_t p = 1; p < scores.size(); ++p) {
        EXPECT_NEAR(output.prompt_logprobs[p - 1].logprob, scores[p].get<double>(), 3e-4) << p;
        EXPECT_EQ(output.prompt_logprobs[p - 1].top.size(), 2u);
      }
    } else {
      EXPECT_TRUE(output.prompt_logprobs.empty());
    }
  }
}

TEST_P(ParityTest, NothingChangesHoweverTheWorkIsCut) {
  std::vector<TestOutput> reference;
  for (const int tp_size : {1, 2, 4, 8}) {
    std::unique_ptr<GroupRunner> group = Load(tp_size, tp_size == 2 ? 2 : 1);
    ASSERT_NE(group, nullptr);
    std::vector<TestSchedule> schedules = {
        {.chunk = 1000}, {.chunk = 3}, {.shuffle = static_cast<uint32_t>(tp_size)}};
    if (tp_size == 1) {
      schedules.insert(schedules.end(), {{.one_by_one = true}, {.chunk = 1}, {.chunk = 16}});
    }
    for (const TestSchedule& schedule : schedules) {
      auto outputs = group->Run(requests_, schedule);
      ASSERT_TRUE(outputs.ok()) << outputs.status();
      if (reference.empty()) reference = *outputs;
      for (size_t i = 0; i < reference.size(); ++i) {
        ASSERT_EQ((*outputs)[i].tokens, reference[i].tokens);
        // Every log-probability of the vocabulary, bit for bit.
        ASSERT_TRUE((*outputs)[i] == reference[i])
            << "tp " << tp_size << " chunk " << schedule.chunk << " shuffle " << schedule.shuffle
            << " case " << i;
      }
    }
  }
}

// OPT with norms of neither weight nor bias: the same as one whose checkpoint
// says ones and zeros.
TEST(NormTest, WithoutTensorsIsTheIdentity) {
  namespace fs = std::filesystem;
  const std::string from = GoldenDir() + "opt";
  const fs::path to = fs::temp_directory_path() / ("lockstep_norms_" + std::to_string(getpid()));
  std::vector<TestRequest> requests = {{{2, 5, 9, 14}, 12, GreedySampling()},
                                       {{2, 77, 3}, 12, GreedySampling()}};
  for (TestRequest& request : requests) request.sampling.logprobs = 20;
  std::vector<std::vector<TestOutput>> outputs;
  for (const bool affine : {true, false}) {
    fs::create_directories(to);
    std::ifstream config_file(from + "/config.json");
    nlohmann::json config = nlohmann::json::parse(config_file), header;
    config["layer_norm_elementwise_affine"] = affine;
    std::ofstream(to / "config.json") << config;
    auto checkpoint = Checkpoint::Open(from);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    std::string data;
    for (const auto& [name, info] : (*checkpoint)->tensors()) {
      const bool norm = name.find("layer_norm") != std::string::npos;
      if (norm && !affine) continue;
      const absl::Span<const std::byte> bytes = (*checkpoint)->Bytes(info);
      std::string value(reinterpret_cast<const char*>(bytes.data()), bytes.size());
      if (norm) {
        const float identity = name.find(".weight") != std::string::npos ? 1.0f : 0.0f;
        std::vector<float> all(bytes.size() / sizeof(float), identity);
        value.assign(reinterpret_cast<const char*>(all.data()), bytes.size());
      }
      header[name] = {{"dtype", std::string(info.dtype_name)},
                      {"shape", info.shape},
                      {"data_offsets", {data.size(), data.size() + value.size()}}};
      data += value;
    }
    const std::string text = header.dump();
    const uint64_t length = text.size();
    std::ofstream out(to / "model.safetensors", std::ios::binary);
    out.write(reinterpret_cast<const char*>(&length), sizeof(length));
    out << text << data;
    out.close();
    auto group = GroupRunner::Load(to.string(), {});
    ASSERT_TRUE(group.ok()) << group.status();
    auto ran = (*group)->Run(requests, {});
    ASSERT_TRUE(ran.ok()) << ran.status();
    outputs.push_back(*ran);
    fs::remove_all(to);
  }
  EXPECT_TRUE(outputs[0] == outputs[1]);
}

INSTANTIATE_TEST_SUITE_P(Golden, ParityTest, testing::ValuesIn(GoldenModels()),
                         [](const auto& name) { return name.param; });

TEST(GoldenTest, EveryFamilyIsThere) { EXPECT_GE(GoldenModels().size(), 10u); }

}  // namespace
}  // namespace lockstep
