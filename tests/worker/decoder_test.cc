// The decoder and executor over dummy models: what the recorded parity models do
// not reach (16-bit weights, sampling, odd splits, poison, faults).
#include "worker/decoder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "model/memory_model.h"
#include "model/safetensors.h"
#include "tests/fakes/temp_dir.h"
#include "tests/fakes/thread_communicator.h"
#include "tests/worker/group_runner.h"
#include "wire/plan_digest.h"
#include "worker/backend/backend.h"

namespace lockstep {
namespace {

using testing::HasSubstr;

ModelConfig SmallConfig() {
  ModelConfig c;
  c.architecture = "LlamaForCausalLM";
  c.vocab_size = 203;
  c.hidden_size = c.embedding_dim = 64;
  c.num_layers = 3;
  c.num_heads = 8;
  c.num_kv_heads = 4;
  c.head_dim = 24;
  c.intermediate_size = 112;
  c.max_position_embeddings = 256;
  c.attention_scale = 0.2;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = true;
  c.sliding_window = 9;
  c.sliding_layers = {true, false, true};
  return c;
}

std::vector<TestRequest> SampledRequests(int32_t logprobs) {
  std::vector<TestRequest> requests;
  for (uint32_t i = 0; i < 6; ++i) {
    TestRequest r;
    for (uint32_t t = 0; t < 3 + 9 * i; ++t) r.prompt.push_back((17 * t + 31 * i) % 203);
    r.max_tokens = 12;
    r.sampling.seed = static_cast<int64_t>(i) - 3;
    r.sampling.temperature = 0.7f + 0.2f * static_cast<float>(i);
    r.sampling.logprobs = logprobs;
    if (i % 2 == 1) {
      r.sampling.top_p = 0.9f;
      r.sampling.repetition_penalty = 1.2f;
      r.sampling.frequency_penalty = 0.3f;
      r.sampling.presence_penalty = 0.2f;
    }
    if (i % 3 == 2) {
      r.sampling.top_k = 30;
      r.sampling.min_p = 0.02f;
      r.sampling.min_tokens = 5;
      r.sampling.ending_ids = {1, 2, 3};
      r.sampling.prompt_logprobs = 3;
    }
    requests.push_back(r);
  }
  return requests;
}

TEST(DecoderTest, SampledTokensDependOnSeedAndPositionAlone) {
  const std::vector<TestRequest> requests = SampledRequests(203);
  std::vector<TestOutput> reference;
  for (const int tp_size : {1, 2, 4, 8}) {
    auto group =
        GroupRunner::Dummy(SmallConfig(), {.tp_size = tp_size, .threads = tp_size == 1 ? 3 : 1});
    ASSERT_TRUE(group.ok()) << group.status();
    const TestSchedule schedules[] = {{.one_by_one = true}, {.chunk = 5}, {.shuffle = 7}};
    for (const TestSchedule& schedule : schedules) {
      auto outputs = (*group)->Run(requests, schedule);
      ASSERT_TRUE(outputs.ok()) << outputs.status();
      if (reference.empty()) reference = *outputs;
      EXPECT_EQ(*outputs, reference) << "tp " << tp_size << " shuffle " << schedule.shuffle;
    }
  }
  for (const TestOutput& output : reference) {
    EXPECT_EQ(output.tokens.size(), 12u);
    EXPECT_GT(std::set<TokenId>(output.tokens.begin(), output.tokens.end()).size(), 5u);
  }
  EXPECT_EQ(reference[2].prompt_logprobs.size(), requests[2].prompt.size() - 1);
}

TEST(DecoderTest, ScoresAPromptOfMoreRowsThanTheHeadTakesAtOnce) {
  ModelConfig config = SmallConfig();
  config.max_position_embeddings = 1024;
  auto group = GroupRunner::Dummy(config, {.max_batched_tokens = 600, .max_model_len = 640});
  ASSERT_TRUE(group.ok()) << group.status();
  TestRequest request{.prompt = {}, .max_tokens = 2, .sampling = GreedySampling()};
  for (uint32_t t = 0; t < 600; ++t) request.prompt.push_back(17 * t % 203);
  request.sampling.prompt_logprobs = 0;
  ASSERT_GT(request.prompt.size(), 2 * (*group)->decoder(0).backend().max_logit_rows());
  const auto whole = (*group)->Run({request}, {});
  const auto in_chunks = (*group)->Run({request}, {.chunk = 7});
  ASSERT_TRUE(whole.ok() && in_chunks.ok()) << whole.status() << in_chunks.status();
  EXPECT_EQ((*whole)[0].prompt_logprobs.size(), request.prompt.size() - 1);
  EXPECT_EQ((*whole)[0], (*in_chunks)[0]);
}

TEST(DecoderTest, SixteenBitWeightsAndCacheKeepTheInvariance) {
  const std::vector<TestRequest> requests = SampledRequests(203);
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    std::vector<TestOutput> reference;
    for (const int tp_size : {1, 4}) {
      auto group = GroupRunner::Dummy(SmallConfig(), {.tp_size = tp_size, .dtype = dtype});
      ASSERT_TRUE(group.ok()) << group.status();
      const TestSchedule schedules[] = {{.chunk = 1}, {.shuffle = 3}};
      for (const TestSchedule& schedule : schedules) {
        auto outputs = (*group)->Run(requests, schedule);
        ASSERT_TRUE(outputs.ok()) << outputs.status();
        if (reference.empty()) reference = *outputs;
        EXPECT_EQ(*outputs, reference) << "tp " << tp_size << " shuffle " << schedule.shuffle;
      }
    }
  }
}

TEST(DecoderTest, BlockSizeDoesNotMatter) {
  const std::vector<TestRequest> requests = SampledRequests(203);
  std::vector<TestOutput> reference;
  for (const uint32_t block_size : {1u, 3u, 16u, 64u}) {
    auto group = GroupRunner::Dummy(
        SmallConfig(), {.block_size = block_size, .num_kv_blocks = 900 / block_size + 20});
    ASSERT_TRUE(group.ok()) << group.status();
    auto outputs = (*group)->Run(requests, {.chunk = 7});
    ASSERT_TRUE(outputs.ok()) << outputs.status();
    if (reference.empty()) reference = *outputs;
    EXPECT_EQ(*outputs, reference) << block_size;
  }
}

TEST(DecoderTest, ASplitThatDoesNotDivideTheSlicesIsStillRight) {
  ModelConfig config = SmallConfig();
  config.num_heads = 6;
  config.num_kv_heads = 3;
  config.intermediate_size = 96;
  std::vector<TestRequest> requests = {
      {.prompt = {5, 9, 100, 3, 3, 77}, .max_tokens = 1, .sampling = GreedySampling()}};
  requests[0].sampling.logprobs = 203;
  auto one = GroupRunner::Dummy(config, {.tp_size = 1});
  auto three = GroupRunner::Dummy(config, {.tp_size = 3});
  ASSERT_TRUE(one.ok() && three.ok());
  auto a = (*one)->Run(requests, {}), b = (*three)->Run(requests, {});
  ASSERT_TRUE(a.ok() && b.ok());
  std::map<TokenId, float> expected((*a)[0].logprobs[0].top.begin(), (*a)[0].logprobs[0].top.end());
  for (const auto& [id, logprob] : (*b)[0].logprobs[0].top)
    EXPECT_NEAR(logprob, expected[id], 1e-4);
}

TEST(DecoderTest, CollectivesAreTwoALayerAndAFewAStep) {
  auto group = GroupRunner::Dummy(SmallConfig(), {.tp_size = 2});
  ASSERT_TRUE(group.ok());
  NewSequence s;
  s.tokens = {1, 2, 3, 4};
  s.num_prompt_tokens = 4;
  s.block_ids = {BlockId(0)};
  const auto step = [&](uint64_t number, uint32_t begin, uint32_t count, bool samples) {
    StepPlan plan;
    plan.epoch = (*group)->epoch();
    plan.step = number;
    if (number == 1) plan.new_sequences = {s};
    plan.spans = {{Slot(0), count}};
    PlanDigest digest(plan.epoch, plan.step);
    digest.Add(Slot(0), begin, count, 1, samples);
    plan.digest = digest.value();
    return (*group)->Step(plan);
  };
  auto prefill = step(1, 0, 2, false);
  ASSERT_TRUE(prefill.ok()) << prefill.status();
  EXPECT_EQ((*prefill)[0].num_collectives, 1u + 2 * 3);  // embedding, layers
  EXPECT_TRUE((*prefill)[0].sampled.empty());
  auto last = step(2, 2, 2, true);
  ASSERT_TRUE(last.ok()) << last.status();
  EXPECT_EQ((*last)[0].num_collectives, 1u + 2 * 3 + 2);  // and gather, broadcast
  EXPECT_EQ((*last)[0].sampled.size(), 1u);
  EXPECT_TRUE((*last)[1].sampled.empty()) << "tokens are rank 0's to report";
  // Two rows each; the one that is sampled from alone has logits, half of them on rank 1.
  constexpr uint64_t kBroadcast = 12;  // of the token
  EXPECT_EQ((*last)[1].timing.collective_bytes - (*prefill)[1].timing.collective_bytes,
            static_cast<uint64_t>((*group)->config().vocab_size) / 2 * sizeof(float) + kBroadcast);
  const StepTiming& t = (*last)[0].timing;
  EXPECT_EQ(t.plan_received_ns, 7u);
  EXPECT_GT(t.started_ns, 0u);
  EXPECT_GT(t.total_ns, 0u);
  EXPECT_LE(t.compute_ns + t.collective_wait_ns + t.collective_transfer_ns + t.sampling_ns,
            t.total_ns);
  EXPECT_GT(t.collective_bytes, 0u);
}

TEST(DecoderTest, AFailedCollectiveEndsTheEpochAndANewOneWorks) {
  auto group = GroupRunner::Dummy(SmallConfig(), {.tp_size = 2});
  ASSERT_TRUE(group.ok());
  const std::vector<TestRequest> requests = SampledRequests(-1);
  auto before = (*group)->Run(requests, {});
  ASSERT_TRUE(before.ok());
  ASSERT_TRUE((*group)->NewEpoch().ok());
  (*group)->communicator(1).Abort();
  StepPlan plan;
  plan.epoch = (*group)->epoch();
  plan.step = 1;
  NewSequence s;
  s.tokens = {1};
  s.num_prompt_tokens = 1;
  s.block_ids = {BlockId(0)};
  plan.new_sequences = {s};
  plan.spans = {{Slot(0), 1}};
  PlanDigest digest(plan.epoch, 1);
  digest.Add(Slot(0), 0, 1, 1, true);
  plan.digest = digest.value();
  EXPECT_EQ((*group)->Step(plan).status().code(), absl::StatusCode::kAborted);
  plan.step = 2;
  EXPECT_EQ((*group)->Step(plan).status().code(), absl::StatusCode::kAborted)
      << "every later call fails alike";
  auto after = (*group)->Run(requests, {});
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_EQ(*after, *before);
}

TEST(DecoderTest, RefusesACommunicatorOfAnotherGroup) {
  auto group = GroupRunner::Dummy(SmallConfig(), {.tp_size = 1});
  ASSERT_TRUE(group.ok());
  auto comms = MakeThreadCommunicators(2);
  Decoder& decoder = const_cast<Decoder&>((*group)->decoder(0));
  const absl::Status status = decoder.Attach(comms[1].get());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1 of 2"));
}

TEST(DecoderTest, AllocatesWhatTheMemoryModelPredicts) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const int tp_size : {1, 2, 4}) {
      auto group = GroupRunner::Dummy(SmallConfig(), {.tp_size = tp_size, .dtype = dtype});
      ASSERT_TRUE(group.ok());
      for (int rank = 0; rank < tp_size; ++rank) {
        const ShardPlan plan = *MakeShardPlan(SmallConfig(), tp_size, rank);
        const Backend& backend = (*group)->decoder(rank).backend();
        EXPECT_EQ(backend.weight_bytes(), WeightBytes(plan, dtype, ""));
        // K and V, 3 layers, 256 blocks of 4, head_dim 24.
        EXPECT_EQ(backend.kv_bytes(),
                  2 * 3 * 256 * 4 * plan.local_kv_heads * 24 * DTypeBytes(dtype));
      }
    }
  }
}

// A copy of a recorded model, in `to`, with one embedding row made NaN.
void WritePoisonedModel(TokenId token, const std::string& to) {
  const std::string from = std::string(LOCKSTEP_SOURCE_DIR) + "/tests/golden/llama";
  std::filesystem::copy(from, to);
  auto checkpoint = Checkpoint::Open(to);
  const TensorInfo info = *(*checkpoint)->Find("model.embed_tokens.weight");
  std::fstream file((*checkpoint)->files()[info.file],
                    std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(static_cast<std::streamoff>(info.offset + token * info.shape[1] * 4));
  const std::vector<float> row(info.shape[1], std::nanf(""));
  file.write(reinterpret_cast<const char*>(row.data()),
             static_cast<std::streamsize>(row.size() * 4));
}

TEST(DecoderTest, NaNPoisonsItsSequenceAndNoOther) {
  const TempDir model;
  WritePoisonedModel(5, model.path());
  auto group = GroupRunner::Load(model.path(), {.tp_size = 2});
  ASSERT_TRUE(group.ok()) << group.status();
  SlotSampling never5 = GreedySampling();
  never5.logit_bias = {{5, -100.0f}};
  std::vector<TestRequest> requests = {{.prompt = {9, 20, 30}, .max_tokens = 6, .sampling = never5},
                                       {.prompt = {9, 5, 30}, .max_tokens = 6, .sampling = never5},
                                       {.prompt = {40, 41}, .max_tokens = 6, .sampling = never5}};
  requests[1].sampling.prompt_logprobs = 2;
  auto alone = (*group)->Run({requests[0]}, {});
  auto outputs = (*group)->Run(requests, {});
  ASSERT_TRUE(alone.ok() && outputs.ok()) << outputs.status();
  EXPECT_TRUE((*outputs)[1].poisoned);
  EXPECT_FALSE((*outputs)[0].poisoned);
  EXPECT_FALSE((*outputs)[2].poisoned);
  EXPECT_EQ((*outputs)[0], (*alone)[0]);
}

}  // namespace
}  // namespace lockstep
