#include <gtest/gtest.h>

#include "kernels/attention_decode.h"
#include "tests/kernels/attention_case.h"
#include "tests/kernels/product_scales.h"

namespace lockstep::kernels {
namespace {

constexpr float kTurn = 0.37f;  // radians a position and pair, roughly

class DecodeAttentionTest : public testing::Test {
 protected:
  void SetUp() override { ASSERT_CUDA(InitDecodeAttention()); }
};

struct Workspace {
  explicit Workspace(const DecodeAttentionArgs& args, int max_context)
      : bytes(DecodeAttentionWorkspaceBytes(args.heads, args.kv.kv_heads, args.kv.head_dim,
                                            args.num_rows, max_context)),
        memory(static_cast<int64_t>(std::max<size_t>(bytes, 16))) {
    EXPECT_EQ(cudaMemset(memory.get(), 0, bytes), cudaSuccess);
  }
  size_t bytes;
  DeviceRows<uint8_t> memory;
};

template <typename T, typename KV>
DecodeAttentionArgs ArgsOf(AttentionCase<T, KV>& c, DeviceCache<KV>& cache, const DeviceRows<T>& q,
                           const DeviceRows<T>& out) {
  DecodeAttentionArgs args;
  args.type = TypeOf<T>();
  args.num_rows = c.num_rows();
  args.rows = cache.rows;
  args.kv = cache.layer;
  args.heads = c.shape().heads;
  args.q = q.get();
  args.q_stride = c.q_stride();
  args.out = out.get();
  args.out_stride = c.out_stride();
  args.scale = c.scale();
  args.window = c.shape().window;
  args.max_context = c.max_context();
  return args;
}

struct Options {
  int splits = 0;
  int max_context = 0;  // 0: exact
  bool history_ready = false;
  bool pdl = false;
};

template <typename T, typename KV>
void Check(const AttentionShape& shape, const std::vector<AttentionRow>& rows, uint32_t seed,
           const Options& options = {}) {
  AttentionCase<T, KV> c(shape, rows, seed);
  DeviceCache<KV> cache(c);
  const DeviceRows<T> q(c.q());
  const DeviceRows<T> out(static_cast<int64_t>(c.num_rows()) * c.out_stride());
  DecodeAttentionArgs args = ArgsOf(c, cache, q, out);
  if (options.max_context > 0) args.max_context = options.max_context;
  args.splits = options.splits;
  args.history_ready = options.history_ready;
  const Workspace workspace(args, args.max_context);
  args.workspace = workspace.memory.get();
  const std::string what = Describe(shape) + " rows " + std::to_string(rows.size()) + " splits " +
                           std::to_string(options.splits) + " max " +
                           std::to_string(args.max_context);
  const Launch launch = {nullptr, options.pdl};
  ASSERT_CUDA(DecodeAttention(launch, args));
  ASSERT_CUDA(cudaDeviceSynchronize());
  c.Check(out, AttentionTolerance<T>(), what);
  if (testing::Test::HasFatalFailure()) return;

  // Again, whichever way the tiles take: the same bits, and counters as they were.
  const std::vector<T> first = out.Bits();
  for (const int ring : {-1, 1, 2}) {
    args.ring = ring;
    for (int i = 0; i < 2; ++i) ASSERT_CUDA(DecodeAttention(launch, args));
    ASSERT_CUDA(cudaDeviceSynchronize());
    const std::vector<T> second = out.Bits();
    EXPECT_EQ(memcmp(first.data(), second.data(), first.size() * sizeof(T)), 0) << what << ring;
  }
  workspace.memory.ExpectGuards(what);
  // Dealt out: other bits, but always those.
  if (!DecodeAttentionTakesFresh(args)) return;  // the plain kernel's
  args.ring = args.splits = 0;
  const DeviceRows<uint8_t> plan(static_cast<int64_t>(DecodeAttentionPlanBytes()));
  ASSERT_CUDA(PlanDecodeAttention(launch, args, plan.get()));
  args.plan = plan.get();
  const DeviceRows<T> dealt_out(static_cast<int64_t>(c.num_rows()) * c.out_stride());
  args.out = dealt_out.get();
  ASSERT_CUDA(DecodeAttention(launch, args));
  ASSERT_CUDA(cudaDeviceSynchronize());
  c.Check(dealt_out, AttentionTolerance<T>(), what + " dealt");
  const std::vector<T> dealt = dealt_out.Bits();
  for (int i = 0; i < 3; ++i) ASSERT_CUDA(DecodeAttention(launch, args));
  ASSERT_CUDA(cudaDeviceSynchronize());
  const std::vector<T> again = dealt_out.Bits();
  EXPECT_EQ(memcmp(dealt.data(), again.data(), dealt.size() * sizeof(T)), 0) << what << " dealt";
  workspace.memory.ExpectGuards(what);
  plan.ExpectGuards(what);
}

// Positions at and beside every kind of edge.
std::vector<AttentionRow> Edges(int longest) {
  std::vector<AttentionRow> rows;
  for (const int position : {0, 1, 7, 8, 14, 15, 16, 17, 31, 33, 63, 64, 100, 255, 500, 1023}) {
    if (position < longest) rows.push_back({static_cast<int>(rows.size()), position});
  }
  rows.insert(rows.begin() + 3, {-1, 12345});  // padding: its position means nothing
  rows.push_back({-1, 0});
  return rows;
}

int Longest() { return SanitizerRun() ? 101 : 1024; }

TEST_F(DecodeAttentionTest, EveryHeadDimAndGroupInBF16) {
  for (const int dim : {64, 80, 96, 128, 256, 8, 16, 24, 32, 200}) {
    for (const int group : {1, 4, 7, 8, 16}) {
      if (SanitizerRun() && (group == 1 || group == 8 || dim == 24 || dim == 200)) continue;
      Check<__nv_bfloat16, __nv_bfloat16>({.heads = 2 * group, .kv_heads = 2, .head_dim = dim},
                                          Edges(group == 4 ? Longest() : 101), dim + group);
      if (HasFatalFailure()) return;
    }
  }
}

// Rows of all lengths, of which each is cut anywhere: one takes many blocks, some less than one.
TEST_F(DecodeAttentionTest, ManyRowsOfAllLengths) {
  std::vector<AttentionRow> rows = Edges(Longest());
  for (int i = 0; rows.size() < (SanitizerRun() ? 40u : 90u); ++i) {
    const int slot = static_cast<int>(rows.size());
    rows.push_back({slot, i % 9 == 0 ? Longest() - 1 - i : i * 37 % Longest() / (1 + i % 5)});
  }
  if (!SanitizerRun()) rows[20].position = 9'000;
  for (const int window : {0, 300}) {
    // So many that 16 bits come by rings.
    const int kv_heads = SanitizerRun() ? 8 : 4;
    const AttentionShape shape = {
        .heads = 16, .kv_heads = kv_heads, .head_dim = 128, .window = window};
    Check<__nv_bfloat16, __nv_bfloat16>(shape, rows, 900 + window, {.pdl = true});
    Check<__nv_bfloat16, __nv_fp8_e4m3>(shape, rows, 901 + window);
    if (HasFatalFailure()) return;
  }
}

TEST_F(DecodeAttentionTest, F16) {
  for (const int dim : {64, 128, 256, 72}) {
    Check<__half, __half>({.heads = 6, .kv_heads = 2, .head_dim = dim}, Edges(Longest()), dim);
    if (HasFatalFailure()) return;
  }
}

TEST_F(DecodeAttentionTest, E4M3CacheWithScales) {
  for (const int dim : {64, 128, 256, 72}) {
    const AttentionShape shape = {.heads = 12,
                                  .kv_heads = 3,
                                  .head_dim = dim,
                                  .sharpness = 1.0f,
                                  .k_scale = 0.6f,
                                  .v_scale = 1.7f};
    Check<__half, __nv_fp8_e4m3>(shape, Edges(Longest()), dim);
    Check<__nv_bfloat16, __nv_fp8_e4m3>(shape, Edges(Longest()), dim + 1);
    if (HasFatalFailure()) return;
  }
}

TEST_F(DecodeAttentionTest, PlainKernelForF32AndOddShapes) {
  for (const int dim : {8, 20, 64, 128}) {
    Check<float, float>({.heads = 6, .kv_heads = 2, .head_dim = dim, .block_size = 16},
                        Edges(Longest()), dim);
    Check<float, float>({.heads = 5, .kv_heads = 1, .head_dim = dim, .block_size = 3, .window = 70},
                        Edges(Longest()), dim);
    if (HasFatalFailure()) return;
  }
  Check<__half, __half>({.heads = 4, .kv_heads = 2, .head_dim = 12, .block_size = 4}, Edges(101),
                        1);
  Check<__nv_bfloat16, __nv_bfloat16>({.heads = 20, .kv_heads = 1, .head_dim = 64}, Edges(101), 2);
  Check<__nv_bfloat16, __nv_fp8_e4m3>({.heads = 20, .kv_heads = 1, .head_dim = 64}, Edges(101), 2);
}

TEST_F(DecodeAttentionTest, WindowAndLargerBlocks) {
  for (const int window : {1, 2, 15, 16, 17, 100, 600}) {
    for (const int block : {16, 32, 48}) {
      Check<__nv_bfloat16, __nv_bfloat16>(
          {.heads = 8, .kv_heads = 2, .head_dim = 128, .block_size = block, .window = window},
          Edges(Longest()), window + block);
      if (HasFatalFailure()) return;
    }
  }
}

TEST_F(DecodeAttentionTest, EveryNumberOfSplits) {
  for (const int splits : {1, 2, 4, 8, 16}) {
    for (const bool history_ready : {false, true}) {
      Check<__nv_bfloat16, __nv_bfloat16>(
          {.heads = 7, .kv_heads = 1, .head_dim = 128}, Edges(Longest()), splits,
          {.splits = splits, .history_ready = history_ready, .pdl = true});
      if (HasFatalFailure()) return;
    }
  }
}

// One row: several clusters share a long context, and a loose bound on the
// context changes nothing.
TEST_F(DecodeAttentionTest, LongContexts) {
  const std::vector<int> positions = SanitizerRun()
                                         ? std::vector<int>{9000}
                                         : std::vector<int>{100, 4095, 8190, 9000, 20000, 131071};
  for (const int position : positions) {
    for (const int kv_heads : {1, 2}) {
      if (position > 100000 && kv_heads == 2) continue;
      Check<__nv_bfloat16, __nv_bfloat16>(
          {.heads = 4 * kv_heads, .kv_heads = kv_heads, .head_dim = 64, .sharpness = 4.0f},
          {{0, position}}, position, {.max_context = 131072, .history_ready = true});
      if (HasFatalFailure()) return;
    }
  }
  Check<__half, __half>({.heads = 4, .kv_heads = 1, .head_dim = 128, .window = 9000},
                        {{0, 12000}, {1, 600}, {-1, 0}}, 5, {.max_context = 32768});
}

// As many rows as make the launch choose one, two or four blocks for each, by rings where head_dim
// is 128.
TEST_F(DecodeAttentionTest, ManyRows) {
  for (const int count :
       SanitizerRun() ? std::vector<int>{5} : std::vector<int>{25, 70, 105, 210, 600}) {
    for (const int head_dim : {64, 128}) {
      std::vector<AttentionRow> rows;
      for (int i = 0; i < count; ++i)
        rows.push_back({i % 9 == 4 ? -1 : i, (i * 31) % (head_dim == 64 ? 90 : 400)});
      Check<__nv_bfloat16, __nv_bfloat16>({.heads = 8, .kv_heads = 2, .head_dim = head_dim}, rows,
                                          count, {.max_context = 2048});
      if (HasFatalFailure()) return;
    }
  }
}

// Rows of one length, nearly, that are dealt out whole: one or two to a block.
TEST_F(DecodeAttentionTest, ManyRowsOfOneLength) {
  for (const int count : SanitizerRun() ? std::vector<int>{6} : std::vector<int>{65, 130}) {
    std::vector<AttentionRow> rows;
    for (int i = 0; i < count; ++i) rows.push_back({i % 50 == 7 ? -1 : i, 260 + i % 5});
    const AttentionShape shape = {.heads = 8, .kv_heads = 8, .head_dim = 128};
    Check<__nv_bfloat16, __nv_bfloat16>(shape, rows, count, {.max_context = 2048});
    Check<__nv_bfloat16, __nv_fp8_e4m3>(shape, rows, count + 1, {.max_context = 2048});
    if (HasFatalFailure()) return;
  }
}

TEST_F(DecodeAttentionTest, RowsDoNotDependOnEachOtherWithFixedSplits) {
  const AttentionShape shape = {.heads = 8, .kv_heads = 2, .head_dim = 128};
  std::vector<AttentionRow> rows;
  for (int i = 0; i < 40; ++i) rows.push_back({i, (i * 37) % 300});
  AttentionCase<__nv_bfloat16, __nv_bfloat16> c(shape, rows, 3);
  DeviceCache<__nv_bfloat16> cache(c);
  const DeviceRows<__nv_bfloat16> q(c.q());
  const int64_t count = static_cast<int64_t>(c.num_rows()) * c.out_stride();
  const DeviceRows<__nv_bfloat16> together(count), alone(count);
  DecodeAttentionArgs args = ArgsOf(c, cache, q, together);
  args.splits = 4;
  ASSERT_CUDA(DecodeAttention({}, args));
  args.num_rows = 1;
  for (int r = 0; r < c.num_rows(); ++r) {
    args.rows.slot = cache.slots.get() + r;
    args.rows.position = cache.positions.get() + r;
    args.q = q.get() + static_cast<int64_t>(r) * c.q_stride();
    args.out = alone.get() + static_cast<int64_t>(r) * c.out_stride();
    ASSERT_CUDA(DecodeAttention({}, args));
  }
  ASSERT_CUDA(cudaDeviceSynchronize());
  c.Check(together, AttentionTolerance<__nv_bfloat16>(), "together");
  const auto a = together.Bits(), b = alone.Bits();
  EXPECT_EQ(memcmp(a.data(), b.data(), a.size() * sizeof(a[0])), 0);
}

constexpr int kPlanned = 3;  // for a ring's tiles

// k and v of the row itself come with q, not yet rotated, and reach the cache. scaled: a product
// left its scales to them.
template <typename T, typename KV>
void CheckFresh(const AttentionShape& shape, const std::vector<AttentionRow>& rows, bool rotate,
                bool history_ready, uint32_t seed, int ring = 0, bool scaled = false) {
  AttentionCase<T, KV> c(shape, rows, seed);
  const int dim = shape.head_dim, half = dim / 2, kv_heads = shape.kv_heads;
  int longest = 0;
  for (const AttentionRow& row : rows) longest = std::max(longest, row.position + 1);
  std::vector<float> angles(static_cast<size_t>(longest) * dim);
  for (int p = 0; p < longest; ++p) {
    for (int i = 0; i < half; ++i) {
      angles[static_cast<size_t>(p) * dim + 2 * i] = std::cos(p * kTurn / (1 + i));
      angles[static_cast<size_t>(p) * dim + 2 * i + 1] = std::sin(p * kTurn / (1 + i));
    }
  }
  // The cache as the launch finds it: NaN where the rows' own positions go.
  DeviceCache<KV> cache(c);
  std::vector<KV> k_before = c.k(), v_before = c.v();
  const std::vector<float> raw = c.q();
  const DeviceRows<T> q(raw);
  const DeviceRows<float> table(angles);
  const LeftScales scales(c.num_rows(), (shape.heads + 2 * kv_heads) * dim, seed);
  KV nan;
  memset(static_cast<void*>(&nan), 0xff, sizeof(nan));
  for (int r = 0; r < c.num_rows(); ++r) {
    if (rows[r].slot < 0) continue;
    const float* angle = &angles[static_cast<size_t>(rows[r].position) * dim];
    float* row = &c.q()[static_cast<int64_t>(r) * c.q_stride()];
    for (int i = 0; i < (shape.heads + 2 * kv_heads) * dim && scaled; ++i)
      row[i] *= scales.Of(r, i);
    for (int head = 0; head < shape.heads + kv_heads; ++head) {
      float* x = row + head * dim;
      for (int i = 0; i < half && rotate; ++i) {
        const float low = x[i], high = x[i + half];
        x[i] = low * angle[2 * i] - high * angle[2 * i + 1];
        x[i + half] = high * angle[2 * i] + low * angle[2 * i + 1];
        if (head < shape.heads) {
          x[i] = HostRounded<T>(x[i]);
          x[i + half] = HostRounded<T>(x[i + half]);
        }
      }
    }
    const bool narrow = sizeof(KV) == 1;
    for (int head = 0; head < kv_heads; ++head) {
      const int64_t at = c.CacheOffset(rows[r].slot, head, rows[r].position);
      for (int d = 0; d < dim; ++d) {
        k_before[at + d] = v_before[at + d] = nan;
        const float k = row[(shape.heads + head) * dim + d];
        const float v = row[(shape.heads + kv_heads + head) * dim + d];
        c.k()[at + d] = HostElement<KV>(narrow ? k / shape.k_scale : k);
        c.v()[at + d] = HostElement<KV>(narrow ? v / shape.v_scale : v);
      }
    }
  }
  cache.k.PutBits(k_before);
  cache.v.PutBits(v_before);
  const DeviceRows<T> out(static_cast<int64_t>(c.num_rows()) * c.out_stride());
  DecodeAttentionArgs args = ArgsOf(c, cache, q, out);
  args.fresh_k = q.get() + shape.heads * dim;
  args.fresh_v = q.get() + (shape.heads + kv_heads) * dim;
  args.rotary = rotate ? reinterpret_cast<const float2*>(table.get()) : nullptr;
  args.history_ready = history_ready;
  if (scaled) args.scales = scales.get();
  ASSERT_TRUE(DecodeAttentionTakesFresh(args));
  const DeviceRows<uint8_t> plan(static_cast<int64_t>(DecodeAttentionPlanBytes()));
  const Workspace workspace(args, args.max_context);
  if (ring == kPlanned) {
    ASSERT_CUDA(PlanDecodeAttention({}, args, plan.get()));
    args.plan = plan.get();
    args.workspace = workspace.memory.get();
  } else {
    args.ring = ring;
  }
  ASSERT_CUDA(DecodeAttention({nullptr, true}, args));
  ASSERT_CUDA(cudaDeviceSynchronize());
  const std::string what = Describe(shape);
  c.Check(out, AttentionTolerance<T>() * (sizeof(KV) == 1 ? 3 : 1), what);
  if (testing::Test::HasFatalFailure()) return;
  cache.k.ExpectGuards(what);
  cache.v.ExpectGuards(what);
  const std::vector<KV> k = cache.k.Bits(), v = cache.v.Bits();
  EXPECT_EQ(memcmp(v.data(), c.v().data(), v.size() * sizeof(KV)), 0) << what;
  int64_t apart = 0;
  for (size_t i = 0; i < k.size(); ++i) {
    if (memcmp(&k[i], &c.k()[i], sizeof(KV)) == 0) continue;
    // A rotation whose last bit fell the other way.
    ++apart;
    const double expected = HostFloat(c.k()[i]);
    ASSERT_NEAR(HostFloat(k[i]), expected, 2.1 * HalfUlp<KV>() * std::abs(expected) + 1e-6) << what;
  }
  EXPECT_LE(apart, static_cast<int64_t>(c.num_rows()) * kv_heads * dim / 20 + 1) << what;
}

TEST_F(DecodeAttentionTest, RotatesAndCachesItsOwnPosition) {
  for (const bool history_ready : {false, true}) {
    for (const bool rotate : {true, false}) {
      for (const int dim : {64, 128, 256, 80, 96, 16}) {
        if (SanitizerRun() && dim == 256) continue;
        CheckFresh<__nv_bfloat16, __nv_bfloat16>({.heads = 8, .kv_heads = 2, .head_dim = dim},
                                                 Edges(Longest()), rotate, history_ready, dim);
        if (HasFatalFailure()) return;
      }
      for (const int ring : {-1, 1, 2, kPlanned}) {
        CheckFresh<__nv_bfloat16, __nv_bfloat16>({.heads = 8, .kv_heads = 2, .head_dim = 128},
                                                 Edges(Longest()), rotate, history_ready, 3, ring);
        CheckFresh<__half, __nv_fp8_e4m3>(
            {.heads = 6, .kv_heads = 1, .head_dim = 128, .k_scale = 0.5f, .v_scale = 0.25f},
            Edges(Longest()), rotate, history_ready, 4, ring);
        CheckFresh<__nv_bfloat16, __nv_bfloat16>({.heads = 8, .kv_heads = 2, .head_dim = 128},
                                                 Edges(Longest()), rotate, history_ready, 5, ring,
                                                 true);
        CheckFresh<__nv_bfloat16, __nv_fp8_e4m3>(
            {.heads = 6, .kv_heads = 2, .head_dim = 128, .k_scale = 0.5f, .v_scale = 0.25f},
            Edges(Longest()), rotate, history_ready, 6, ring, true);
      }
      // So many KV heads that dealt work comes by rings.
      CheckFresh<__nv_bfloat16, __nv_bfloat16>({.heads = 20, .kv_heads = 20, .head_dim = 128},
                                               Edges(Longest()), rotate, history_ready, 8,
                                               kPlanned);
      CheckFresh<__nv_bfloat16, __nv_bfloat16>({.heads = 12, .kv_heads = 1, .head_dim = 64},
                                               Edges(Longest()), rotate, history_ready, 7, 0, true);
      CheckFresh<__half, __half>(
          {.heads = 14, .kv_heads = 2, .head_dim = 128, .block_size = 32, .window = 20},
          Edges(Longest()), rotate, history_ready, 1);
      CheckFresh<__nv_bfloat16, __nv_fp8_e4m3>(
          {.heads = 12, .kv_heads = 1, .head_dim = 128, .k_scale = 0.5f, .v_scale = 0.25f},
          Edges(Longest()), rotate, history_ready, 2);
      if (HasFatalFailure()) return;
    }
  }
}

// One graph serves every position: here a sequence grows under it.
TEST_F(DecodeAttentionTest, AGraphServesGrowingPositions) {
  const AttentionShape shape = {.heads = 8, .kv_heads = 2, .head_dim = 128};
  AttentionCase<__nv_bfloat16, __nv_bfloat16> longest(shape, {{0, 700}}, 8);
  DeviceCache<__nv_bfloat16> cache(longest);
  DeviceRows<__nv_bfloat16> q(longest.q());
  const DeviceRows<__nv_bfloat16> out(longest.out_stride());
  DecodeAttentionArgs args = ArgsOf(longest, cache, q, out);
  args.max_context = 131072;
  const Workspace workspace(args, args.max_context);
  args.workspace = workspace.memory.get();
  cudaStream_t stream;
  ASSERT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  ASSERT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < 3; ++i) ASSERT_CUDA(DecodeAttention({stream, true}, args));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  ASSERT_CUDA(cudaStreamEndCapture(stream, &graph));
  ASSERT_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  for (int position = 0; position <= 700; position += SanitizerRun() ? 233 : 35) {
    AttentionCase<__nv_bfloat16, __nv_bfloat16> c(shape, {{0, position}}, 9 + position);
    std::vector<int32_t> table(longest.tables().size());
    std::copy_n(c.tables().begin(), std::min(c.tables().size(), table.size()), table.begin());
    ASSERT_LE(c.k().size(), longest.k().size());
    c.k().resize(longest.k().size());
    c.v().resize(longest.k().size());
    cache.k.PutBits(c.k());
    cache.v.PutBits(c.v());
    cache.tables.PutBits(table);
    cache.positions.PutBits({position});
    q.Put(c.q());
    ASSERT_CUDA(cudaDeviceSynchronize());
    ASSERT_CUDA(cudaGraphLaunch(exec, stream));
    ASSERT_CUDA(cudaStreamSynchronize(stream));
    c.Check(out, AttentionTolerance<__nv_bfloat16>(), "position " + std::to_string(position));
    if (HasFatalFailure()) return;
  }
  ASSERT_CUDA(cudaGraphExecDestroy(exec));
  ASSERT_CUDA(cudaGraphDestroy(graph));
  ASSERT_CUDA(cudaStreamDestroy(stream));
}

TEST_F(DecodeAttentionTest, RefusesWhatItCannotDo) {
  DecodeAttentionArgs args;
  args.num_rows = 1;
  args.kv.kv_heads = 2;
  args.kv.head_dim = 64;
  args.heads = 3;
  EXPECT_EQ(DecodeAttention({}, args), cudaErrorInvalidValue);  // 3 heads over 2 KV heads
  args.heads = 4;
  args.kv.head_dim = 520;
  EXPECT_EQ(DecodeAttention({}, args), cudaErrorInvalidValue);
  args.kv.head_dim = 24;
  args.fresh_k = args.fresh_v = &args;
  EXPECT_FALSE(DecodeAttentionTakesFresh(args));
  EXPECT_EQ(DecodeAttention({}, args), cudaErrorInvalidValue);
  args.num_rows = 0;
  EXPECT_EQ(DecodeAttention({}, args), cudaSuccess);

  args = {};
  args.kv.kv_heads = args.heads = 2;
  args.kv.head_dim = 64;
  args.max_context = 4096;
  args.num_rows = 1024;
  EXPECT_TRUE(DecodeAttentionDeals(args));
  args.num_rows = 1025;
  EXPECT_FALSE(DecodeAttentionDeals(args));
  EXPECT_EQ(PlanDecodeAttention({}, args, &args), cudaErrorInvalidValue);
  args.num_rows = 15;  // 30 rows and KV heads
  EXPECT_FALSE(DecodeAttentionDeals(args));
  args.num_rows = 16;
  EXPECT_TRUE(DecodeAttentionDeals(args));
  args.max_context = 2048;
  EXPECT_FALSE(DecodeAttentionDeals(args));
  args.num_rows = 1024;
  EXPECT_FALSE(DecodeAttentionDeals(args));
  args.kv.type = Type::kE4M3;
  EXPECT_TRUE(DecodeAttentionDeals(args));
  args.num_rows = 66;
  EXPECT_FALSE(DecodeAttentionDeals(args));
  args.num_rows = 1;
  args.plan = &args;  // and no workspace
  EXPECT_EQ(DecodeAttention({}, args), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace lockstep::kernels
