// All layers of a decoded row in one kernel, against the same arithmetic in double on the
// host, rounded where the kernel rounds. Several ranks run beside each other on one GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "kernels/row_stack.h"
#include "tests/kernels/row_stack_rig.cuh"

namespace lockstep::kernels {
namespace {

using BF16 = __nv_bfloat16;
using F8 = __nv_fp8_e4m3;

// Steps that follow each other, so that slots are used again; the context crosses tiles and
// shares.
template <typename W, typename T, typename KV>
void CheckShape(const Shape& shape, std::vector<int> positions, double bound) {
  SCOPED_TRACE(::testing::Message() << "hidden " << shape.hidden << " heads " << shape.heads << "/"
                                    << shape.kv_heads << " ranks " << shape.ranks);
  Group<W, T, KV> group(shape);
  ASSERT_TRUE(RowStackSupports(group.args_[0]));
  if (SanitizerRun()) positions.resize(1);
  for (const int position : positions) group.Check(position, bound);
}

TEST(RowStackTest, GivesTheLogitsOfALlama) {
  CheckShape<BF16, BF16, BF16>({}, {0, 1, 15, 16, 17, 700}, 0.02);
}

TEST(RowStackTest, ServesOddShapes) {
  for (const Shape& shape : {
           Shape{.hidden = 72, .heads = 3, .kv_heads = 1, .intermediate = 88, .vocab = 33},
           Shape{.hidden = 520, .heads = 8, .kv_heads = 1, .intermediate = 1000, .layers = 4},
           Shape{.hidden = 1032, .heads = 16, .kv_heads = 4, .head_dim = 128, .intermediate = 2056},
           Shape{.hidden = 4096, .heads = 4, .kv_heads = 2, .head_dim = 128, .intermediate = 520},
           Shape{.hidden = 512, .heads = 4, .kv_heads = 4, .intermediate = 6152, .vocab = 3001},
       })
    CheckShape<BF16, BF16, BF16>(shape, {40, 41, 300}, 0.02);
}

TEST(RowStackTest, ServesModelsVariants) {
  CheckShape<BF16, BF16, BF16>({.block_size = 64, .window = 100, .plus_one = true}, {50, 333, 334},
                               0.02);
  CheckShape<BF16, BF16, BF16>({.rotary = false, .gate = GemvEpilogue::kGeluGate}, {50, 51}, 0.02);
  CheckShape<__half, __half, __half>({}, {50, 333}, 0.004);
}

TEST(RowStackTest, StreamsFp8Weights) {
  CheckShape<F8, BF16, BF16>({}, {5, 333, 334}, 0.02);
  CheckShape<F8, BF16, BF16>({.hidden = 1024, .heads = 8, .intermediate = 8208}, {20, 21}, 0.02);
  CheckShape<F8, BF16, BF16>({.hidden = 4096, .heads = 4, .intermediate = 528}, {20, 21}, 0.02);
  CheckShape<F8, __half, __half>({}, {5, 333}, 0.004);
}

// More rows a block than wait for an epilogue together, each with its own scale.
TEST(RowStackTest, StreamsFp8WeightsInChunks) {
  if (SanitizerRun()) GTEST_SKIP() << "too long a reference; no other code than in the tests above";
  CheckShape<F8, BF16, BF16>({.hidden = 4096, .heads = 4, .intermediate = 4640, .ranks = 4},
                             {20, 21}, 0.02);
}

TEST(RowStackTest, ReadsAnFp8Cache) {
  CheckShape<BF16, BF16, F8>({}, {3, 333, 334}, 0.06);
  CheckShape<F8, BF16, F8>({.heads = 8, .kv_heads = 2, .head_dim = 128}, {3, 700}, 0.06);
}

TEST(RowStackTest, SumsOverRanks) {
  for (const int ranks : {2, 4}) {
    CheckShape<BF16, BF16, BF16>({.ranks = ranks}, {3, 333, 334, 335, 336}, 0.02);
    CheckShape<F8, BF16, BF16>({.hidden = 512, .ranks = ranks}, {3, 40}, 0.02);
  }
}

// A 70B's: each thread has the row's vectors in two rounds, and a KV head eight query heads.
TEST(RowStackTest, ServesWideRows) {
  for (const int ranks : {1, 2, 4}) {
    if (SanitizerRun() && ranks != 2) continue;
    const Shape shape = {.hidden = 8192,
                         .heads = 8,
                         .kv_heads = 1,
                         .head_dim = 128,
                         .intermediate = 1040,
                         .vocab = 300,
                         .ranks = ranks};
    CheckShape<BF16, BF16, BF16>(shape, {20, 333}, 0.02);
    CheckShape<F8, BF16, BF16>(shape, {20, 333}, 0.02);
  }
}

TEST(RowStackTest, SpreadsALongContext) {
  CheckShape<BF16, BF16, BF16>({.heads = 4, .kv_heads = 1, .head_dim = 128}, {4000, 4095}, 0.02);
}

TEST(RowStackTest, GivesTheSameBitsTwice) {
  Group<BF16, BF16, BF16> group({.hidden = 512, .heads = 8, .kv_heads = 2, .ranks = 2});
  const std::vector<BF16> row = group.RandomRow();
  group.Launch(kSlot, 900, row);
  const std::vector<float> once[2] = {group.Logits(0), group.Logits(1)};
  for (int i = 0; i < (SanitizerRun() ? 1 : 200); ++i) {
    group.Launch(kSlot, 900, row);
    for (int r = 0; r < 2; ++r) ASSERT_EQ(group.Logits(r), once[r]) << "run " << i;
  }
}

// What a launch leaves is what the next one begins with; of an odd number of heads and shares, too.
TEST(RowStackTest, LeavesNoWordBehind) {
  Group<BF16, BF16, BF16> group(
      {.hidden = 72, .heads = 3, .kv_heads = 1, .intermediate = 88, .vocab = 33});
  for (const int position : {1030, 5}) {
    group.Launch(kSlot, position, group.RandomRow());
    const std::vector<uint8_t> left = group.Workspace(0);
    EXPECT_EQ(left, std::vector<uint8_t>(left.size(), 0xff)) << "position " << position;
  }
}

TEST(RowStackTest, APaddingRowChangesNothing) {
  Group<BF16, BF16, BF16> group({});
  const std::vector<BF16> row = group.RandomRow();
  group.Launch(kSlot, 10, row);
  const std::vector<float> once = group.Logits(0);
  group.Launch(-1, 0, group.RandomRow());
  EXPECT_EQ(group.Logits(0), once);
  group.Launch(kSlot, 10, row);
  EXPECT_EQ(group.Logits(0), once);
}

TEST(RowStackTest, RefusesOtherShapes) {
  Group<BF16, BF16, BF16> group({});
  const auto refused = [&](auto change) {
    RowStackArgs args = group.args_[0];
    std::vector<StackLayer> layers(args.layers, args.layers + args.num_layers);
    args.layers = layers.data();
    change(args, layers);
    return !RowStackSupports(args) && RowStack({}, args) == cudaErrorInvalidValue;
  };
  using Layers = std::vector<StackLayer>;
  EXPECT_TRUE(refused([](RowStackArgs& a, Layers&) { a.type = Type::kF32; }));
  EXPECT_TRUE(refused([](RowStackArgs& a, Layers&) { a.num_layers = 1; }));
  EXPECT_TRUE(refused([](RowStackArgs& a, Layers&) { a.hidden = 8200; }));
  EXPECT_TRUE(refused([](RowStackArgs& a, Layers&) { a.intermediate = 20'000; }));
  EXPECT_TRUE(refused([](RowStackArgs& a, Layers&) { a.heads = 18; }));
  EXPECT_TRUE(refused([](RowStackArgs& a, Layers&) { a.gate = GemvEpilogue::kStore; }));
  EXPECT_TRUE(refused([](RowStackArgs&, Layers& l) { l[0].kv.head_dim = 96; }));
  EXPECT_TRUE(refused([](RowStackArgs&, Layers& l) { l[1].mlp_norm = nullptr; }));
  EXPECT_TRUE(refused([](RowStackArgs& a, Layers&) { a.exchange = nullptr; }));
}

// A rank that never comes, and a group that is given up: every wait ends, without a trap.
TEST(RowStackTest, StopsWaitingWhenTheGroupIsGivenUp) {
  Group<BF16, BF16, BF16> group({.ranks = 2});
  uint32_t* abort = nullptr;
  EXPECT_CUDA(cudaHostAlloc(&abort, sizeof(*abort), cudaHostAllocMapped));
  *abort = 0;
  testing::Memory aborted(sizeof(uint32_t));
  aborted.Write(std::vector<uint32_t>{0});
  group.exchanges_[0].peers.abort = abort;
  group.exchanges_[0].peers.aborted = aborted.get<uint32_t>();
  group.residual_->Write(group.RandomRow());
  group.rows_->Write(std::vector<int32_t>{kSlot, 40});
  EXPECT_CUDA(cudaDeviceSynchronize());
  EXPECT_CUDA(RowStack({.stream = group.streams_[0]}, group.args_[0]));
  EXPECT_EQ(cudaStreamQuery(group.streams_[0]), cudaErrorNotReady);
  *static_cast<volatile uint32_t*>(abort) = 1;
  EXPECT_CUDA(cudaStreamSynchronize(group.streams_[0]));
  EXPECT_EQ(aborted.Read<uint32_t>()[0], 1u);
  for (const auto& rank : group.ranks_) EXPECT_TRUE(rank.GuardsIntact());
  EXPECT_CUDA(cudaFreeHost(abort));
}

}  // namespace
}  // namespace lockstep::kernels
