#include "model/memory_shortage.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/numbers.h"
#include "tests/model/model_testing.h"

namespace lockstep {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr int64_t kGiB = int64_t{1} << 30;
const absl::Status kFailure = absl::ResourceExhaustedError("no GPU memory for the KV cache");

ServingShape Shape(const ModelConfig& config) {
  ServingShape shape;
  shape.dtype = config.dtype;
  shape.max_model_len = 8192;
  return shape;
}

std::string Explained(const ModelConfig& config, int64_t tp_size, int64_t blocks, int64_t free) {
  const absl::Status status = ExplainShortage(config, Shape(config), tp_size, tp_size - 1,
                                              BackendKind::kCuda, blocks, free, kFailure);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  return std::string(status.message());
}

TEST(ExplainShortageTest, SaysEveryPartWhatWasFreeAndHowManyBlocksFit) {
  const ModelConfig config = Published("llama-3.1-70b");
  const std::string message = Explained(config, 4, 40'000, 75 * kGiB);
  // 80 layers, K and V, 2 local KV heads of 128, bfloat16: 1.25 MiB a block.
  EXPECT_THAT(message, AllOf(HasSubstr("weights 32.8"), HasSubstr("KV of 40000 blocks 48.83 GiB"),
                             HasSubstr("75.00 GiB were free"), HasSubstr("would fit; no GPU")));
  const size_t at = message.find("--num-kv-blocks ");
  ASSERT_NE(at, std::string::npos) << message;
  int64_t blocks = 0;
  ASSERT_TRUE(
      absl::SimpleAtoi(message.substr(at + 16, message.find(' ', at + 16) - at - 16), &blocks))
      << message;
  const RankMemory memory = *PredictRankMemory(config, Shape(config), 4, 3, BackendKind::kCuda);
  const int64_t block_bytes = memory.kv_bytes_per_token * 16;
  EXPECT_LE(memory.fixed_bytes() + blocks * block_bytes, 75 * kGiB);
  EXPECT_GT(blocks * block_bytes, 35 * kGiB) << "no more is given up than needs to be";
}

TEST(ExplainShortageTest, NamesAnotherFlagWhereNotOneSequenceFits) {
  const std::string message = Explained(Published("llama-3.1-70b"), 1, 40'000, 79 * kGiB);
  EXPECT_THAT(message, AllOf(HasSubstr("weights 131.4"), HasSubstr("79.00 GiB are available"),
                             HasSubstr("--tensor-parallel-size 2"), HasSubstr("; no GPU memory"),
                             Not(HasSubstr("--num-kv-blocks"))));
}

// The prediction says that it fits: what is advised is less than was asked for.
TEST(ExplainShortageTest, AdvisesFewerBlocksEvenWhereTheyShouldHaveFitted) {
  EXPECT_THAT(Explained(Published("llama-3.1-70b"), 4, 10'000, 79 * kGiB),
              HasSubstr("--num-kv-blocks 9000 needs less"));
}

}  // namespace
}  // namespace lockstep
