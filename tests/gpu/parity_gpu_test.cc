// The cuda backend on one GPU against the recorded outputs of transformers
// (tests/golden) and against the cpu backend: float32 gives the same tokens,
// 16-bit types stay within a bound of the float32 log-probabilities.
#include <cuda_fp8.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/model_config.h"
#include "tests/gpu/on_gpu.h"

namespace lockstep {
namespace {

// |log-probability - float32's| of a 16-bit run on these models, whose random
// weights spread logits over tens: the widest seen are 1.00 (bfloat16) and 0.16
// (float16, three bits more).
constexpr double kBFloat16Bound = 1.25, kFloat16Bound = 0.2;

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

// Writes `from` again with its layers' matrices as float8, the way quantisation at
// load makes them: one scale a row as "fp8" checkpoints have it, or one for the tensor
// as compressed-tensors does.
void WriteFp8Checkpoint(const std::string& from, const std::string& to, bool a_row) {
  std::ifstream config_file(from + "/config.json");
  nlohmann::json config = nlohmann::json::parse(config_file), header;
  if (a_row) {
    config["quantization_config"] = {{"quant_method", "fp8"}, {"activation_scheme", "dynamic"}};
  } else {
    const nlohmann::json weights = {{"num_bits", 8}, {"type", "float"}, {"strategy", "tensor"}};
    config["quantization_config"] = {
        {"quant_method", "compressed-tensors"},
        {"format", "float-quantized"},
        {"ignore", {"lm_head"}},
        {"config_groups", {{"group_0", {{"targets", {"Linear"}}, {"weights", weights}}}}}};
  }
  std::ofstream(to + "/config.json") << config;
  auto checkpoint = Checkpoint::Open(from);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  std::string data;
  const auto add = [&](const std::string& name, const char* dtype, std::vector<int64_t> shape,
                       const void* bytes, size_t count) {
    header[name] = {
        {"dtype", dtype}, {"shape", shape}, {"data_offsets", {data.size(), data.size() + count}}};
    data.append(static_cast<const char*>(bytes), count);
  };
  for (const auto& [name, info] : (*checkpoint)->tensors()) {
    const absl::Span<const std::byte> bytes = (*checkpoint)->Bytes(info);
    const bool matrix = info.shape.size() == 2 && name.find(".layers.") != std::string::npos;
    if (!matrix) {
      add(name, std::string(info.dtype_name).c_str(), info.shape, bytes.data(), bytes.size());
      continue;
    }
    ASSERT_EQ(info.dtype, DType::kBFloat16);
    const int64_t rows = info.shape[0], cols = info.shape[1];
    const auto* stored = reinterpret_cast<const uint16_t*>(bytes.data());
    std::vector<float> values(rows * cols), scales(a_row ? rows : 1, 0.0f);
    for (int64_t i = 0; i < rows * cols; ++i) {
      const uint32_t bits = uint32_t{stored[i]} << 16;
      std::memcpy(&values[i], &bits, 4);
      float& scale = scales[a_row ? i / cols : 0];
      scale = std::max(scale, std::fabs(values[i]) / 448.0f);
    }
    std::vector<uint8_t> quantized(rows * cols);
    for (int64_t i = 0; i < rows * cols; ++i) {
      const float inverse = 1.0f / scales[a_row ? i / cols : 0];
      quantized[i] = __nv_cvt_float_to_fp8(values[i] * inverse, __NV_SATFINITE, __NV_E4M3);
    }
    add(name, "F8_E4M3", info.shape, quantized.data(), quantized.size());
    add(name + "_scale", "F32", a_row ? std::vector<int64_t>{rows, 1} : std::vector<int64_t>{1},
        scales.data(), scales.size() * 4);
  }
  const std::string text = header.dump();
  const uint64_t length = text.size();
  std::ofstream out(to + "/model.safetensors", std::ios::binary);
  out.write(reinterpret_cast<const char*>(&length), 8);
  out << text << data;
}

TEST(GpuFp8, AnFp8CheckpointIsServedAsItIs) {
  namespace fs = std::filesystem;
  const std::string from = GoldenDir() + "llama_mqa_bf16";
  const std::string to = fs::temp_directory_path() / ("lockstep_fp8_" + std::to_string(getpid()));
  GroupOptions fp8 = OnGpu(DType::kBFloat16, true, "fp8");
  std::vector<TestRequest> requests;
  for (TokenId t = 5; t < 9; ++t) {
    requests.push_back({{t, 3, t, 9, 11}, 12, GreedySampling()});
    requests.back().sampling.logprobs = 3;
  }
  auto made = GroupRunner::Load(from, fp8);
  ASSERT_TRUE(made.ok()) << made.status();
  auto want = (*made)->Run(requests, {});
  ASSERT_TRUE(want.ok()) << want.status();
  for (const bool a_row : {true, false}) {
    fs::create_directories(to);
    WriteFp8Checkpoint(from, to, a_row);
    auto stored = GroupRunner::Load(to, fp8);
    ASSERT_TRUE(stored.ok()) << stored.status();
    auto got = (*stored)->Run(requests, {});
    ASSERT_TRUE(got.ok()) << got.status();
    // The same scales are the same model; coarser ones are near it.
    if (a_row) EXPECT_EQ(FirstDifference(*want, *got), "");
    for (size_t i = 0; i < requests.size(); ++i) {
      EXPECT_NEAR((*got)[i].logprobs[0].logprob, (*want)[i].logprobs[0].logprob,
                  2 * kBFloat16Bound);
    }
    fs::remove_all(to);
  }
}

// Up to where a request's tokens first part from the reference's, which may be only where that
// one's two best are within the bound.
void ExpectNear(const std::vector<TestOutput>& outputs, const std::vector<TestOutput>& reference,
                double bound) {
  size_t compared = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const TestOutput &got = outputs[i], &want = reference[i];
    ASSERT_FALSE(want.logprobs.empty());
    for (size_t t = 0; t < std::min(got.logprobs.size(), want.logprobs.size()); ++t) {
      const TokenLogprobs& expected = want.logprobs[t];
      if (got.tokens[t] != want.tokens[t]) {
        EXPECT_LT(expected.top[0].second - expected.top[1].second, bound)
            << "request " << i << " token " << t;
        break;
      }
      EXPECT_NEAR(got.logprobs[t].logprob, expected.logprob, bound)
          << "request " << i << " token " << t;
      ++compared;
    }
  }
  EXPECT_GT(compared, reference.size());
}

// So many answers decoded one by one and all together.
void ExpectManyGiveWhatFewGive(const absl::StatusOr<std::unique_ptr<GroupRunner>>& group,
                               std::initializer_list<uint32_t> counts) {
  ASSERT_TRUE(group.ok()) << group.status();
  for (const uint32_t count : counts) {
    std::vector<TestRequest> requests;
    for (TokenId i = 0; i < count; ++i) {
      requests.push_back({{4 + i % 20, 3, 4 + i / 20, 9, 11}, 4, GreedySampling()});
      requests.back().sampling.logprobs = 5;
    }
    auto few = (*group)->Run(requests, {.one_by_one = true});
    auto many = (*group)->Run(requests, {.chunk = 1000});
    ASSERT_TRUE(few.ok()) << few.status();
    ASSERT_TRUE(many.ok()) << many.status();
    SCOPED_TRACE(testing::Message() << count << " rows");
    ExpectNear(*many, *few, 2 * kBFloat16Bound);
    EXPECT_NE(FirstDifference(*few, *many), "");  // else one way ran twice
  }
}
GroupOptions ManyAtOnce(const char* quantization) {
  GroupOptions options = OnGpu(DType::kBFloat16, true, quantization);
  options.max_num_seqs = 224;
  options.max_batched_tokens = 1'200;
  return options;
}

// Products of few rows by kernels that scale what they make, of more by those that leave that to
// whoever reads it: the same numbers, but for 16 bits' noise.
TEST(GpuFp8, ManyRowsGiveWhatFewGive) {
  ExpectManyGiveWhatFewGive(GroupRunner::Load(GoldenDir() + "llama_mqa_bf16", ManyAtOnce("fp8")),
                            {40, 100, 150, 220});
}

// Wide enough for sums that a product leaves in parts (LtMatmul), and for their reader.
TEST(GpuWide, ManyRowsGiveWhatFewGive) {
  constexpr char kConfig[] = R"({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "vocab_size": 2000, "hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false})";
  const absl::StatusOr<ModelConfig> config = ParseModelConfig(kConfig, "test");
  ASSERT_TRUE(config.ok()) << config.status();
  for (const char* quantization : {"", "fp8"}) {
    SCOPED_TRACE(testing::Message() << "quantization \"" << quantization << '"');
    ExpectManyGiveWhatFewGive(GroupRunner::Dummy(*config, ManyAtOnce(quantization)),
                              {40, 150, 220});
  }
}

// A sequence alone decodes by kernels of its own.
TEST_P(GpuParity, OneRowDecodesWithinTheBound) {
  std::unique_ptr<GroupRunner> cpu = Load({});
  ASSERT_NE(cpu, nullptr);
  auto reference = cpu->Run(requests_, {.one_by_one = true});
  ASSERT_TRUE(reference.ok()) << reference.status();
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    SCOPED_TRACE(testing::Message() << DTypeName(dtype));
    std::unique_ptr<GroupRunner> group = Load(OnGpu(dtype, true));
    ASSERT_NE(group, nullptr);
    auto outputs = group->Run(requests_, {.one_by_one = true});
    ASSERT_TRUE(outputs.ok()) << outputs.status();
    ExpectNear(*outputs, *reference, dtype == DType::kBFloat16 ? kBFloat16Bound : kFloat16Bound);
  }
}

// The golden models' heads are too narrow for the kernel of a whole row
// (kernels/row_stack.h), so one with heads of 64: by that kernel and by the chain of others.
TEST(GpuRowStack, DecodesWithinTheBoundLikeTheChainOfKernels) {
  auto config = LoadModelConfig(GoldenDir() + "llama");
  ASSERT_TRUE(config.ok()) << config.status();
  config->head_dim = 64;
  config->attention_scale = 0.125;
  std::vector<TestRequest> requests;
  for (TokenId t = 5; t < 9; ++t) {
    requests.push_back({{t, 3, t, 9, 11}, 40, GreedySampling()});
    requests.back().sampling.logprobs = 5;
  }
  auto cpu = GroupRunner::Dummy(*config, {});
  ASSERT_TRUE(cpu.ok()) << cpu.status();
  auto reference = (*cpu)->Run(requests, {.one_by_one = true});
  ASSERT_TRUE(reference.ok()) << reference.status();
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    SCOPED_TRACE(testing::Message() << DTypeName(dtype));
    std::vector<TestOutput> by[2];
    for (const bool row_stack : {false, true}) {
      auto group = GroupRunner::Dummy(*config, OnGpu(dtype, true, "", std::nullopt, row_stack));
      ASSERT_TRUE(group.ok()) << group.status();
      auto outputs = (*group)->Run(requests, {.one_by_one = true});
      ASSERT_TRUE(outputs.ok()) << outputs.status();
      // The cpu backend's own rounding makes 0.018 and 0.003 of these.
      ExpectNear(*outputs, *reference, dtype == DType::kBFloat16 ? 0.1 : 0.02);
      by[row_stack] = *outputs;
    }
    // They sum in other orders: equal bits throughout would mean that one way ran twice.
    EXPECT_NE(FirstDifference(by[0], by[1]), "");
  }
}

// Nothing may depend on what memory held before, or on which thread block came first.
TEST(GpuRepeats, TheSameBatchGivesTheSameBits) {
  std::vector<TestRequest> requests;
  for (TokenId t = 5; t < 14; ++t) {
    std::vector<TokenId> prompt = {t, 3, t, 9, 11};
    for (TokenId i = 0; i < 3 * (t - 5); ++i) prompt.push_back(4 + (t + i) % 9);
    requests.push_back({prompt, 12, GreedySampling()});
    requests.back().sampling.logprobs = 3;
  }
  for (const char* quantization : {"", "fp8"}) {
    for (const bool graphs : {false, true}) {
      for (const uint32_t chunk : {1000u, 7u}) {
        std::vector<TestOutput> first;
        for (int loaded = 0; loaded < 2; ++loaded) {
          auto group = GroupRunner::Load(GoldenDir() + "llama_mqa_bf16",
                                         OnGpu(DType::kBFloat16, graphs, quantization));
          ASSERT_TRUE(group.ok()) << group.status();
          for (int again = 0; again < 4; ++again) {
            auto outputs = (*group)->Run(requests, {.chunk = chunk});
            ASSERT_TRUE(outputs.ok()) << outputs.status();
            if (first.empty()) first = *outputs;
            EXPECT_EQ(FirstDifference(first, *outputs), "")
                << "quantization \"" << quantization << "\" graphs " << graphs << " chunk " << chunk
                << " load " << loaded << " run " << again;
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Golden, GpuParity, testing::ValuesIn(GoldenModels()),
                         [](const auto& name) { return name.param; });

}  // namespace
}  // namespace lockstep
