#include <gtest/gtest.h>

#include "kernels/attention_prefill.h"
#include "tests/kernels/attention_case.h"

namespace lockstep::kernels {
namespace {

class PrefillAttentionTest : public testing::Test {
 protected:
  void SetUp() override { ASSERT_CUDA(InitPrefillAttention()); }
};

struct Piece {
  int begin = 0, count = 0;
};

// Each piece is a slot of its own; two rows that belong to no span lie between.
struct Layout {
  explicit Layout(const std::vector<Piece>& pieces) {
    for (const Piece& piece : pieces) {
      const int slot = static_cast<int>(spans.size());
      spans.push_back({slot, static_cast<int>(rows.size()), piece.begin, piece.count});
      for (int i = 0; i < piece.count; ++i) rows.push_back({slot, piece.begin + i});
      for (int i = 0; i < 2; ++i) rows.push_back({-1, 0});
      max_count = std::max(max_count, piece.count);
    }
    spans.insert(spans.begin() + 1, {-1, 0, 0, 3});  // no slot: nothing
  }
  std::vector<PrefillSpan> spans;
  std::vector<AttentionRow> rows;
  int max_count = 0;
};

// Room for an e4m3 cache in 16 bits, with guards around it; junk where nobody may look.
template <typename T>
struct Widened {
  Widened(const AttentionShape& shape, const Layout& layout, int slots, int table_stride)
      : blocks(BlocksOf(shape, layout)),
        k(int64_t{blocks} * shape.kv_heads * shape.block_size * shape.head_dim),
        v(int64_t{blocks} * shape.kv_heads * shape.block_size * shape.head_dim),
        table(int64_t{slots} * table_stride) {}
  static int BlocksOf(const AttentionShape& shape, const Layout& layout) {
    int sum = 0;
    for (const PrefillSpan& span : layout.spans) {
      if (span.slot < 0 || span.count <= 0) continue;
      sum += (span.begin + span.count + shape.block_size - 1) / shape.block_size;
    }
    return sum;
  }
  PrefillScratch scratch() const { return {k.get(), v.get(), table.get(), blocks}; }

  int blocks;
  DeviceRows<T> k, v;
  DeviceRows<int32_t> table;
};

template <typename T, typename KV>
void Check(const AttentionShape& shape, const std::vector<Piece>& pieces, uint32_t seed,
           int loose = 0, bool widened = false) {
  const Layout layout(pieces);
  AttentionCase<T, KV> c(shape, layout.rows, seed);
  DeviceCache<KV> cache(c);
  const DeviceRows<T> q(c.q());
  const DeviceRows<T> out(static_cast<int64_t>(c.num_rows()) * c.out_stride());
  DeviceRows<PrefillSpan> spans(static_cast<int64_t>(layout.spans.size()));
  spans.PutBits(layout.spans);
  PrefillAttentionArgs args;
  args.type = TypeOf<T>();
  args.kv = cache.layer;
  args.heads = shape.heads;
  args.spans = spans.get();
  args.num_spans = static_cast<int>(layout.spans.size());
  args.max_count = layout.max_count + loose;
  args.block_table = cache.tables.get();
  args.table_stride = c.table_stride();
  args.q = q.get();
  args.q_stride = c.q_stride();
  args.out = out.get();
  args.out_stride = c.out_stride();
  args.scale = c.scale();
  args.window = shape.window;
  const Widened<T> wide(shape, layout, static_cast<int>(c.tables().size()) / c.table_stride(),
                        c.table_stride());
  if (widened) {
    ASSERT_TRUE(PrefillAttentionWidens(args)) << Describe(shape);
    args.scratch = wide.scratch();
  }
  ASSERT_CUDA(PrefillAttention({nullptr, loose > 0}, args));
  ASSERT_CUDA(cudaDeviceSynchronize());
  const std::string what = Describe(shape) + " pieces " + std::to_string(pieces.size());
  c.Check(out, AttentionTolerance<T>(), what);
  if (testing::Test::HasFatalFailure()) return;
  wide.k.ExpectGuards(what);
  wide.v.ExpectGuards(what);
  wide.table.ExpectGuards(what);
  const std::vector<T> first = out.Bits();
  ASSERT_CUDA(PrefillAttention({nullptr, loose == 0}, args));
  ASSERT_CUDA(cudaDeviceSynchronize());
  const std::vector<T> second = out.Bits();
  EXPECT_EQ(memcmp(first.data(), second.data(), first.size() * sizeof(T)), 0) << what;
}

// Whole prompts, chunks after a history, single rows, counts beside the tiles.
std::vector<Piece> Pieces() {
  if (SanitizerRun()) return {{0, 33}, {40, 5}, {100, 17}};
  return {{0, 1}, {0, 17}, {0, 130}, {5, 3}, {64, 64}, {127, 66}, {300, 1}, {271, 97}, {0, 0}};
}

TEST_F(PrefillAttentionTest, EveryHeadDimAndGroupInBF16) {
  for (const int dim : {64, 80, 96, 128, 256, 8, 24, 200}) {
    for (const int group : {1, 4, 7}) {
      if (SanitizerRun() && (group == 1 || dim == 24 || dim == 200 || dim == 80)) continue;
      Check<__nv_bfloat16, __nv_bfloat16>({.heads = 2 * group, .kv_heads = 2, .head_dim = dim},
                                          Pieces(), dim + group, group == 4 ? 70 : 0);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(PrefillAttentionTest, F16) {
  for (const int dim : {64, 128, 256, 72}) {
    Check<__half, __half>({.heads = 6, .kv_heads = 2, .head_dim = dim}, Pieces(), dim);
    if (HasFatalFailure()) return;
  }
}

TEST_F(PrefillAttentionTest, E4M3CacheWithScales) {
  for (const int dim : {64, 128, 256, 72}) {
    const AttentionShape shape = {.heads = 6,
                                  .kv_heads = 3,
                                  .head_dim = dim,
                                  .sharpness = 1.0f,
                                  .k_scale = 0.6f,
                                  .v_scale = 1.7f};
    Check<__half, __nv_fp8_e4m3>(shape, Pieces(), dim);
    Check<__nv_bfloat16, __nv_fp8_e4m3>(shape, Pieces(), dim + 1);
    if (HasFatalFailure()) return;
  }
}

// Every head_dim, block size and window that wgmma takes, and more spans than a warp has lanes.
TEST_F(PrefillAttentionTest, E4M3CacheWidened) {
  for (const int dim : {64, 128, 256}) {
    for (const int block : {8, 16, 64}) {
      for (const int window : {0, 50}) {
        if (SanitizerRun() && (block == 64 || window != 0)) continue;
        const AttentionShape shape = {.heads = 6,
                                      .kv_heads = 3,
                                      .head_dim = dim,
                                      .block_size = block,
                                      .window = window,
                                      .sharpness = 1.0f,
                                      .k_scale = 0.6f,
                                      .v_scale = 1.7f};
        Check<__half, __nv_fp8_e4m3>(shape, Pieces(), dim + block, 0, true);
        Check<__nv_bfloat16, __nv_fp8_e4m3>(shape, Pieces(), dim + block + 1, 9, true);
        if (HasFatalFailure()) return;
      }
    }
  }
  std::vector<Piece> many;
  for (int i = 0; i < (SanitizerRun() ? 35 : 130); ++i) many.push_back({i % 7 * 11, i % 5});
  Check<__nv_bfloat16, __nv_fp8_e4m3>({.heads = 4, .kv_heads = 1, .head_dim = 64}, many, 5, 0,
                                      true);
}

// Whoever asks for a scratch where none would serve: the cache goes where it went.
TEST_F(PrefillAttentionTest, WhatIsWidenedIsWhatWgmmaTakesOfSixteenBits) {
  PrefillAttentionArgs args;
  args.heads = 8;
  args.q_stride = args.out_stride = 1024;
  args.kv = {nullptr, nullptr, Type::kE4M3, 2, 16, 128};
  EXPECT_TRUE(PrefillAttentionWidens(args));
  for (const int dim : {72, 80, 512}) {
    args.kv.head_dim = dim;
    EXPECT_FALSE(PrefillAttentionWidens(args)) << dim;
  }
  args.kv.head_dim = 128;
  args.kv.block_size = 5;
  EXPECT_FALSE(PrefillAttentionWidens(args));
  args.kv.block_size = 16;
  args.kv.type = Type::kBF16;
  EXPECT_FALSE(PrefillAttentionWidens(args));
  args.kv.type = Type::kE4M3;
  args.type = Type::kF32;
  EXPECT_FALSE(PrefillAttentionWidens(args));
}

TEST_F(PrefillAttentionTest, WindowsAndBlockSizes) {
  for (const int window : {1, 16, 50, 129}) {
    for (const int block : {16, 32, 5, 128}) {
      for (const int dim : {64, 128}) {
        if (SanitizerRun() && (block == 32 || window == 16)) continue;
        Check<__nv_bfloat16, __nv_bfloat16>(
            {.heads = 8, .kv_heads = 2, .head_dim = dim, .block_size = block, .window = window},
            Pieces(), window + block);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(PrefillAttentionTest, PlainKernelForF32AndOddShapes) {
  for (const int dim : {8, 20, 128}) {
    Check<float, float>({.heads = 4, .kv_heads = 2, .head_dim = dim}, Pieces(), dim, 5);
    Check<float, float>({.heads = 5, .kv_heads = 1, .head_dim = dim, .block_size = 3, .window = 70},
                        Pieces(), dim);
    if (HasFatalFailure()) return;
  }
  Check<__half, __half>({.heads = 4, .kv_heads = 2, .head_dim = 12, .block_size = 4}, Pieces(), 1);
  Check<__nv_bfloat16, __nv_fp8_e4m3>({.heads = 4, .kv_heads = 2, .head_dim = 12}, Pieces(), 2);
}

// Several tiles of rows over many tiles of positions, and large logits.
TEST_F(PrefillAttentionTest, LongPromptsAndSharpScores) {
  if (SanitizerRun()) return;
  for (const int dim : {64, 128}) {
    for (const float sharpness : {0.5f, 8.0f}) {
      Check<__nv_bfloat16, __nv_bfloat16>(
          {.heads = 4, .kv_heads = 1, .head_dim = dim, .sharpness = sharpness},
          {{0, 700}, {1500, 200}}, dim);
      Check<__half, __half>({.heads = 2, .kv_heads = 2, .head_dim = dim, .sharpness = sharpness},
                            {{0, 500}, {1000, 300}}, dim);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(PrefillAttentionTest, RowsDoNotDependOnTheOtherSpans) {
  const AttentionShape shape = {.heads = 8, .kv_heads = 2, .head_dim = 128};
  const Layout layout({{0, 200}, {30, 77}, {128, 100}});
  AttentionCase<__nv_bfloat16, __nv_bfloat16> c(shape, layout.rows, 4);
  DeviceCache<__nv_bfloat16> cache(c);
  const DeviceRows<__nv_bfloat16> q(c.q());
  const int64_t count = static_cast<int64_t>(c.num_rows()) * c.out_stride();
  const DeviceRows<__nv_bfloat16> together(count), alone(count);
  DeviceRows<PrefillSpan> spans(static_cast<int64_t>(layout.spans.size()));
  spans.PutBits(layout.spans);
  PrefillAttentionArgs args;
  args.kv = cache.layer;
  args.heads = shape.heads;
  args.spans = spans.get();
  args.num_spans = static_cast<int>(layout.spans.size());
  args.max_count = layout.max_count;
  args.block_table = cache.tables.get();
  args.table_stride = c.table_stride();
  args.q = q.get();
  args.q_stride = c.q_stride();
  args.out = together.get();
  args.out_stride = c.out_stride();
  args.scale = c.scale();
  ASSERT_CUDA(PrefillAttention({}, args));
  args.out = alone.get();
  for (size_t i = 0; i < layout.spans.size(); ++i) {
    args.spans = spans.get() + i;
    args.num_spans = 1;
    args.max_count = std::max(1, layout.spans[i].count);
    ASSERT_CUDA(PrefillAttention({}, args));
  }
  ASSERT_CUDA(cudaDeviceSynchronize());
  const auto a = together.Bits(), b = alone.Bits();
  EXPECT_EQ(memcmp(a.data(), b.data(), a.size() * sizeof(a[0])), 0);
}

TEST_F(PrefillAttentionTest, RefusesWhatItCannotDo) {
  PrefillAttentionArgs args;
  args.num_spans = args.max_count = 1;
  args.kv.kv_heads = 2;
  args.kv.head_dim = 64;
  args.heads = 3;
  EXPECT_EQ(PrefillAttention({}, args), cudaErrorInvalidValue);
  args.heads = 4;
  args.kv.head_dim = 520;
  EXPECT_EQ(PrefillAttention({}, args), cudaErrorInvalidValue);
  args.num_spans = 0;
  EXPECT_EQ(PrefillAttention({}, args), cudaSuccess);
}

}  // namespace
}  // namespace lockstep::kernels
