#include "kernels/fill.h"
#include "tests/kernels/device_rows.h"

namespace lockstep::kernels {
namespace {

// worker/weights.cc's, whose values these must be.
float UniformAt(uint64_t stream, uint64_t index) {
  uint64_t z = stream + (index + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<float>(static_cast<int64_t>(z >> 40) - (1 << 23)) * 0x1p-23f;
}

template <typename T>
class FillTest : public testing::Test {};
using Types = testing::Types<float, __half, __nv_bfloat16, __nv_fp8_e4m3>;
TYPED_TEST_SUITE(FillTest, Types);

struct Part {
  int64_t rows, cols, global_cols, first_row, first_col, row_stride;
  int shift;
};

TYPED_TEST(FillTest, EveryShardHoldsTheWholeTensorsValues) {
  using T = TypeParam;
  const Part parts[] = {
      {1, 1, 1, 0, 0, 1, 0},         {7, 96, 96, 0, 0, 96, 0},
      {5, 100, 300, 3, 100, 100, 0}, {64, 2048, 4096, 64, 2048, 4096, 0},
      {3, 33, 40, 9, 7, 50, 1},      {16, 64, 64, 1 << 20, 0, 64, 0},
  };
  for (const Part& p : parts) {
    const uint64_t key = 0x1234567890abcdefu + static_cast<uint64_t>(p.rows);
    const float center = 0.5f, width = 0.3f, scale = sizeof(T) == 1 ? 0.0017f : 1.0f;
    const int64_t n = (p.rows - 1) * p.row_stride + p.cols;
    const DeviceRows<T> out(n, p.shift);
    FillUniformArgs args = {.type = TypeOf<T>(),
                            .key = key,
                            .center = center,
                            .width = width,
                            .scale = scale,
                            .first_row = p.first_row,
                            .first_col = p.first_col,
                            .global_cols = p.global_cols,
                            .rows = p.rows,
                            .cols = p.cols,
                            .out = out.get(),
                            .row_stride = p.row_stride};
    ASSERT_CUDA(FillUniform({}, args));
    ASSERT_CUDA(cudaDeviceSynchronize());
    out.ExpectGuards("weights");
    const std::vector<T> got = out.Bits();
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = i / p.row_stride, col = i % p.row_stride;
      if (col >= p.cols) {
        ASSERT_TRUE(DeviceRows<T>::Untouched(got[i])) << row << ", " << col;
        continue;
      }
      const uint64_t index = (p.first_row + row) * p.global_cols + p.first_col + col;
      const volatile float product = width * UniformAt(key, index);  // rounded by itself
      float want = center + product;
      if (sizeof(T) == 1) want *= 1.0f / scale;
      ASSERT_EQ(HostFloat(got[i]), HostRounded<T>(want)) << row << ", " << col;
    }
  }
}

TYPED_TEST(FillTest, FillsWithAConstant) {
  using T = TypeParam;
  for (const int64_t count : {1, 15, 16, 1000, 70001}) {
    for (const int shift : {0, 1}) {
      const DeviceRows<T> out(count, shift);
      ASSERT_CUDA(FillConstant({}, TypeOf<T>(), out.get(), count, 0.7f));
      ASSERT_CUDA(cudaDeviceSynchronize());
      out.ExpectGuards("constants");
      for (const float v : out.Values()) ASSERT_EQ(v, HostRounded<T>(0.7f));
    }
  }
}

TYPED_TEST(FillTest, InterleavesRows) {
  using T = TypeParam;
  const int rows = 5, cols = 37;
  const std::vector<float> gate = RandomValues<T>(rows * cols, 1);
  const std::vector<float> up = RandomValues<T>(rows * cols, 2);
  const DeviceRows<T> device_gate(gate), device_up(up), out(2 * rows * cols);
  ASSERT_CUDA(
      InterleaveRows({}, TypeOf<T>(), device_gate.get(), device_up.get(), rows, cols, out.get()));
  ASSERT_CUDA(cudaDeviceSynchronize());
  out.ExpectGuards("interleaved");
  const std::vector<float> got = out.Values();
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < cols; ++c) {
      ASSERT_EQ(got[2 * r * cols + c], gate[r * cols + c]);
      ASSERT_EQ(got[(2 * r + 1) * cols + c], up[r * cols + c]);
    }
  }
}

TEST(FillLimits, RefusesAShardOutsideItsTensor) {
  const DeviceRows<float> out(16);
  FillUniformArgs args = {.type = Type::kF32,
                          .global_cols = 8,
                          .rows = 2,
                          .cols = 8,
                          .out = out.get(),
                          .row_stride = 8};
  args.first_col = 1;
  EXPECT_EQ(FillUniform({}, args), cudaErrorInvalidValue);
  args.first_col = 0;
  args.row_stride = 7;
  EXPECT_EQ(FillUniform({}, args), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace lockstep::kernels
