// The product with 2..16 rows.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "kernels/gemv.h"
#include "tests/kernels/gemv_case.cuh"

namespace lockstep::kernels::testing {
namespace {

struct Shape {
  int m, n, k;
};

// One phase of K and several, parts of unequal size, partial tiles, fewer tiles than
// blocks, more than one group of tiles.
std::vector<Shape> Shapes() {
  if (SanitizerRun()) return {{2, 5, 64}, {9, 135, 1024}, {16, 40, 8192}};
  return {{2, 1, 64},       {5, 15, 128},     {8, 17, 192},     {16, 131, 576},   {3, 4096, 1024},
          {16, 4096, 1024}, {7, 1030, 1536},  {4, 777, 2048},   {16, 4096, 3584}, {2, 6145, 4096},
          {16, 6145, 4096}, {9, 1999, 4736},  {8, 2050, 7168},  {15, 8192, 8192}, {12, 1001, 11008},
          {6, 4096, 14336}, {16, 263, 18944}, {16, 400, 28672}, {8, 135, 32768},  {16, 70001, 896},
          {2, 40000, 8192}};
}

template <typename P>
class SkinnyTest : public ::testing::Test {};
template <typename W_, typename T_>
struct Types {
  using W = W_;
  using T = T_;
};
using AllTypes =
    ::testing::Types<Types<__nv_bfloat16, __nv_bfloat16>, Types<__half, __half>,
                     Types<__nv_fp8_e4m3, __nv_bfloat16>, Types<__nv_fp8_e4m3, __half>>;
TYPED_TEST_SUITE(SkinnyTest, AllTypes);

uint64_t seed = 1;

TYPED_TEST(SkinnyTest, StoresEveryRowOfEveryShape) {
  using W = typename TypeParam::W;
  using T = typename TypeParam::T;
  ASSERT_EQ(InitGemv(), cudaSuccess);
  for (const Shape& shape : Shapes()) {
    SCOPED_TRACE(std::to_string(shape.m) + " x " + std::to_string(shape.n) + " x " +
                 std::to_string(shape.k));
    Case<W, T> c(shape.m, shape.n, shape.k, seed += 10, 8, 3);
    c.Reference();
    Memory out(sizeof(T) * shape.m * c.out_stride);
    GemvArgs args = c.Args();
    args.out = out.get();
    ASSERT_TRUE(GemvSupports(args));
    EXPECT_CUDA(Gemv({}, args));
    EXPECT_CUDA(cudaDeviceSynchronize());
    ExpectOutputs<T>(c, args.epilogue, out, c.out_stride, shape.n);
    if (::testing::Test::HasFailure()) return;
  }
}

TYPED_TEST(SkinnyTest, AddsTheBias) {
  using W = typename TypeParam::W;
  using T = typename TypeParam::T;
  ASSERT_EQ(InitGemv(), cudaSuccess);
  for (const Shape& shape : {Shape{16, 101, 1024}, {5, 1000, 4096}, {3, 200, 5120}}) {
    if (SanitizerRun() && shape.n > 300) continue;
    Case<W, T> c(shape.m, shape.n, shape.k, seed += 10);
    c.Reference();
    std::vector<float> bias;
    for (T b : c.bias.template Read<T>()) bias.push_back(static_cast<float>(b));
    Memory out(sizeof(T) * shape.m * shape.n);
    GemvArgs args = c.Args();
    args.out = out.get();
    args.bias = c.bias.get();
    args.max_blocks = 9;
    EXPECT_CUDA(Gemv({.pdl = true}, args));
    EXPECT_CUDA(cudaDeviceSynchronize());
    ExpectOutputs<T>(c, args.epilogue, out, shape.n, shape.n, bias);
  }
}

// Rows of x, and parts of a row, of very different sizes.
TYPED_TEST(SkinnyTest, KeepsSmallRowsExact) {
  using W = typename TypeParam::W;
  using T = typename TypeParam::T;
  ASSERT_EQ(InitGemv(), cudaSuccess);
  for (int k : {1024, 16384}) {
    if (SanitizerRun() && k > 1024) continue;
    Case<W, T> c(16, 96, k, seed += 10);
    std::vector<T> x = c.x.template Read<T>();
    const bool wide = std::is_same_v<T, __nv_bfloat16>;
    for (int row = 0; row < 16; ++row) {
      for (int i = 0; i < k; ++i) {
        const int power = wide ? (row - 8) * 8 + i / 256 % 5 * 4 - 8 : -(row % 4);
        T& v = x[row * c.x_stride + i];
        v = T(std::ldexp(static_cast<float>(v), row == 3 ? -200 : power));
      }
    }
    c.x.Write(x);
    c.Reference();
    Memory out(sizeof(float) * 16 * 96);
    GemvArgs args = c.Args();
    args.epilogue = GemvEpilogue::kLogits;
    args.out = out.get();
    EXPECT_CUDA(Gemv({}, args));
    EXPECT_CUDA(cudaDeviceSynchronize());
    ExpectOutputs<float>(c, args.epilogue, out, 96, 96);
  }
}

TYPED_TEST(SkinnyTest, GatesRowPairs) {
  using W = typename TypeParam::W;
  using T = typename TypeParam::T;
  ASSERT_EQ(InitGemv(), cudaSuccess);
  for (const Shape& shape : {Shape{3, 34, 256}, {16, 2050, 4096}, {8, 1200, 8192}}) {
    for (GemvEpilogue epilogue : {GemvEpilogue::kSiluGate, GemvEpilogue::kGeluGate}) {
      if (SanitizerRun() && shape.n > 300) continue;
      Case<W, T> c(shape.m, shape.n, shape.k, seed += 10);
      c.Reference();
      const int64_t stride = shape.n / 2 + 1;
      Memory out(sizeof(T) * shape.m * stride);
      GemvArgs args = c.Args();
      args.epilogue = epilogue;
      args.out = out.get();
      args.out_stride = stride;
      EXPECT_CUDA(Gemv({}, args));
      EXPECT_CUDA(cudaDeviceSynchronize());
      ExpectOutputs<T>(c, epilogue, out, stride, shape.n / 2);
    }
  }
}

TYPED_TEST(SkinnyTest, NamesTheLargestLogitOfEachRow) {
  using W = typename TypeParam::W;
  using T = typename TypeParam::T;
  ASSERT_EQ(InitGemv(), cudaSuccess);
  for (const Shape& shape :
       {Shape{2, 7, 256}, {16, 1003, 1024}, {7, 32064, 4096}, {9, 3001, 8192}}) {
    if (SanitizerRun() && shape.n > 2000) continue;
    Case<W, T> c(shape.m, shape.n, shape.k, seed += 10);
    c.Reference();
    Memory out(sizeof(float) * shape.m * shape.n);
    GemvArgs args = c.Args();
    args.epilogue = GemvEpilogue::kLogits;
    args.out = out.get();
    args.first_id = 5000;
    const int count = GemvKeys(args);
    Memory keys(sizeof(uint64_t) * shape.m * count);
    args.keys = keys.get<uint64_t>();
    EXPECT_CUDA(Gemv({}, args));
    EXPECT_CUDA(cudaDeviceSynchronize());
    const std::vector<float> logits = ExpectOutputs<float>(c, args.epilogue, out, shape.n, shape.n);
    EXPECT_TRUE(keys.GuardsIntact());
    const std::vector<uint64_t> all = keys.Read<uint64_t>();
    for (int row = 0; row < shape.m; ++row) {
      const auto begin = logits.begin() + int64_t{row} * shape.n;
      const auto largest = std::max_element(begin, begin + shape.n);
      const auto key = std::max_element(all.begin() + row * count, all.begin() + (row + 1) * count);
      EXPECT_EQ(static_cast<int64_t>(GemvKeyId(*key)), 5000 + (largest - begin)) << "row " << row;
    }
    // Poison stays in its row.
    const T bad(std::numeric_limits<float>::infinity());
    EXPECT_CUDA(
        cudaMemcpy(c.x.template get<T>() + c.x_stride, &bad, sizeof(T), cudaMemcpyHostToDevice));
    EXPECT_CUDA(Gemv({}, args));
    EXPECT_CUDA(cudaDeviceSynchronize());
    const std::vector<uint64_t> after = keys.Read<uint64_t>();
    for (int row = 0; row < shape.m; ++row) {
      const auto key =
          std::max_element(after.begin() + row * count, after.begin() + (row + 1) * count);
      EXPECT_EQ(*key == kPoisonedKey, row == 1) << "row " << row;
    }
  }
}

TYPED_TEST(SkinnyTest, GivesARowTheSameBitsWhateverItsCompany) {
  using W = typename TypeParam::W;
  using T = typename TypeParam::T;
  ASSERT_EQ(InitGemv(), cudaSuccess);
  for (const Shape& shape : {Shape{16, 300, 1024}, {16, 2000, 4096}, {16, 520, 14336}}) {
    if (SanitizerRun() && shape.k > 1024) continue;
    Case<W, T> c(16, shape.n, shape.k, seed += 10);
    const auto run = [&](int m, int first, int blocks) {
      Memory out(sizeof(float) * m * shape.n);
      GemvArgs args = c.Args();
      args.epilogue = GemvEpilogue::kLogits;
      args.out = out.get();
      args.m = m;
      args.x = c.x.template get<T>() + first * c.x_stride;
      args.max_blocks = blocks;
      EXPECT_CUDA(Gemv({}, args));
      return out.Read<uint32_t>();
    };
    const std::vector<uint32_t> all = run(16, 0, 0);
    for (int m : {2, 3, 8, 9, 15}) {
      const int first = 16 - m;
      EXPECT_EQ(run(m, first, m * 8),
                std::vector<uint32_t>(all.begin() + int64_t{first} * shape.n, all.end()))
          << m << " rows";
    }
    EXPECT_EQ(run(16, 0, 0), all);
  }
}

// A chain of products, each of which reads what the one before wrote.
TEST(SkinnyChainTest, WaitsForTheProductBefore) {
  ASSERT_EQ(InitGemv(), cudaSuccess);
  const int length = SanitizerRun() ? 6 : 200;
  for (int width : {256, 2048, 8192}) {
    if (SanitizerRun() && width > 256) continue;
    Case<__nv_bfloat16, __nv_bfloat16> c(5, width, width, 77);
    // The values neither grow nor vanish.
    Fill(c.weights.get<__nv_bfloat16>(), int64_t{width} * width, 78, std::sqrt(3.0f / width));
    const size_t bytes = size_t{2} * 5 * width;
    Memory a(bytes), b(bytes), start(bytes);
    EXPECT_CUDA(cudaMemcpy(start.get(), c.x.get(), bytes, cudaMemcpyDeviceToDevice));
    cudaStream_t stream = nullptr;
    EXPECT_CUDA(cudaStreamCreate(&stream));
    std::vector<std::vector<uint16_t>> results;
    for (bool pdl : {false, true, true}) {
      EXPECT_CUDA(cudaMemcpyAsync(a.get(), start.get(), bytes, cudaMemcpyDeviceToDevice, stream));
      for (int i = 0; i < length; ++i) {
        GemvArgs args = c.Args();
        args.x = (i % 2 == 0 ? a : b).get();
        args.out = (i % 2 == 0 ? b : a).get();
        EXPECT_CUDA(Gemv({stream, pdl}, args));
      }
      EXPECT_CUDA(cudaStreamSynchronize(stream));
      results.push_back(a.Read<uint16_t>());
    }
    EXPECT_EQ(results[1], results[0]) << width;
    EXPECT_EQ(results[2], results[0]) << width;
    EXPECT_CUDA(cudaStreamDestroy(stream));
  }
}

}  // namespace
}  // namespace lockstep::kernels::testing
