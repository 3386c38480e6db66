// Products by cuBLASLt, whole and left in parts, against sums in double.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/kernels/device_rows.h"
#include "worker/backend/cuda/lt_matmul.h"

namespace lockstep::cuda {
namespace {

using kernels::DeviceRows;
using kernels::kProductParts;
using kernels::Type;

struct Shape {
  int m, n, k;
};

// Of T, where parts may be left. True: they were.
template <typename T>
bool Check(LtMatmul* lt, const Shape& shape) {
  const auto [m, n, k] = shape;
  const std::string where = absl::StrCat(m, " x ", n, " x ", k);
  const bool narrow = sizeof(T) == 1;
  const std::vector<float> x = kernels::RandomValues<T>(int64_t{m} * k, 1, 1.0f);
  const std::vector<float> weights = kernels::RandomValues<T>(int64_t{n} * k, 2, 1.0f);
  const DeviceRows<T> device_x(x), device_weights(weights);
  const DeviceRows<__nv_bfloat16> out(int64_t{m} * n);
  const DeviceRows<float> parts(int64_t{kProductParts} * m * n);
  MatmulArgs args = {.m = m,
                     .n = n,
                     .k = k,
                     .type = kernels::TypeOf<T>(),
                     .out_type = Type::kBF16,
                     .x = device_x.get(),
                     .x_stride = k,
                     .weights = device_weights.get(),
                     .out = out.get(),
                     .out_stride = n};
  args.parts = parts.get();
  const absl::StatusOr<bool> in_parts = lt->Run(nullptr, args);
  EXPECT_TRUE(in_parts.ok()) << where << ": " << in_parts.status();
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << where;
  if (!in_parts.ok() || testing::Test::HasFailure()) return false;
  out.ExpectGuards(where);
  parts.ExpectGuards(where);

  const std::vector<float> got_parts = parts.Values(), got_out = out.Values();
  const int64_t count = int64_t{m} * n;
  for (int64_t i = 0; i < count; i += count / 499) {  // some of every row
    const int64_t row = i / n, column = i % n;
    double want = 0.0;
    for (int j = 0; j < k; ++j) want += double{x[row * k + j]} * weights[column * k + j];
    double got = *in_parts ? 0.0 : got_out[i];
    for (int p = 0; *in_parts && p < kProductParts; ++p) got += got_parts[p * count + i];
    // Sums of e4m3 stay in the tensor cores' own, shorter accumulators.
    const double bound = std::sqrt(k) * (narrow ? 1e-2 : 1e-4) +
                         (*in_parts ? 0.0 : std::abs(want) * kernels::HalfUlp<__nv_bfloat16>());
    EXPECT_LE(std::abs(got - want), bound) << where << ", [" << row << "][" << column << "]";
    if (testing::Test::HasFailure()) break;
  }
  return *in_parts;
}

TEST(LtMatmulTest, PartsAddUpToTheProduct) {
  const auto lt = LtMatmul::Create();
  ASSERT_TRUE(lt.ok()) << lt.status();
  int left = 0;
  (*lt)->TimeNewShapes(true);
  for (const Shape& shape : {Shape{192, 4096, 14336}, Shape{64, 4096, 4096}, Shape{33, 512, 1024},
                             Shape{48, 72, 160}, Shape{40, 64, 96}}) {
    left += Check<__nv_bfloat16>(lt->get(), shape);
    if (shape.n % 16 == 0) left += Check<__nv_fp8_e4m3>(lt->get(), shape);
    if (HasFailure()) return;
  }
  std::printf("%d products were left in parts\n", left);
  if (left == 0) GTEST_SKIP() << "none was faster in parts on this GPU";
}

TEST(LtMatmulTest, LeavesNothingInPartsThatWasNotTimedOrMayNotBe) {
  const auto lt = LtMatmul::Create();
  ASSERT_TRUE(lt.ok()) << lt.status();
  EXPECT_FALSE(Check<__nv_bfloat16>(lt->get(), {33, 512, 1024}));
  (*lt)->TimeNewShapes(true);
  // Half of K would begin between two multiples of 16 bytes.
  EXPECT_FALSE(Check<__nv_bfloat16>(lt->get(), {33, 512, 1032}));
}

}  // namespace
}  // namespace lockstep::cuda
