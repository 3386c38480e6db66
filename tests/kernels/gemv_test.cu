// The product with one row: kernels/gemv.h with m == 1, without the exchange.
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
  int n, k;
};

// Every split of K over warps, every capacity, K that is not a multiple of anything
// but 16, fewer rows than blocks, more rows than wait for one epilogue.
std::vector<Shape> Shapes() {
  if (SanitizerRun()) return {{5, 16}, {134, 1024}, {300, 4096}, {70, 11008}};
  return {{1, 16},      {3, 256},     {131, 512},   {133, 1008},   {4096, 1024},
          {1030, 1536}, {777, 2048},  {4096, 3584}, {6145, 4096},  {4099, 4736},
          {2050, 7168}, {1001, 8192}, {520, 11008}, {4096, 14336}, {263, 18944},
          {400, 28672}, {135, 32768}, {70001, 896}, {128256, 2048}};
}

template <typename P>
class GemvTest : public ::testing::Test {};
template <typename W_, typename T_>
struct Types {
  using W = W_;
  using T = T_;
};
using AllTypes =
    ::testing::Types<Types<__nv_bfloat16, __nv_bfloat16>, Types<__half, __half>,
                     Types<__nv_fp8_e4m3, __nv_bfloat16>, Types<__nv_fp8_e4m3, __half>>;
TYPED_TEST_SUITE(GemvTest, AllTypes);

uint64_t seed = 1;

TYPED_TEST(GemvTest, StoresEveryRowOfEveryShape) {
  using W = typename TypeParam::W;
  using T = typename TypeParam::T;
  ASSERT_EQ(InitGemv(), cudaSuccess);
  for (const Shape& shape : Shapes()) {
    SCOPED_TRACE(std::to_string(shape.n) + " x " + std::to_string(shape.k));
    Case<W, T> c(1, shape.n, shape.k, seed += 10);
    c.Reference();
    Memory out(sizeof(T) * shape.n);
    GemvArgs args = c.Args();
    args.out = out.get();
    ASSERT_TRUE(GemvSupports(args));
    EXPECT_CUDA(Gemv({}, args));
    EXPECT_CUDA(cudaDeviceSynchronize());
    ExpectOutputs<T>(c, args.epilogue, out, shape.n, shape.n);
    // With a bias, dependent on the launch before, on few blocks: the same sums.
    std::vector<float> bias;
    for (T b : c.bias.template Read<T>()) bias.push_back(static_cast<float>(b));
    Memory biased(sizeof(T) * shape.n);
    args.out = biased.get();
    args.bias = c.bias.get();
    args.max_blocks = 7;
    EXPECT_CUDA(Gemv({.pdl = true}, args));
    EXPECT_CUDA(cudaDeviceSynchronize());
    ExpectOutputs<T>(c, args.epilogue, biased, shape.n, shape.n, bias);
    if (::testing::Test::HasFailure()) return;
  }
}

TYPED_TEST(GemvTest, GatesRowPairs) {
  using W = typename TypeParam::W;
  using T = typename TypeParam::T;
  ASSERT_EQ(InitGemv(), cudaSuccess);
  for (const Shape& shape : {Shape{2, 256}, {266, 1024}, {2050, 4096}, {1200, 3584}}) {
    for (GemvEpilogue epilogue : {GemvEpilogue::kSiluGate, GemvEpilogue::kGeluGate}) {
      if (SanitizerRun() && shape.n > 300) continue;
      Case<W, T> c(1, shape.n, shape.k, seed += 10);
      c.Reference();
      Memory out(sizeof(T) * shape.n / 2);
      GemvArgs args = c.Args();
      args.epilogue = epilogue;
      args.out = out.get();
      EXPECT_CUDA(Gemv({}, args));
      EXPECT_CUDA(cudaDeviceSynchronize());
      ExpectOutputs<T>(c, epilogue, out, shape.n / 2, shape.n / 2);
    }
  }
}

TYPED_TEST(GemvTest, NormsWhatItReads) {
  using W = typename TypeParam::W;
  using T = typename TypeParam::T;
  ASSERT_EQ(InitGemv(), cudaSuccess);
  for (const Shape& shape :
       {Shape{130, 896}, {300, 1024}, {267, 4096}, {900, 8192}, {140, 16384}}) {
    for (bool plus_one : {false, true}) {
      if (SanitizerRun() && shape.k > 1024) continue;
      Case<W, T> c(1, shape.n, shape.k, seed += 10);
      Memory weight(sizeof(T) * shape.k), normed(sizeof(T) * shape.k);
      Fill(weight.get<T>(), shape.k, seed + 5, 1.5f);
      const std::vector<T> x = c.x.template Read<T>(), w = weight.Read<T>();
      double squares = 0;
      for (T v : x) squares += std::pow(static_cast<double>(static_cast<float>(v)), 2);
      const double scale = 1 / std::sqrt(squares / shape.k + 1e-3);
      std::vector<T> wanted(shape.k);
      for (int i = 0; i < shape.k; ++i) {
        wanted[i] =
            T(static_cast<float>(static_cast<double>(static_cast<float>(x[i])) * scale *
                                 (static_cast<double>(static_cast<float>(w[i])) + plus_one)));
      }
      normed.Write(wanted);
      c.Reference(normed.get<T>());
      for (double& v : c.allowed) v *= 3;  // elements rounded the other way
      Memory out(sizeof(T) * shape.n);
      GemvArgs args = c.Args();
      args.prologue = GemvPrologue::kRmsNorm;
      args.norm_weight = weight.get();
      args.norm_eps = 1e-3f;
      args.norm_plus_one = plus_one;
      args.out = out.get();
      ASSERT_TRUE(GemvSupports(args)) << shape.k;
      EXPECT_CUDA(Gemv({}, args));
      EXPECT_CUDA(cudaDeviceSynchronize());
      ExpectOutputs<T>(c, args.epilogue, out, shape.n, shape.n);
    }
  }
}

// The id that a row of keys names.
int Best(const std::vector<uint64_t>& keys) {
  return static_cast<int>(GemvKeyId(*std::max_element(keys.begin(), keys.end())));
}

TYPED_TEST(GemvTest, NamesTheLargestLogit) {
  using W = typename TypeParam::W;
  using T = typename TypeParam::T;
  ASSERT_EQ(InitGemv(), cudaSuccess);
  for (const Shape& shape : {Shape{7, 256}, {1003, 1024}, {32064, 4096}}) {
    if (SanitizerRun() && shape.n > 2000) continue;
    Case<W, T> c(1, shape.n, shape.k, seed += 10);
    c.Reference();
    Memory out(sizeof(float) * shape.n);
    GemvArgs args = c.Args();
    args.epilogue = GemvEpilogue::kLogits;
    args.out = out.get();
    args.first_id = 5000;
    Memory keys(sizeof(uint64_t) * GemvKeys(args));
    args.keys = keys.get<uint64_t>();
    EXPECT_CUDA(Gemv({}, args));
    EXPECT_CUDA(cudaDeviceSynchronize());
    const std::vector<float> logits = ExpectOutputs<float>(c, args.epilogue, out, shape.n, shape.n);
    EXPECT_TRUE(keys.GuardsIntact());
    const auto largest = std::max_element(logits.begin(), logits.end());
    EXPECT_EQ(Best(keys.Read<uint64_t>()), 5000 + (largest - logits.begin()));

    // All equal: the lowest id. And the keys do not need the logits.
    EXPECT_CUDA(cudaMemset(c.x.get(), 0, c.x.bytes()));
    args.out = nullptr;
    EXPECT_CUDA(Gemv({}, args));
    EXPECT_CUDA(cudaDeviceSynchronize());
    EXPECT_EQ(Best(keys.Read<uint64_t>()), 5000);

    const T bad(std::numeric_limits<float>::infinity());
    EXPECT_CUDA(cudaMemcpy(c.x.get(), &bad, sizeof(T), cudaMemcpyHostToDevice));
    EXPECT_CUDA(Gemv({}, args));
    EXPECT_CUDA(cudaDeviceSynchronize());
    const std::vector<uint64_t> poisoned = keys.Read<uint64_t>();
    EXPECT_EQ(*std::max_element(poisoned.begin(), poisoned.end()), kPoisonedKey);
  }
}

TYPED_TEST(GemvTest, GivesTheSameBitsEveryTime) {
  using W = typename TypeParam::W;
  using T = typename TypeParam::T;
  ASSERT_EQ(InitGemv(), cudaSuccess);
  Case<W, T> c(1, 2000, 4096, seed += 10);
  Memory out(sizeof(float) * c.n);
  GemvArgs args = c.Args();
  args.epilogue = GemvEpilogue::kLogits;
  args.out = out.get();
  EXPECT_CUDA(Gemv({}, args));
  const std::vector<uint32_t> first = out.Read<uint32_t>();
  for (int blocks : {1, 50, 131, 0}) {
    args.max_blocks = blocks;
    EXPECT_CUDA(Gemv({}, args));
    EXPECT_EQ(out.Read<uint32_t>(), first) << blocks;
  }
}

// A chain of products, each of which reads what the one before wrote, launched so
// that they overlap; and the same one after the other.
TEST(GemvChainTest, WaitsForTheProductBefore) {
  ASSERT_EQ(InitGemv(), cudaSuccess);
  const int width = SanitizerRun() ? 256 : 2048, length = SanitizerRun() ? 6 : 200;
  Case<__nv_bfloat16, __nv_bfloat16> c(1, width, width, 77);
  // The values neither grow nor vanish.
  Fill(c.weights.get<__nv_bfloat16>(), int64_t{width} * width, 78, std::sqrt(3.0f / width));
  Memory a(2 * width), b(2 * width), start(2 * width);
  EXPECT_CUDA(cudaMemcpy(start.get(), c.x.get(), 2 * width, cudaMemcpyDeviceToDevice));
  cudaStream_t stream = nullptr;
  EXPECT_CUDA(cudaStreamCreate(&stream));
  std::vector<std::vector<uint16_t>> results;
  for (bool pdl : {false, true, true}) {
    EXPECT_CUDA(cudaMemcpyAsync(a.get(), start.get(), 2 * width, cudaMemcpyDeviceToDevice, stream));
    for (int i = 0; i < length; ++i) {
      GemvArgs args = c.Args();
      args.x = (i % 2 == 0 ? a : b).get();
      args.out = (i % 2 == 0 ? b : a).get();
      EXPECT_CUDA(Gemv({stream, pdl}, args));
    }
    EXPECT_CUDA(cudaStreamSynchronize(stream));
    results.push_back(a.Read<uint16_t>());
  }
  EXPECT_EQ(results[1], results[0]);
  EXPECT_EQ(results[2], results[0]);
  EXPECT_CUDA(cudaStreamDestroy(stream));
}

TEST(GemvSupportsTest, RefusesWhatItCannotDo) {
  static uint64_t memory[4];
  const GemvArgs good = {.weights = memory, .n = 64, .k = 4096, .x = memory, .out = memory};
  EXPECT_TRUE(GemvSupports(good));
  const auto refused = [&](auto change) {
    GemvArgs args = good;
    change(args);
    EXPECT_EQ(Gemv({}, args), cudaErrorInvalidValue);
    return !GemvSupports(args);
  };
  EXPECT_TRUE(refused([](GemvArgs& a) { a.type = a.weight_type = Type::kF32; }));
  EXPECT_TRUE(refused([](GemvArgs& a) { a.type = Type::kF16; }));
  EXPECT_TRUE(refused([](GemvArgs& a) { a.weight_type = Type::kE4M3; }));  // no scales
  EXPECT_TRUE(refused([](GemvArgs& a) { a.k = 4100; }));
  EXPECT_TRUE(refused([](GemvArgs& a) { a.k = 32768 + 256; }));
  EXPECT_TRUE(refused([](GemvArgs& a) { a.m = 17; }));
  EXPECT_TRUE(refused([](GemvArgs& a) { a.m = 2, a.k = 4104; }));
  EXPECT_TRUE(refused([](GemvArgs& a) { a.m = 2, a.prologue = GemvPrologue::kRmsNorm; }));
  EXPECT_TRUE(refused([](GemvArgs& a) { a.n = 63, a.epilogue = GemvEpilogue::kSiluGate; }));
  EXPECT_TRUE(refused([](GemvArgs& a) { a.epilogue = GemvEpilogue::kPush; }));
  EXPECT_TRUE(refused([](GemvArgs& a) { a.prologue = GemvPrologue::kReduce; }));
  EXPECT_TRUE(refused([](GemvArgs& a) { a.weights = reinterpret_cast<char*>(memory) + 8; }));
}

}  // namespace
}  // namespace lockstep::kernels::testing
