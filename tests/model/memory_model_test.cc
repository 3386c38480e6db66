#include "model/memory_model.h"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/model/model_testing.h"

namespace lockstep {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

constexpr int64_t kGiB = int64_t{1} << 30;

// As `lockstep plan` asks by default.
ServingShape PlanShape(const ModelConfig& config) {
  ServingShape shape;
  shape.dtype = config.dtype;
  shape.quantization = config.quantization;
  shape.max_batched_tokens = 8192;
  shape.max_model_len = std::min<int64_t>(8192, config.max_position_embeddings);
  return shape;
}

PlanReport Plan(const ModelConfig& config, int64_t memory_bytes = 80 * kGiB) {
  absl::StatusOr<PlanReport> report =
      PlanForMemory(config, PlanShape(config), BackendKind::kCuda, memory_bytes);
  EXPECT_TRUE(report.ok()) << report.status();
  return *std::move(report);
}

struct Sizing {
  const char* model;
  std::optional<int64_t> minimum;
};

// What these models are known to need, on cards of 80 GB however those count.
TEST(PlanForMemoryTest, PublishedModelsNeedWhatTheyAreKnownToNeed) {
  const std::vector<Sizing> sizings = {
      {"llama-2-7b", 1},         {"llama-2-13b", 2},
      {"codellama-34b", 2},      {"yi-34b", 2},
      {"llama-3.1-70b", 4},      {"llama-3.1-405b", std::nullopt},
      {"llama-3.1-405b-fp8", 8}, {"qwen3-8b", 1},
  };
  for (const int64_t memory_bytes : {80 * kGiB, int64_t{80'000'000'000}}) {
    for (const Sizing& sizing : sizings) {
      EXPECT_EQ(Plan(Published(sizing.model), memory_bytes).minimum_tp_size, sizing.minimum)
          << sizing.model << " in " << memory_bytes;
    }
  }
}

TEST(PlanForMemoryTest, QuantizingOnLoadCountsLikeAQuantizedCheckpoint) {
  const ModelConfig config = Published("llama-3.1-405b");
  ServingShape shape = PlanShape(config);
  shape.quantization = "fp8";
  EXPECT_EQ(PlanForMemory(config, shape, BackendKind::kCuda, 80 * kGiB)->minimum_tp_size, 8);
}

TEST(PlanForMemoryTest, RowsAgreeWithTheirOwnArithmetic) {
  for (const char* name : {"llama-2-7b", "llama-3.1-70b", "gemma-3-1b", "opt-350m"}) {
    const ModelConfig config = Published(name);
    const ServingShape shape = PlanShape(config);
    for (const int64_t memory_bytes : {kGiB, 8 * kGiB, 48 * kGiB, 80 * kGiB}) {
      const PlanReport report = Plan(config, memory_bytes);
      ASSERT_EQ(report.rows.size(), 4u);
      std::optional<int64_t> first;
      for (const PlanRow& row : report.rows) {
        if (ValidTpSizes(config, 8).back() < row.tp_size) {  // cannot be split that far
          EXPECT_FALSE(row.fits || row.headroom);
          EXPECT_EQ(row.memory.weight_bytes, 0);
          continue;
        }
        const auto usable = static_cast<int64_t>(0.9 * static_cast<double>(memory_bytes));
        const int64_t per_token = row.memory.kv_bytes_per_token;
        const int64_t peak = row.memory.fixed_bytes() + row.peak_kv_bytes;
        EXPECT_FALSE(row.reason.empty());
        EXPECT_EQ(row.reason.find('\n'), std::string::npos);
        EXPECT_EQ(row.peak_kv_bytes, 24 * shape.max_model_len * per_token);
        EXPECT_EQ(row.kv_tokens % 16, 0);
        if (row.kv_tokens > 0) {
          EXPECT_LE(row.memory.fixed_bytes() + row.kv_tokens * per_token, usable);
        }
        EXPECT_GT(row.memory.fixed_bytes() + (row.kv_tokens + 16) * per_token, usable);
        EXPECT_EQ(row.max_model_len, std::min(row.kv_tokens, config.max_position_embeddings));
        EXPECT_EQ(row.fits, row.kv_tokens >= shape.max_model_len);
        EXPECT_EQ(row.headroom,
                  static_cast<double>(peak) <= 0.85 * static_cast<double>(memory_bytes));
        if (row.headroom && !first.has_value()) first = row.tp_size;
      }
      EXPECT_EQ(report.minimum_tp_size, first);
    }
  }
}

TEST(PlanForMemoryTest, SaysWhyARowDoesNotFit) {
  EXPECT_THAT(Plan(Published("llama-3.1-70b")).rows[0].reason, HasSubstr("weights alone"));
  EXPECT_THAT(Plan(Published("llama-3.1-70b")).rows[1].reason, HasSubstr("24 x 8192 tokens"));
  EXPECT_TRUE(Plan(Published("llama-3.1-70b")).rows[1].fits);
  EXPECT_THAT(Plan(Published("llama-2-7b"), 16 * kGiB).rows[0].reason, HasSubstr("no KV cache"));
  EXPECT_THAT(Plan(Published("llama-2-7b"), 18 * kGiB).rows[0].reason,
              HasSubstr("less than one sequence of 4096"));
  const PlanReport smollm = Plan(Published("smollm2-135m"));
  EXPECT_TRUE(smollm.rows[0].fits);
  EXPECT_FALSE(smollm.rows[1].fits);
  EXPECT_THAT(smollm.rows[1].reason, AllOf(HasSubstr("9 attention heads"), HasSubstr("1, 3")));
}

TEST(PlanForMemoryTest, KvHeadsThatAreReplicatedCountOnEachRank) {
  const PlanReport report = Plan(Published("gemma-3-1b"));  // one KV head
  for (const PlanRow& row : report.rows) {
    if (row.tp_size <= 4) {
      EXPECT_EQ(row.memory.kv_bytes_per_token, 2 * 26 * 256 * 2) << row.tp_size;
    }
  }
}

TEST(PlanForMemoryTest, KeysAndValuesOfOneByteLeaveRoomForTwiceTheTokens) {
  const ModelConfig config = Published("llama-2-7b");
  ServingShape shape = PlanShape(config);
  const PlanReport sixteen = *PlanForMemory(config, shape, BackendKind::kCuda, 80 * kGiB);
  shape.kv_dtype = DType::kFloat8E4M3;
  const PlanReport eight = *PlanForMemory(config, shape, BackendKind::kCuda, 80 * kGiB);
  for (size_t i = 0; i < eight.rows.size(); ++i) {
    const PlanRow &of8 = eight.rows[i], &of16 = sixteen.rows[i];
    EXPECT_EQ(2 * of8.memory.kv_bytes_per_token, of16.memory.kv_bytes_per_token);
    EXPECT_EQ(2 * of8.peak_kv_bytes, of16.peak_kv_bytes);
    // One layer's of the longest step or sequence are kept in 16 bits for a while.
    const int64_t room = of8.memory.fixed_bytes() - of16.memory.fixed_bytes();
    EXPECT_EQ(room, WidenedKvTokens(shape.max_model_len, shape.max_batched_tokens) *
                        of16.memory.kv_bytes_per_token / config.num_layers);
    const int64_t lost = room / of8.memory.kv_bytes_per_token;
    EXPECT_NEAR(static_cast<double>(of8.kv_tokens), static_cast<double>(2 * of16.kv_tokens - lost),
                32);
  }
}

TEST(PlanForMemoryTest, RoomForWidenedKeysAndValuesIsBounded) {
  EXPECT_EQ(WidenedKvTokens(4'096, 2'048), 4'096);
  EXPECT_EQ(WidenedKvTokens(1'024, 8'192), 8'192);
  EXPECT_EQ(WidenedKvTokens(1 << 20, 8'192), 65'536);
}

TEST(PlanForMemoryTest, KeysAndValuesOfOneByteNeedTheCudaBackendAndSixteenBits) {
  const ModelConfig config = Published("llama-2-7b");
  const auto refusal = [&](DType dtype, DType kv_dtype, BackendKind backend) {
    ServingShape shape = PlanShape(config);
    shape.dtype = dtype;
    shape.kv_dtype = kv_dtype;
    return Message(PredictRankMemory(config, shape, 1, 0, backend).status());
  };
  const DType e4m3 = DType::kFloat8E4M3, f16 = DType::kFloat16, f32 = DType::kFloat32;
  EXPECT_THAT(refusal(f16, e4m3, BackendKind::kCpu), HasSubstr("--backend cuda"));
  EXPECT_THAT(refusal(f32, e4m3, BackendKind::kCuda), HasSubstr("bfloat16"));
  EXPECT_THAT(refusal(f32, f16, BackendKind::kCuda), HasSubstr("float8_e4m3fn"));
  EXPECT_EQ(refusal(f16, e4m3, BackendKind::kCuda), "");
  EXPECT_EQ(refusal(f32, f32, BackendKind::kCpu), "");
}

TEST(PlanForMemoryTest, ShapesOutOfBoundsAreRefused) {
  const ModelConfig config = Published("llama-2-7b");
  const auto refusal = [&](auto change) {
    ServingShape shape = PlanShape(config);
    change(shape);
    return Message(PlanForMemory(config, shape, BackendKind::kCuda, 80 * kGiB).status());
  };
  EXPECT_THAT(refusal([](ServingShape& s) { s.max_model_len = 4097; }),
              AllOf(HasSubstr("max-model-len"), HasSubstr("4096")));
  EXPECT_THAT(refusal([](ServingShape& s) { s.max_model_len = 0; }), HasSubstr("max-model-len"));
  EXPECT_THAT(refusal([](ServingShape& s) { s.max_num_seqs = -1; }), HasSubstr("max-num-seqs"));
  EXPECT_THAT(refusal([](ServingShape& s) { s.block_size = 0; }), HasSubstr("block size"));
  EXPECT_THAT(refusal([](ServingShape& s) { s.max_batched_tokens = 0; }), HasSubstr("batched"));
  EXPECT_THAT(refusal([](ServingShape& s) { s.quantization = "int4"; }), HasSubstr("int4"));
  EXPECT_THAT(refusal([](ServingShape& s) { s.dtype = DType::kFloat8E4M3; }), HasSubstr("dtype"));
  EXPECT_THAT(refusal([](ServingShape& s) {
                s.dtype = DType::kFloat32;
                s.quantization = "fp8";
              }),
              HasSubstr("use dtype bfloat16"));
  EXPECT_THAT(refusal([](ServingShape& s) { s.memory_utilization = 1.5; }),
              HasSubstr("utilization"));
  EXPECT_FALSE(PlanForMemory(config, PlanShape(config), BackendKind::kCuda, 0).ok());
}

// The largest sizes that a config may have, all at once.
TEST(PlanForMemoryTest, TheLargestConfigDoesNotOverflow) {
  json config = TinyLlamaJson();
  config["vocab_size"] = 1 << 24;
  config["hidden_size"] = 1 << 18;
  config["intermediate_size"] = 1 << 21;
  config["num_hidden_layers"] = 1024;
  config["num_attention_heads"] = config["num_key_value_heads"] = 4096;
  config["head_dim"] = 2048;
  config["max_position_embeddings"] = int64_t{1} << 31;
  const ModelConfig parsed = *Parse(config);
  ServingShape shape = PlanShape(parsed);
  shape.dtype = DType::kFloat32;
  shape.max_num_seqs = 1 << 20;
  shape.max_model_len = int64_t{1} << 31;
  shape.max_batched_tokens = 1 << 24;
  const absl::StatusOr<PlanReport> report =
      PlanForMemory(parsed, shape, BackendKind::kCuda, int64_t{1} << 60);
  ASSERT_TRUE(report.ok()) << report.status();
  for (const PlanRow& row : report->rows) {
    EXPECT_GT(row.memory.weight_bytes, 0);
    EXPECT_GT(row.peak_kv_bytes, int64_t{1} << 60);
    EXPECT_FALSE(row.headroom);
  }
}

TEST(WeightBytesTest, MatricesKeepTheDTypeAndVectorsAreFloat32) {
  const ModelConfig config = *Parse(TinyLlamaJson());
  const ShardPlan plan = *MakeShardPlan(config, 1, 0);
  const int64_t matrices = 2 * 50 * 32 + 2 * ((32 + 16 + 16) * 32 + 32 * 32 + 3 * 48 * 32);
  const int64_t vectors = (2 * 2 + 1) * 32;
  EXPECT_EQ(WeightBytes(plan, DType::kFloat32, ""), 4 * matrices + 4 * vectors);
  EXPECT_EQ(WeightBytes(plan, DType::kBFloat16, ""), 2 * matrices + 4 * vectors);
  // Embedding and head stay; the layers' matrices get a scale a row.
  const int64_t rows = 2 * (64 + 32 + 96 + 32);
  EXPECT_EQ(WeightBytes(plan, DType::kBFloat16, "fp8"),
            2 * 2 * 50 * 32 + (matrices - 2 * 50 * 32) + 4 * rows + 4 * vectors);
}

TEST(WeightBytesTest, PaddingOfTheVocabularyCounts) {
  json config = TinyLlamaJson();
  config["vocab_size"] = 5;
  int64_t all_ranks = 0;
  for (int64_t rank = 0; rank < 4; ++rank) {
    const ShardPlan plan = *MakeShardPlan(*Parse(config), 4, rank);
    for (const LocalTensor& tensor : plan.tensors) {
      if (tensor.name == "embedding.weight") all_ranks += tensor.rows;
    }
    EXPECT_EQ(WeightBytes(plan, DType::kFloat32, ""),
              WeightBytes(*MakeShardPlan(*Parse(config), 4, 0), DType::kFloat32, ""));
  }
  EXPECT_EQ(all_ranks, 8);
}

TEST(PredictRankMemoryTest, RankZeroNeedsMost) {
  for (const BackendKind backend : {BackendKind::kCpu, BackendKind::kCuda}) {
    for (const char* name : {"llama-3.2-1b", "qwen2.5-7b", "gemma-3-1b", "opt-350m"}) {
      const ModelConfig config = Published(name);
      const ServingShape shape = PlanShape(config);
      const int64_t first = PredictRankMemory(config, shape, 4, 0, backend)->fixed_bytes();
      for (int64_t rank = 1; rank < 4; ++rank) {
        EXPECT_LE(PredictRankMemory(config, shape, 4, rank, backend)->fixed_bytes(), first);
      }
    }
  }
}

TEST(PredictRankMemoryTest, RowsOfOneByteAreMultiplesOfSixteenOnEveryRank) {
  ModelConfig config = Published("llama-3.2-1b");
  ServingShape shape = PlanShape(config);
  config.intermediate_size = 4 * 24;  // 96, 48 and 24 on a rank of 1, 2 and 4
  const auto predict = [&](int64_t tp_size) {
    return PredictRankMemory(config, shape, tp_size, 0, BackendKind::kCuda).status();
  };
  EXPECT_TRUE(predict(4).ok()) << "not quantized";
  shape.quantization = "fp8";
  EXPECT_TRUE(predict(2).ok()) << predict(2);
  EXPECT_EQ(predict(4).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(predict(4).message()),
              AllOf(HasSubstr("layers.0.down.weight would have 24 columns"),
                    HasSubstr("sizes that work: 1, 2")));
  config.intermediate_size = 24;
  EXPECT_THAT(std::string(predict(1).message()), HasSubstr("serve without quantization"));
}

TEST(PredictRankMemoryTest, OneRankCommunicatesWithNobody) {
  const ModelConfig config = Published("llama-3.2-1b");
  const ServingShape shape = PlanShape(config);
  EXPECT_EQ(PredictRankMemory(config, shape, 1, 0, BackendKind::kCpu)->communication_bytes, 0);
  EXPECT_GT(PredictRankMemory(config, shape, 2, 0, BackendKind::kCpu)->communication_bytes, 0);
  EXPECT_EQ(PredictRankMemory(config, shape, 2, 0, BackendKind::kCpu)->runtime_bytes, 0);
  EXPECT_GT(PredictRankMemory(config, shape, 2, 0, BackendKind::kCuda)->runtime_bytes, 0);
}

TEST(KvBlocksThatFitTest, FillsTheMemoryAndNotMore) {
  const ModelConfig config = Published("llama-3.2-1b");
  ServingShape shape = PlanShape(config);
  for (const int64_t block_size : {1, 16, 48}) {
    shape.block_size = block_size;
    for (const int64_t tp_size : {1, 2, 8}) {
      const RankMemory memory = *PredictRankMemory(config, shape, tp_size, 0, BackendKind::kCpu);
      const int64_t block_bytes = memory.kv_bytes_per_token * block_size;
      const absl::StatusOr<int64_t> blocks =
          KvBlocksThatFit(config, shape, tp_size, BackendKind::kCpu, 16 * kGiB);
      ASSERT_TRUE(blocks.ok()) << blocks.status();
      EXPECT_LE(memory.fixed_bytes() + *blocks * block_bytes, 16 * kGiB);
      EXPECT_GT(memory.fixed_bytes() + (*blocks + 1) * block_bytes, 16 * kGiB);
    }
  }
}

TEST(KvBlocksThatFitTest, NamesNoSizeThatTheQuantizationRefuses) {
  ModelConfig config = Published("llama-3.2-1b");
  config.intermediate_size = 4 * 24;  // 24 columns on a rank of 4
  ServingShape shape = PlanShape(config);
  const auto help = [&] {
    return Message(KvBlocksThatFit(config, shape, 2, BackendKind::kCuda, kGiB / 64).status());
  };
  EXPECT_THAT(help(), HasSubstr("--tensor-parallel-size 4"));
  shape.quantization = "fp8";
  EXPECT_THAT(help(), AllOf(HasSubstr("a rank needs"), Not(HasSubstr("tensor-parallel-size"))));
}

TEST(KvBlocksThatFitTest, SaysWhatIsNeededAndWhatWouldHelp) {
  const ModelConfig config = Published("llama-3.1-70b");
  const ServingShape shape = PlanShape(config);
  const absl::Status no_room =
      KvBlocksThatFit(config, shape, 1, BackendKind::kCuda, 72 * kGiB).status();
  EXPECT_EQ(no_room.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Message(no_room), AllOf(HasSubstr("weights 131.4"), HasSubstr("72.00 GiB"),
                                      HasSubstr("--tensor-parallel-size 2")));

  // One sequence of 8192 does not fit, a shorter one does.
  const RankMemory memory = *PredictRankMemory(config, shape, 4, 0, BackendKind::kCuda);
  const int64_t available = memory.fixed_bytes() + 1000 * memory.kv_bytes_per_token;
  const absl::Status short_of =
      KvBlocksThatFit(config, shape, 4, BackendKind::kCuda, available).status();
  EXPECT_THAT(Message(short_of), HasSubstr("--max-model-len 992"));
  ServingShape shorter = shape;
  shorter.max_model_len = 992;
  const absl::StatusOr<int64_t> blocks =
      KvBlocksThatFit(config, shorter, 4, BackendKind::kCuda, available);
  ASSERT_TRUE(blocks.ok()) << blocks.status();
  EXPECT_GE(*blocks, 62);  // shorter tables also need less beside the KV

  EXPECT_FALSE(KvBlocksThatFit(config, shape, 4, BackendKind::kCuda, -5).ok());
  EXPECT_FALSE(KvBlocksThatFit(config, shape, 3, BackendKind::kCuda, 80 * kGiB).ok());
}

}  // namespace
}  // namespace lockstep
