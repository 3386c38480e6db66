// Keys and values of one byte (--kv-cache-dtype fp8) on one GPU: near the float32
// reference, the same whatever else runs, and by a checkpoint's scales where it has some.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/fakes/safetensors_writer.h"
#include "tests/gpu/on_gpu.h"

namespace lockstep {
namespace {

// |log-probability - float32's| on these models, whose random weights spread logits
// over tens. Rounding keys and values alone, everything else in float32, makes 2.02 at
// most and 0.39 on a model's average; noise of 16 bits that crosses a rounding of
// theirs, 1.0 and 0.11.
constexpr double kWorst = 3.0, kMean = 0.6, kMeanOfCuts = 0.3;

GroupOptions WithFp8Kv(DType dtype, bool graphs, const std::string& quantization = "") {
  return OnGpu(dtype, graphs, quantization, DType::kFloat8E4M3);
}

// How far apart two runs are in what they say of the same tokens.
class Distance {
 public:
  void Add(const TokenLogprobs& a, const TokenLogprobs& b) {
    for (const auto& [id, logprob] : a.top) {
      for (const auto& [other, value] : b.top) {
        if (id == other) Add(std::abs(double{logprob} - value));
      }
    }
  }
  // Not a number is farther than anything.
  double worst() const { return worst_; }
  double mean() const { return count_ == 0 ? 0.0 : sum_ / count_; }

 private:
  void Add(double apart) {
    if (!(apart <= worst_)) worst_ = apart;
    sum_ += apart;
    ++count_;
  }
  double worst_ = 0.0, sum_ = 0.0;
  int count_ = 0;
};

double GapOfBest(const TokenLogprobs& logprobs) {
  return double{logprobs.top[0].second} - logprobs.top[1].second;
}

class KvCacheGpu : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    std::ifstream file(GoldenDir() + GetParam() + "/golden.json");
    const nlohmann::json golden = nlohmann::json::parse(file);
    for (const auto& c : golden["cases"]) {
      const auto greedy = c["greedy"].get<std::vector<TokenId>>();
      TestRequest request{c["prompt"].get<std::vector<TokenId>>(),
                          static_cast<uint32_t>(greedy.size()), GreedySampling()};
      request.sampling.logprobs = 5;
      requests_.push_back(request);
      // What the reference wrote, one prompt a position.
      for (size_t t = 0; t < greedy.size(); t += 4) {
        prefixes_.push_back(request);
        prefixes_.back().prompt.insert(prefixes_.back().prompt.end(), greedy.begin(),
                                       greedy.begin() + static_cast<std::ptrdiff_t>(t));
        prefixes_.back().max_tokens = 1;
      }
    }
  }
  std::vector<TestOutput> Run(const GroupOptions& options, const std::vector<TestRequest>& requests,
                              const TestSchedule& schedule) {
    auto group = GroupRunner::Load(GoldenDir() + GetParam(), options);
    EXPECT_TRUE(group.ok()) << group.status();
    if (!group.ok()) return {};
    auto outputs = (*group)->Run(requests, schedule);
    EXPECT_TRUE(outputs.ok()) << outputs.status();
    return outputs.ok() ? *outputs : std::vector<TestOutput>();
  }

  std::vector<TestRequest> requests_, prefixes_;
};

TEST_P(KvCacheGpu, OneByteStaysWithinTheBoundOfFloat32) {
  const std::vector<TestOutput> want = Run({}, prefixes_, {});
  ASSERT_EQ(want.size(), prefixes_.size());
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const std::vector<TestOutput> got = Run(WithFp8Kv(dtype, true), prefixes_, {});
    ASSERT_EQ(got.size(), want.size());
    Distance distance;
    size_t equal = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      distance.Add(want[i].logprobs[0], got[i].logprobs[0]);
      equal += got[i].tokens == want[i].tokens;
      if (got[i].tokens != want[i].tokens) {
        EXPECT_LT(GapOfBest(want[i].logprobs[0]), kWorst) << "prefix " << i;
      }
    }
    EXPECT_LT(distance.worst(), kWorst);
    EXPECT_LT(distance.mean(), kMean);
    EXPECT_GT(distance.mean(), 0.0);
    std::printf(
        "%s %s, KV of e4m3: %zu of %zu tokens equal, log-probabilities off by %.4f at most, %.4f "
        "on average\n",
        GetParam().c_str(), std::string(DTypeName(dtype)).c_str(), equal, want.size(),
        distance.worst(), distance.mean());
  }
}

// A row reads its own key and value, and those of the rows before it, as they are
// stored: alone or among others, whole or in chunks, recomputed after a preemption.
// Only the noise of 16 bits is left.
TEST_P(KvCacheGpu, OneByteIsTheSameHoweverTheWorkIsCut) {
  for (const bool graphs : {false, true}) {
    const std::vector<TestOutput> alone =
        Run(WithFp8Kv(DType::kFloat16, graphs), requests_, {.one_by_one = true});
    ASSERT_EQ(alone.size(), requests_.size());
    for (const TestSchedule& schedule :
         {TestSchedule{.chunk = 1000}, {.chunk = 3}, {.shuffle = 1}}) {
      const std::vector<TestOutput> cut =
          Run(WithFp8Kv(DType::kFloat16, graphs), requests_, schedule);
      ASSERT_EQ(cut.size(), alone.size());
      Distance distance;
      for (size_t i = 0; i < alone.size(); ++i) {
        for (size_t t = 0; t < alone[i].tokens.size(); ++t) {
          distance.Add(alone[i].logprobs[t], cut[i].logprobs[t]);
          if (alone[i].tokens[t] == cut[i].tokens[t]) continue;
          EXPECT_LT(GapOfBest(alone[i].logprobs[t]), kWorst) << "request " << i << ", token " << t;
          break;  // from here on the texts differ
        }
      }
      EXPECT_LT(distance.worst(), kWorst) << "chunk " << schedule.chunk;
      EXPECT_LT(distance.mean(), kMeanOfCuts) << "chunk " << schedule.chunk;
    }
  }
}

TEST(KvCacheGpuBytes, OneByteTakesHalfTheMemory) {
  const std::string model = GoldenDir() + "llama_mqa_bf16";
  auto one = GroupRunner::Load(model, WithFp8Kv(DType::kBFloat16, true));
  auto two = GroupRunner::Load(model, OnGpu(DType::kBFloat16, true));
  ASSERT_TRUE(one.ok() && two.ok());
  EXPECT_EQ(2 * (*one)->decoder(0).backend().kv_bytes(), (*two)->decoder(0).backend().kv_bytes());
}

// Nothing may depend on what memory held before.
TEST(KvCacheGpuRepeats, TheSameBatchGivesTheSameBits) {
  std::vector<TestRequest> requests;
  for (TokenId t = 5; t < 14; ++t) {
    std::vector<TokenId> prompt = {t, 3, t, 9, 11};
    for (TokenId i = 0; i < 3 * (t - 5); ++i) prompt.push_back(4 + (t + i) % 9);
    requests.push_back({prompt, 12, GreedySampling()});
    requests.back().sampling.logprobs = 3;
  }
  for (const char* quantization : {"", "fp8"}) {
    for (const uint32_t chunk : {1000u, 7u}) {
      std::vector<TestOutput> first;
      for (int loaded = 0; loaded < 2; ++loaded) {
        auto group = GroupRunner::Load(GoldenDir() + "llama_mqa_bf16",
                                       WithFp8Kv(DType::kBFloat16, true, quantization));
        ASSERT_TRUE(group.ok()) << group.status();
        for (int again = 0; again < 3; ++again) {
          auto outputs = (*group)->Run(requests, {.chunk = chunk});
          ASSERT_TRUE(outputs.ok()) << outputs.status();
          if (first.empty()) first = *outputs;
          EXPECT_EQ(FirstDifference(first, *outputs), "")
              << "quantization \"" << quantization << "\" chunk " << chunk << " load " << loaded
              << " run " << again;
        }
      }
    }
  }
}

// Heads that the kernel for long prompts takes, which reads a copy in 16 bits: prompts
// whole and in chunks, more of them than the copy has room for at once.
TEST(KvCacheGpuPrompts, OneByteIsWidenedForThem) {
  constexpr char kConfig[] = R"({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false})";
  const absl::StatusOr<ModelConfig> config = ParseModelConfig(kConfig, "test");
  ASSERT_TRUE(config.ok()) << config.status();
  std::vector<TestRequest> requests;
  for (uint32_t i = 0; i < 12; ++i) {
    std::vector<TokenId> prompt;
    for (uint32_t t = 0; t < 20 + 11 * i; ++t) prompt.push_back(4 + (t * (i + 3) + i * i) % 500);
    requests.push_back({prompt, 4, GreedySampling()});
    requests.back().sampling.logprobs = 5;
    requests.back().sampling.prompt_logprobs = 5;
  }
  const auto run = [&](const GroupOptions& options, uint32_t chunk) {
    auto group = GroupRunner::Dummy(*config, options);
    EXPECT_TRUE(group.ok()) << group.status();
    if (!group.ok()) return std::vector<TestOutput>();
    auto outputs = (*group)->Run(requests, {.chunk = chunk});
    EXPECT_TRUE(outputs.ok()) << outputs.status();
    return outputs.ok() ? *outputs : std::vector<TestOutput>();
  };
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const std::vector<TestOutput> want = run(OnGpu(dtype, true), 1'000);
    ASSERT_EQ(want.size(), requests.size());
    for (const uint32_t chunk : {1'000u, 7u, 50u}) {
      const std::vector<TestOutput> got = run(WithFp8Kv(dtype, true), chunk);
      ASSERT_EQ(got.size(), want.size());
      Distance distance;
      for (size_t i = 0; i < want.size(); ++i) {
        distance.Add(want[i].logprobs[0], got[i].logprobs[0]);
        ASSERT_EQ(got[i].prompt_logprobs.size(), want[i].prompt_logprobs.size());
        for (size_t t = 0; t < want[i].prompt_logprobs.size(); ++t) {
          distance.Add(want[i].prompt_logprobs[t], got[i].prompt_logprobs[t]);
        }
      }
      // The rounding of keys and values alone makes 0.24 at most and 0.05 on average.
      EXPECT_LT(distance.worst(), 0.8) << "chunk " << chunk;
      EXPECT_LT(distance.mean(), 0.15) << "chunk " << chunk;
      EXPECT_GT(distance.mean(), 0.0) << "chunk " << chunk;
    }
  }
}

// The checkpoint again, with a scale for the keys and one for the values of each layer.
void WriteWithScales(const std::string& from, const std::string& to, int64_t num_layers, float k,
                     float v) {
  std::filesystem::copy_file(from + "/config.json", to + "/config.json",
                             std::filesystem::copy_options::overwrite_existing);
  auto checkpoint = Checkpoint::Open(from);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  SafetensorsWriter writer;
  for (const auto& [name, info] : (*checkpoint)->tensors()) {
    const absl::Span<const std::byte> bytes = (*checkpoint)->Bytes(info);
    writer.Add(name, std::string(info.dtype_name), info.shape,
               std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  }
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".self_attn.");
    writer.Add(prefix + "k_scale", "F32", {1}, FloatBytes({k}));
    writer.Add(prefix + "v_scale", "F32", {1}, FloatBytes({v}));
  }
  writer.WriteTo(to + "/model.safetensors");
}

// Powers of two move the stored values within e4m3's range and change next to nothing
// else; a scale that were forgotten on one side would change everything.
TEST(KvCacheGpuScales, ScalesOfTheCheckpointAreAppliedAndUndone) {
  namespace fs = std::filesystem;
  const std::string from = GoldenDir() + "llama_mqa_bf16";
  const std::string to =
      fs::temp_directory_path() / ("lockstep_kv_scales_" + std::to_string(getpid()));
  fs::create_directories(to);
  std::vector<TestRequest> requests;
  for (TokenId t = 5; t < 9; ++t) {
    std::vector<TokenId> prompt = {t, 3, t, 9, 11};
    for (TokenId i = 0; i < 9 * (t - 5); ++i) prompt.push_back(4 + (t + i) % 9);
    requests.push_back({prompt, 6, GreedySampling()});
    requests.back().sampling.logprobs = 5;
  }
  const auto run = [&](const std::string& model, std::vector<TestOutput>* outputs) {
    auto group = GroupRunner::Load(model, WithFp8Kv(DType::kFloat16, true));
    ASSERT_TRUE(group.ok()) << group.status();
    auto ran = (*group)->Run(requests, {});
    ASSERT_TRUE(ran.ok()) << ran.status();
    *outputs = *ran;
  };
  std::vector<TestOutput> plain;
  ASSERT_NO_FATAL_FAILURE(run(from, &plain));
  const absl::StatusOr<ModelConfig> config = LoadModelConfig(from);
  ASSERT_TRUE(config.ok()) << config.status();
  for (const auto& [k, v] : {std::pair(1.0f / 32, 1.0f / 8), std::pair(1.0f / 4, 1.0f / 32)}) {
    ASSERT_NO_FATAL_FAILURE(WriteWithScales(from, to, config->num_layers, k, v));
    std::vector<TestOutput> scaled;
    ASSERT_NO_FATAL_FAILURE(run(to, &scaled));
    Distance distance;
    for (size_t i = 0; i < plain.size(); ++i) {
      distance.Add(plain[i].logprobs[0], scaled[i].logprobs[0]);
    }
    EXPECT_LT(distance.worst(), kWorst) << "scales " << k << ", " << v;
    EXPECT_LT(distance.mean(), kMeanOfCuts) << "scales " << k << ", " << v;
  }
  // Values that no e4m3 holds are saturated: wrong, but numbers.
  ASSERT_NO_FATAL_FAILURE(WriteWithScales(from, to, config->num_layers, 1e-6f, 1e-6f));
  std::vector<TestOutput> saturated;
  ASSERT_NO_FATAL_FAILURE(run(to, &saturated));
  for (const TestOutput& output : saturated) {
    EXPECT_FALSE(output.poisoned);
    for (const TokenLogprobs& logprobs : output.logprobs) {
      EXPECT_TRUE(std::isfinite(logprobs.logprob));
    }
  }
  fs::remove_all(to);
}

INSTANTIATE_TEST_SUITE_P(Golden, KvCacheGpu, testing::ValuesIn(GoldenModels()),
                         [](const auto& name) { return name.param; });

}  // namespace
}  // namespace lockstep
