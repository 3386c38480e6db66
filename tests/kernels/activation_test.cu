#include <limits>

#include "kernels/activation.h"
#include "tests/kernels/device_rows.h"
#include "tests/kernels/product_scales.h"

namespace lockstep::kernels {
namespace {

double Reference(Activation activation, double x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1.0 + std::exp(-x));
    case Activation::kGeluTanh:
      return 0.5 * x * (1.0 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case Activation::kGelu:
      return 0.5 * x * std::erfc(-x * 0.70710678118654752);
    case Activation::kRelu:
      return std::max(0.0, x);
  }
  return 0.0;
}

template <typename T>
void Check(Activation activation, GateLayout layout, int width, bool bias, int shift,
           bool scaled = false) {
  const std::string where = "activation " + std::to_string(static_cast<int>(activation)) +
                            " layout " + std::to_string(static_cast<int>(layout)) + " width " +
                            std::to_string(width) + " shift " + std::to_string(shift);
  constexpr int kRows = 4;
  const bool gated = layout != GateLayout::kNone;
  const int in_width = gated ? 2 * width : width;
  const int in_stride = in_width + 8, out_stride = width + 16;
  const std::vector<float> x = RandomValues<T>(kRows * in_stride, 1, 9.0f);
  const std::vector<float> added = RandomValues<T>(in_width, 2);
  const std::vector<int32_t> slots = {0, -1, 1, 2};
  const DeviceRows<int32_t> slot(kRows);
  ASSERT_CUDA(cudaMemcpy(slot.get(), slots.data(), kRows * 4, cudaMemcpyHostToDevice));
  const LeftScales scales(kRows, in_width, 3);
  const DeviceRows<T> in(x, shift), device_bias(added, shift), out(kRows * out_stride, shift);
  ActivateArgs args = {.type = TypeOf<T>(),
                       .activation = activation,
                       .layout = layout,
                       .num_rows = kRows,
                       .width = width,
                       .slot = slot.get(),
                       .in = in.get(),
                       .in_stride = in_stride,
                       .in_scales = scaled ? scales.get() : ProductScales(),
                       .bias = bias ? device_bias.get() : nullptr,
                       .out = out.get(),
                       .out_stride = out_stride};
  ASSERT_CUDA(Activate({}, args));
  ASSERT_CUDA(cudaDeviceSynchronize());
  out.ExpectGuards(where);
  const std::vector<T> got = out.Bits();
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < out_stride; ++i) {
      const T stored = got[r * out_stride + i];
      if (i >= width || slots[r] < 0) {
        ASSERT_TRUE(DeviceRows<T>::Untouched(stored)) << where << " row " << r << " at " << i;
        continue;
      }
      const int gate_at = layout == GateLayout::kInterleaved ? 2 * i : i;
      const int up_at = layout == GateLayout::kInterleaved ? 2 * i + 1 : width + i;
      const auto value = [&](int at) {
        const double own = double{x[r * in_stride + at]} * (scaled ? scales.Of(r, at) : 1.0f);
        return own + (bias ? added[at] : 0.0f);
      };
      double want = Reference(activation, value(gate_at));
      if (gated) want *= value(up_at);
      // erff near -1 loses relative, not absolute, accuracy.
      ASSERT_LE(std::abs(HostFloat(stored) - want), HalfUlp<T>() * std::abs(want) + 6e-6)
          << where << " of " << value(gate_at) << ": " << HostFloat(stored) << " against " << want;
    }
  }
}

template <typename T>
class ActivationTest : public testing::Test {};
using Types = testing::Types<float, __half, __nv_bfloat16>;
TYPED_TEST_SUITE(ActivationTest, Types);

constexpr Activation kAll[] = {Activation::kSilu, Activation::kGeluTanh, Activation::kGelu,
                               Activation::kRelu};

TYPED_TEST(ActivationTest, MatchesTheDefinition) {
  for (const Activation activation : kAll) {
    for (const GateLayout layout :
         {GateLayout::kNone, GateLayout::kHalves, GateLayout::kInterleaved}) {
      for (const int width : {1, 5, 8, 96, 1003, 2048, 4104}) {
        if (SanitizerRun() && width > 96) continue;
        Check<TypeParam>(activation, layout, width, width % 2 == 0, 0);
        Check<TypeParam>(activation, layout, width, width % 2 == 1, 1);
        if (TypeOf<TypeParam>() == Type::kBF16) {
          Check<TypeParam>(activation, layout, width, width % 2 == 1, 0, true);
          Check<TypeParam>(activation, layout, width, width % 2 == 0, 1, true);
        }
        if (this->HasFatalFailure()) return;
      }
    }
  }
}

TEST(ActivationLimits, TakesScalesWithBF16Alone) {
  const LeftScales scales(1, 16, 1);
  const DeviceRows<float> x(16);
  ActivateArgs args = {.type = Type::kF16,
                       .layout = GateLayout::kNone,
                       .num_rows = 1,
                       .width = 16,
                       .in = x.get(),
                       .in_stride = 16,
                       .in_scales = scales.get(),
                       .out = x.get(),
                       .out_stride = 16};
  EXPECT_EQ(Activate({}, args), cudaErrorInvalidValue);
  args.type = Type::kBF16;
  EXPECT_EQ(Activate({}, args), cudaSuccess);
  args.in_scales.columns = nullptr;
  EXPECT_EQ(Activate({}, args), cudaErrorInvalidValue);
  ASSERT_CUDA(cudaDeviceSynchronize());
}

TYPED_TEST(ActivationTest, FarValuesNeitherOverflowNorHideNaN) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> x = {-3e4f, -100.0f, -0.0f, 0.0f, 100.0f, 3e4f, nan, 1.0f};
  for (const Activation activation : kAll) {
    const DeviceRows<TypeParam> in(x), out(8);
    ASSERT_CUDA(Activate({}, {.type = TypeOf<TypeParam>(),
                              .activation = activation,
                              .layout = GateLayout::kNone,
                              .num_rows = 1,
                              .width = 8,
                              .in = in.get(),
                              .in_stride = 8,
                              .out = out.get(),
                              .out_stride = 8}));
    ASSERT_CUDA(cudaDeviceSynchronize());
    const std::vector<float> got = out.Values(), rounded = in.Values();
    for (int i = 0; i < 4; ++i) EXPECT_EQ(got[i], 0.0f) << x[i];
    EXPECT_EQ(got[4], rounded[4]);
    EXPECT_EQ(got[5], rounded[5]);
    EXPECT_TRUE(std::isnan(got[6]));
  }
}

}  // namespace
}  // namespace lockstep::kernels
