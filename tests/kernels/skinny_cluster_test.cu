// The product with 2 to 64 rows in clusters.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/skinny_cluster.h"
#include "kernels/skinny_cluster_plan.h"
#include "tests/kernels/gemv_case.cuh"

namespace lockstep::kernels::testing {
namespace {

struct Shape {
  int m, n, k;
};

// All three widths of x, partial tiles and chunks, parts of K of unequal size, fewer
// tiles than clusters, many tiles a cluster.
std::vector<Shape> Shapes() {
  if (SanitizerRun()) return {{2, 5, 512}, {16, 200, 1040}, {33, 130, 2048}};
  return {{2, 1, 256},       {5, 15, 512},      {8, 64, 1024},     {16, 131, 1040},
          {17, 130, 528},    {3, 4096, 1024},   {16, 4096, 4096},  {7, 1030, 1536},
          {33, 777, 2048},   {64, 4096, 3584},  {2, 6145, 4096},   {16, 6145, 4096},
          {32, 6145, 4096},  {64, 6145, 4096},  {9, 1999, 4736},   {31, 2050, 7168},
          {15, 8192, 8192},  {1, 1001, 11008},  {16, 4096, 14336}, {24, 5000, 14336},
          {48, 12000, 1024}, {16, 70001, 1024}, {64, 40000, 1024}};
}

// W: of weights and x; T: of outputs.
template <typename W_, typename T_>
struct Types {
  using W = W_;
  using T = T_;
};
template <typename P>
class SkinnyClusterTest : public ::testing::Test {};
using AllTypes =
    ::testing::Types<Types<__nv_bfloat16, __nv_bfloat16>, Types<__half, __half>,
                     Types<__nv_fp8_e4m3, __nv_bfloat16>, Types<__nv_fp8_e4m3, __half>>;
TYPED_TEST_SUITE(SkinnyClusterTest, AllTypes);

uint64_t seed = 1000;

// A case whose x has scales too, where it is e4m3.
template <typename W, typename T>
struct ClusterCase : Case<W, W> {
  ClusterCase(int m, int n, int k, int64_t x_pad = 0, int64_t out_pad = 0)
      : Case<W, W>(m, n, k, seed += 10, x_pad, out_pad),
        x_scales(sizeof(float) * m),
        out_bias(sizeof(T) * n) {
    std::vector<float> values;
    for (int row = 0; row < m; ++row) values.push_back(1e-3f + 1e-5f * static_cast<float>(row % 7));
    x_scales.Write(values);
    Fill(out_bias.get<T>(), n, seed + 3, 1.0f);
    this->Reference();
    if constexpr (sizeof(W) == 1) {
      for (int row = 0; row < m; ++row) {
        for (int i = 0; i < n; ++i) {
          this->expected[int64_t{row} * n + i] *= static_cast<double>(values[row]);
          // The tensor cores keep 13 bits or so below the largest product, of 512.
          this->allowed[int64_t{row} * n + i] *= static_cast<double>(values[row]) * 300;
        }
      }
    }
  }
  SkinnyClusterArgs Args() const {
    SkinnyClusterArgs args;
    args.weights = this->weights.get();
    args.type = TypeOf<W>();
    args.n = this->n;
    args.k = this->k;
    args.m = this->m;
    args.x = this->x.get();
    args.x_stride = this->x_stride;
    if (sizeof(W) == 1) {
      args.weight_scales = this->scale_data();
      args.x_scales = x_scales.template get<float>();
    }
    args.out_type = TypeOf<T>();
    args.out_stride = this->out_stride;
    return args;
  }
  Memory x_scales, out_bias;
};

TYPED_TEST(SkinnyClusterTest, StoresEveryRowOfEveryShape) {
  using W = typename TypeParam::W;
  using T = typename TypeParam::T;
  ASSERT_EQ(InitSkinnyCluster(), cudaSuccess);
  for (const Shape& shape : Shapes()) {
    ClusterCase<W, T> c(shape.m, shape.n, shape.k, 16, 3);
    for (int split : {0, 2, 4, 8}) {
      SCOPED_TRACE(std::to_string(shape.m) + " x " + std::to_string(shape.n) + " x " +
                   std::to_string(shape.k) + " by " + std::to_string(split));
      Memory out(sizeof(T) * shape.m * c.out_stride);
      SkinnyClusterArgs args = c.Args();
      args.out = out.get();
      args.split = split;
      if (!SkinnyClusterSupports(args)) {
        // Too much of x for a block, or of blocks for K.
        const int rows = shape.m <= 16 ? 16 : shape.m <= 32 ? 32 : 64;
        const int64_t part =
            int64_t{shape.k} * int64_t{sizeof(W)} / (split == 0 ? kMaxClusterSplit : split);
        EXPECT_TRUE(rows * part > 130'000 || part < kClusterChunk);
        continue;
      }
      EXPECT_CUDA(SkinnyCluster({}, args));
      EXPECT_CUDA(cudaDeviceSynchronize());
      ExpectOutputs<T>(c, args.epilogue, out, c.out_stride, shape.n);
      if (::testing::Test::HasFailure()) return;
    }
  }
}

TYPED_TEST(SkinnyClusterTest, AddsTheBias) {
  using W = typename TypeParam::W;
  using T = typename TypeParam::T;
  ASSERT_EQ(InitSkinnyCluster(), cudaSuccess);
  for (const Shape& shape : {Shape{16, 101, 1024}, {5, 1000, 4096}, {40, 200, 5120}}) {
    if (SanitizerRun() && shape.n > 300) continue;
    ClusterCase<W, T> c(shape.m, shape.n, shape.k);
    std::vector<float> bias;
    for (T b : c.out_bias.template Read<T>()) bias.push_back(static_cast<float>(b));
    Memory out(sizeof(T) * shape.m * shape.n);
    SkinnyClusterArgs args = c.Args();
    args.out = out.get();
    args.bias = c.out_bias.get();
    EXPECT_CUDA(SkinnyCluster({.pdl = true}, args));
    EXPECT_CUDA(cudaDeviceSynchronize());
    ExpectOutputs<T>(c, args.epilogue, out, shape.n, shape.n, bias);
  }
}

TYPED_TEST(SkinnyClusterTest, GatesRowPairs) {
  using W = typename TypeParam::W;
  using T = typename TypeParam::T;
  ASSERT_EQ(InitSkinnyCluster(), cudaSuccess);
  for (const Shape& shape : {Shape{3, 34, 512}, {16, 2050, 4096}, {64, 1200, 2048}}) {
    for (GemvEpilogue epilogue : {GemvEpilogue::kSiluGate, GemvEpilogue::kGeluGate}) {
      if (SanitizerRun() && shape.n > 300) continue;
      ClusterCase<W, T> c(shape.m, shape.n, shape.k);
      const int64_t stride = shape.n / 2 + 1;
      Memory out(sizeof(T) * shape.m * stride);
      SkinnyClusterArgs args = c.Args();
      args.epilogue = epilogue;
      args.out = out.get();
      args.out_stride = stride;
      EXPECT_CUDA(SkinnyCluster({}, args));
      EXPECT_CUDA(cudaDeviceSynchronize());
      ExpectOutputs<T>(c, epilogue, out, stride, shape.n / 2);
    }
  }
}

TYPED_TEST(SkinnyClusterTest, StoresLogits) {
  using W = typename TypeParam::W;
  using T = typename TypeParam::T;
  ASSERT_EQ(InitSkinnyCluster(), cudaSuccess);
  for (const Shape& shape : {Shape{2, 7, 512}, {16, 1003, 1024}, {64, 32064, 4096}}) {
    if (SanitizerRun() && shape.n > 2000) continue;
    ClusterCase<W, T> c(shape.m, shape.n, shape.k);
    Memory out(sizeof(float) * shape.m * shape.n);
    SkinnyClusterArgs args = c.Args();
    args.epilogue = GemvEpilogue::kLogits;
    args.out = out.get();
    EXPECT_CUDA(SkinnyCluster({}, args));
    EXPECT_CUDA(cudaDeviceSynchronize());
    ExpectOutputs<float>(c, args.epilogue, out, shape.n, shape.n);
  }
}

TYPED_TEST(SkinnyClusterTest, GivesARowTheSameBitsWhateverItsCompany) {
  using W = typename TypeParam::W;
  using T = typename TypeParam::T;
  ASSERT_EQ(InitSkinnyCluster(), cudaSuccess);
  for (const Shape& shape : {Shape{16, 300, 1024}, {32, 2000, 4096}, {64, 520, 4096}}) {
    if (SanitizerRun() && shape.k > 1024) continue;
    ClusterCase<W, T> c(shape.m, shape.n, shape.k);
    const auto run = [&](int m, int first) {
      Memory out(sizeof(float) * m * shape.n);
      SkinnyClusterArgs args = c.Args();
      args.epilogue = GemvEpilogue::kLogits;
      args.out = out.get();
      args.m = m;
      args.x = c.x.template get<W>() + first * c.x_stride;
      if (sizeof(W) == 1) args.x_scales += first;
      EXPECT_CUDA(SkinnyCluster({}, args));
      return out.Read<uint32_t>();
    };
    const std::vector<uint32_t> all = run(shape.m, 0);
    for (int fewer : {1, 2, 7}) {
      EXPECT_EQ(run(shape.m - fewer, fewer),
                std::vector<uint32_t>(all.begin() + int64_t{fewer} * shape.n, all.end()))
          << fewer << " rows fewer";
    }
    EXPECT_EQ(run(shape.m, 0), all);
  }
}

// x of 16 bits over weights of e4m3: against e4m3 of each block's part of a row, as it is to be
// quantised, in double.
template <typename T>
class SkinnyClusterStagingTest : public ::testing::Test {};
using OutputTypes = ::testing::Types<__nv_bfloat16, __half>;
TYPED_TEST_SUITE(SkinnyClusterStagingTest, OutputTypes);

// The product before its epilogue. allowed: by how much fp32 sums may miss it.
template <typename T>
struct StagedCase {
  StagedCase(int m, int n, int k, int split)
      : x_stride(k + 8),
        weights(size_t{1} * n * k),
        scales(sizeof(float) * n),
        x(sizeof(T) * m * x_stride),
        expected(size_t{1} * m * n),
        allowed(expected.size()) {
    Fill(weights.get<__nv_fp8_e4m3>(), int64_t{n} * k, seed += 10, 1.0f);
    Fill(x.get<T>(), m * x_stride, seed + 1, 3.0f);
    std::vector<float> factors;
    for (int i = 0; i < n; ++i) factors.push_back(1e-2f + 1e-4f * static_cast<float>(i % 11));
    scales.Write(factors);
    const std::vector<__nv_fp8_e4m3> w = weights.Read<__nv_fp8_e4m3>();
    const std::vector<T> rows = x.template Read<T>();
    std::vector<float> values(w.size());
    for (size_t i = 0; i < w.size(); ++i) values[i] = static_cast<float>(w[i]);
    const int chunks = (k + kClusterChunk - 1) / kClusterChunk;
    std::vector<float> quantized(k);
    for (int row = 0; row < m; ++row) {
      for (int part = 0; part < split; ++part) {
        const int begin = part * chunks / split * kClusterChunk;
        const int end = std::min(k, (part + 1) * chunks / split * kClusterChunk);
        float largest = 0.0f;
        for (int i = begin; i < end; ++i)
          largest = std::max(largest, std::fabs(static_cast<float>(rows[row * x_stride + i])));
        const float scale = largest / 448.0f, inverse = 1.0f / scale;
        for (int i = begin; i < end; ++i) {
          const __nv_fp8_e4m3 stored(static_cast<float>(rows[row * x_stride + i]) * inverse);
          quantized[i] = static_cast<float>(stored) * scale;
        }
      }
      for (int col = 0; col < n; ++col) {
        double sum = 0, magnitude = 0;
        for (int i = 0; i < k; ++i) {
          const double product =
              static_cast<double>(values[size_t{1} * col * k + i]) * quantized[i];
          sum += product;
          magnitude += std::fabs(product);
        }
        expected[int64_t{row} * n + col] = sum * factors[col];
        // The tensor cores keep 13 bits or so; what rounding x to e4m3 makes is 2^-4 of it.
        allowed[int64_t{row} * n + col] = magnitude * factors[col] * 0x1p-12;
      }
    }
  }
  SkinnyClusterArgs Args(int m, int n, int k) const {
    SkinnyClusterArgs args;
    args.weights = weights.get();
    args.type = Type::kE4M3;
    args.n = n;
    args.k = k;
    args.m = m;
    args.x = x.get();
    args.x_stride = x_stride;
    args.weight_scales = scales.get<float>();
    args.out_type = TypeOf<T>();
    return args;
  }
  int64_t x_stride;
  Memory weights, scales, x;
  std::vector<double> expected, allowed;
};

TYPED_TEST(SkinnyClusterStagingTest, QuantisesEachPartOfARow) {
  using T = TypeParam;
  ASSERT_EQ(InitSkinnyCluster(), cudaSuccess);
  int ran = 0;
  for (const Shape& shape : {Shape{2, 70, 256},
                             {5, 15, 512},
                             {16, 200, 1040},
                             {7, 130, 528},
                             {13, 300, 4096},
                             {1, 258, 4096},
                             {16, 140, 14336},
                             {15, 66, 7168}}) {
    if (SanitizerRun() && shape.k > 1040) continue;
    for (const int split : {2, 4, 8}) {
      SCOPED_TRACE(std::to_string(shape.m) + " x " + std::to_string(shape.n) + " x " +
                   std::to_string(shape.k) + " by " + std::to_string(split));
      const int part = (shape.k + split - 1) / split;
      StagedCase<T> c(shape.m, shape.n, shape.k, split);
      SkinnyClusterArgs args = c.Args(shape.m, shape.n, shape.k);
      Memory out(sizeof(float) * shape.m * shape.n);
      args.out = out.get();
      args.split = split;
      args.epilogue = GemvEpilogue::kLogits;
      if (!SkinnyClusterSupports(args)) {
        EXPECT_TRUE(part > kMaxStagedChunks * kClusterChunk || part < kClusterChunk);
        continue;
      }
      ++ran;
      EXPECT_CUDA(SkinnyCluster({.pdl = true}, args));
      EXPECT_CUDA(cudaDeviceSynchronize());
      const std::vector<float> got = out.Read<float>();
      for (size_t i = 0; i < got.size(); ++i)
        ASSERT_LE(std::fabs(got[i] - c.expected[i]), c.allowed[i]) << "at " << i;
      EXPECT_TRUE(out.GuardsIntact());
    }
  }
  EXPECT_GE(ran, SanitizerRun() ? 8 : 15);
}

TYPED_TEST(SkinnyClusterStagingTest, GatesAndKeepsARowsBits) {
  using T = TypeParam;
  ASSERT_EQ(InitSkinnyCluster(), cudaSuccess);
  const int m = 16, n = 260, k = 1024, stride = n / 2 + 3;
  StagedCase<T> c(m, n, k, 4);
  SkinnyClusterArgs args = c.Args(m, n, k);
  args.split = 4;
  args.epilogue = GemvEpilogue::kSiluGate;
  args.out_stride = stride;
  const auto run = [&](int rows, int first) {
    Memory out(sizeof(T) * rows * stride);
    SkinnyClusterArgs some = args;
    some.m = rows;
    some.x = c.x.template get<T>() + first * c.x_stride;
    some.out = out.get();
    EXPECT_CUDA(SkinnyCluster({}, some));
    EXPECT_CUDA(cudaDeviceSynchronize());
    EXPECT_TRUE(out.GuardsIntact());
    return out.template Read<T>();
  };
  const std::vector<T> all = run(m, 0), few = run(3, 13);
  for (int row = 0; row < m; ++row) {
    for (int i = 0; i < n / 2; ++i) {
      const double gate = c.expected[row * n + 2 * i], up = c.expected[row * n + 2 * i + 1];
      const double want = gate / (1 + std::exp(-gate)) * up, got = all[row * stride + i];
      const double slack = c.allowed[row * n + 2 * i] * 1.2 * std::fabs(up) +
                           c.allowed[row * n + 2 * i + 1] * std::fabs(gate);
      ASSERT_LE(std::fabs(got - want), 1.1 * slack + HalfUlp<T>() * 1.1 * std::fabs(want) + 1e-5)
          << row << ", " << i;
      if (row >= 13) ASSERT_EQ(static_cast<float>(few[(row - 13) * stride + i]), got);
    }
  }
}

// What is not finite stays so, in its own row.
TYPED_TEST(SkinnyClusterStagingTest, HidesNoNaN) {
  using T = TypeParam;
  ASSERT_EQ(InitSkinnyCluster(), cudaSuccess);
  StagedCase<T> c(3, 64, 512, 2);
  std::vector<T> rows = c.x.template Read<T>();
  rows[1 * c.x_stride + 300] = static_cast<T>(INFINITY);
  rows[2 * c.x_stride + 20] = static_cast<T>(NAN);
  c.x.Write(rows);
  Memory out(sizeof(float) * 3 * 64);
  SkinnyClusterArgs args = c.Args(3, 64, 512);
  args.out = out.get();
  args.epilogue = GemvEpilogue::kLogits;
  EXPECT_CUDA(SkinnyCluster({}, args));
  EXPECT_CUDA(cudaDeviceSynchronize());
  const std::vector<float> got = out.Read<float>();
  for (int i = 0; i < 3 * 64; ++i) EXPECT_EQ(std::isfinite(got[i]), i < 64) << i;
}

// A chain of products, each of which reads what the one before wrote.
TEST(SkinnyClusterChainTest, WaitsForTheProductBefore) {
  ASSERT_EQ(InitSkinnyCluster(), cudaSuccess);
  using T = __nv_bfloat16;
  const int length = SanitizerRun() ? 6 : 200;
  for (int width : {256, 2048, 8192}) {
    if (SanitizerRun() && width > 256) continue;
    ClusterCase<T, T> c(12, width, width);
    // The values neither grow nor vanish.
    Fill(c.weights.get<T>(), int64_t{width} * width, 78, std::sqrt(3.0f / width));
    const size_t bytes = size_t{2} * 12 * width;
    Memory a(bytes), b(bytes), start(bytes);
    EXPECT_CUDA(cudaMemcpy(start.get(), c.x.get(), bytes, cudaMemcpyDeviceToDevice));
    cudaStream_t stream = nullptr;
    EXPECT_CUDA(cudaStreamCreate(&stream));
    std::vector<std::vector<uint16_t>> results;
    for (bool pdl : {false, true, true}) {
      EXPECT_CUDA(cudaMemcpyAsync(a.get(), start.get(), bytes, cudaMemcpyDeviceToDevice, stream));
      for (int i = 0; i < length; ++i) {
        SkinnyClusterArgs args = c.Args();
        args.x = (i % 2 == 0 ? a : b).get();
        args.out = (i % 2 == 0 ? b : a).get();
        EXPECT_CUDA(SkinnyCluster({stream, pdl}, args));
      }
      EXPECT_CUDA(cudaStreamSynchronize(stream));
      results.push_back(a.Read<uint16_t>());
    }
    EXPECT_EQ(results[1], results[0]) << width;
    EXPECT_EQ(results[2], results[0]) << width;
    EXPECT_CUDA(cudaStreamDestroy(stream));
  }
}

TEST(SkinnyClusterArgsTest, RefusesWhatItCannotDo) {
  ASSERT_EQ(InitSkinnyCluster(), cudaSuccess);
  ClusterCase<__nv_bfloat16, __nv_bfloat16> c(4, 64, 1024);
  Memory out(sizeof(__nv_bfloat16) * 4 * 64);
  SkinnyClusterArgs args = c.Args();
  args.out = out.get();
  ASSERT_TRUE(SkinnyClusterSupports(args));
  const auto refused = [&](auto change) {
    SkinnyClusterArgs changed = args;
    change(changed);
    return !SkinnyClusterSupports(changed) && SkinnyCluster({}, changed) == cudaErrorInvalidValue;
  };
  EXPECT_TRUE(refused([](SkinnyClusterArgs& a) { a.m = 65; }));
  EXPECT_TRUE(refused([](SkinnyClusterArgs& a) { a.m = 0; }));
  EXPECT_TRUE(refused([](SkinnyClusterArgs& a) { a.k = 1020; }));
  EXPECT_TRUE(refused([](SkinnyClusterArgs& a) { a.out_type = Type::kF16; }));
  EXPECT_TRUE(refused([](SkinnyClusterArgs& a) { a.type = Type::kE4M3; }));
  StagedCase<__nv_bfloat16> staged(17, 16, 256, 2);
  args = staged.Args(16, 16, 256);
  args.out = out.get();
  ASSERT_TRUE(SkinnyClusterSupports(args));
  EXPECT_TRUE(refused([](SkinnyClusterArgs& a) { a.m = 17; }));
  EXPECT_TRUE(refused([](SkinnyClusterArgs& a) { a.x_stride = 260; }));
  args = c.Args();
  args.out = out.get();
  EXPECT_TRUE(refused([](SkinnyClusterArgs& a) { a.epilogue = GemvEpilogue::kPush; }));
  EXPECT_TRUE(
      refused([](SkinnyClusterArgs& a) { a.weights = static_cast<const char*>(a.weights) + 2; }));
}

}  // namespace
}  // namespace lockstep::kernels::testing
