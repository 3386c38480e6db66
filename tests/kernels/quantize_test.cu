#include <limits>

#include "kernels/activation.h"
#include "kernels/norm.h"
#include "kernels/quantize.h"
#include "tests/kernels/device_rows.h"
#include "tests/kernels/product_scales.h"

namespace lockstep::kernels {
namespace {

template <typename T>
class QuantizeTest : public testing::Test {};
using Types = testing::Types<float, __half, __nv_bfloat16>;
TYPED_TEST_SUITE(QuantizeTest, Types);

uint8_t E4M3(float v) { return __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3); }

TYPED_TEST(QuantizeTest, RoundsEachRowByItsOwnScale) {
  using T = TypeParam;
  constexpr int kRows = 5;
  for (const int width : {1, 7, 8, 16, 100, 1000, 4096, 14336, 28672}) {
    if (SanitizerRun() && width > 4096) continue;
    for (const int shift : {0, 1}) {
      const int in_stride = width + 16, out_stride = width + 32;
      std::vector<float> x = RandomValues<T>(kRows * in_stride, 1);
      for (int i = 0; i < width; ++i) {
        x[in_stride + i] *= 0x1p-8f;  // row 1 is smaller
        x[3 * in_stride + i] = 0.0f;  // row 3 is zero
      }
      const std::vector<int32_t> slots = {0, 1, -1, 2, 3};
      const DeviceRows<int32_t> slot(kRows);
      ASSERT_CUDA(cudaMemcpy(slot.get(), slots.data(), kRows * 4, cudaMemcpyHostToDevice));
      const DeviceRows<T> in(x, shift);
      const DeviceRows<uint8_t> out(kRows * out_stride, shift);
      const DeviceRows<float> scales(kRows);
      ASSERT_CUDA(QuantizeRows({}, {.type = TypeOf<T>(),
                                    .num_rows = kRows,
                                    .width = width,
                                    .slot = slot.get(),
                                    .in = in.get(),
                                    .in_stride = in_stride,
                                    .out = out.get(),
                                    .out_stride = out_stride,
                                    .scales = scales.get()}));
      ASSERT_CUDA(cudaDeviceSynchronize());
      out.ExpectGuards("values");
      scales.ExpectGuards("scales");
      const std::vector<uint8_t> got = out.Bits();
      const std::vector<float> got_scales = scales.Bits(), rounded = in.Values();
      for (int r = 0; r < kRows; ++r) {
        if (slots[r] < 0) {
          ASSERT_TRUE(DeviceRows<float>::Untouched(got_scales[r]));
        }
        float max = 0.0f;
        for (int i = 0; i < width; ++i) max = std::max(max, std::abs(rounded[r * in_stride + i]));
        const float scale = max == 0.0f ? 1.0f : max / 448.0f;
        if (slots[r] >= 0) ASSERT_EQ(got_scales[r], scale) << "row " << r << " of " << width;
        for (int i = 0; i < out_stride; ++i) {
          const uint8_t stored = got[r * out_stride + i];
          if (slots[r] < 0 || i >= width) {
            ASSERT_TRUE(DeviceRows<uint8_t>::Untouched(stored)) << r << " " << i;
          } else {
            ASSERT_EQ(stored, E4M3(rounded[r * in_stride + i] * (1.0f / scale))) << r << " " << i;
          }
        }
      }
    }
  }
}

TYPED_TEST(QuantizeTest, NeitherNaNNorInfinityIsHidden) {
  using T = TypeParam;
  constexpr int kWidth = 1000;
  std::vector<float> x = RandomValues<T>(3 * kWidth, 5);
  x[17] = std::numeric_limits<float>::quiet_NaN();
  x[kWidth + 999] = std::numeric_limits<float>::infinity();
  const DeviceRows<T> in(x), back(3 * kWidth);
  const DeviceRows<uint8_t> out(3 * kWidth);
  const DeviceRows<float> scales(3);
  ASSERT_CUDA(QuantizeRows({}, {.type = TypeOf<T>(),
                                .num_rows = 3,
                                .width = kWidth,
                                .in = in.get(),
                                .in_stride = kWidth,
                                .out = out.get(),
                                .out_stride = kWidth,
                                .scales = scales.get()}));
  ASSERT_CUDA(DequantizeRows({}, {.type = TypeOf<T>(),
                                  .num_rows = 3,
                                  .width = kWidth,
                                  .in = out.get(),
                                  .in_stride = kWidth,
                                  .scales = scales.get(),
                                  .out = back.get(),
                                  .out_stride = kWidth}));
  ASSERT_CUDA(cudaDeviceSynchronize());
  const std::vector<float> got = back.Values();
  for (int i = 0; i < kWidth; ++i) {
    EXPECT_EQ(std::isnan(got[i]), i == 17) << i;
    EXPECT_TRUE(std::isnan(got[kWidth + i])) << i;
    EXPECT_LE(std::abs(got[2 * kWidth + i] - x[2 * kWidth + i]), 2.0f * 0x1p-4f) << i;
  }
}

TYPED_TEST(QuantizeTest, DequantizesToTheNearest) {
  using T = TypeParam;
  for (const int width : {3, 256, 4097}) {
    std::vector<uint8_t> stored(2 * width);
    for (size_t i = 0; i < stored.size(); ++i) stored[i] = static_cast<uint8_t>(i * 37 % 127);
    DeviceRows<uint8_t> in(2 * width);
    in.PutBits(stored);
    const std::vector<float> scale = {0.25f, 0.0371f};
    const DeviceRows<float> scales(scale);
    const DeviceRows<T> out(2 * width);
    ASSERT_CUDA(DequantizeRows({}, {.type = TypeOf<T>(),
                                    .num_rows = 2,
                                    .width = width,
                                    .in = in.get(),
                                    .in_stride = width,
                                    .scales = scales.get(),
                                    .out = out.get(),
                                    .out_stride = width}));
    ASSERT_CUDA(cudaDeviceSynchronize());
    out.ExpectGuards("values");
    const std::vector<float> got = out.Values();
    for (int i = 0; i < 2 * width; ++i) {
      __nv_fp8_e4m3 value;
      value.__x = stored[i];
      ASSERT_EQ(got[i], HostRounded<T>(static_cast<float>(value) * scale[i / width])) << i;
    }
  }
}

// What a norm writes as e4m3 is what quantising its output gives, bit for bit.
TYPED_TEST(QuantizeTest, NormsQuantiseAsQuantizeRowsDoes) {
  using T = TypeParam;
  constexpr int kRows = 3;
  for (const int hidden : {5, 64, 4096, 8192, 16384}) {
    const DeviceRows<T> x(RandomValues<T>(kRows * hidden, 7));
    const DeviceRows<T> residual(RandomValues<T>(kRows * hidden, 8));
    const DeviceRows<T> weight(RandomValues<T>(hidden, 9)), normed(kRows * hidden);
    const DeviceRows<uint8_t> fused(kRows * hidden), apart(kRows * hidden);
    const DeviceRows<float> fused_scales(kRows), apart_scales(kRows);
    ReduceTailArgs args;
    args.type = TypeOf<T>();
    args.num_rows = kRows;
    args.hidden = hidden;
    args.x = x.get();
    args.residual_in = args.residual_out = residual.get();
    args.next = {.kind = NormKind::kRms, .weight = weight.get()};
    args.normed = normed.get();
    args.quantized = {fused.get(), fused_scales.get()};
    ASSERT_CUDA(ReduceTail({}, args));
    ASSERT_CUDA(QuantizeRows({}, {.type = TypeOf<T>(),
                                  .num_rows = kRows,
                                  .width = hidden,
                                  .in = normed.get(),
                                  .in_stride = hidden,
                                  .out = apart.get(),
                                  .out_stride = hidden,
                                  .scales = apart_scales.get()}));
    ASSERT_CUDA(cudaDeviceSynchronize());
    residual.ExpectGuards("residual");
    normed.ExpectGuards("normed");
    fused.ExpectGuards("fused");
    fused_scales.ExpectGuards("fused scales");
    EXPECT_EQ(fused_scales.Bits(), apart_scales.Bits()) << hidden;
    EXPECT_TRUE(fused.Bits() == apart.Bits()) << hidden;
  }
}

// What a product left its scales to may be quantised in their place.
TEST(QuantizeNorms, MayWriteTheirScalesOverTheProducts) {
  using T = __nv_bfloat16;
  for (const int hidden : {64, 4096, 8192, 16384}) {
    const int rows = SanitizerRun() ? 3 : 200;
    const LeftScales left(rows, hidden, 9);
    const DeviceRows<T> x(RandomValues<T>(rows * hidden, 1)),
        old(RandomValues<T>(rows * hidden, 2));
    const DeviceRows<T> weight(RandomValues<T>(hidden, 3));
    const DeviceRows<T> residuals[2] = {DeviceRows<T>(rows * hidden), DeviceRows<T>(rows * hidden)};
    const DeviceRows<uint8_t> values[2] = {DeviceRows<uint8_t>(rows * hidden),
                                           DeviceRows<uint8_t>(rows * hidden)};
    const DeviceRows<float> scales[2] = {DeviceRows<float>(rows), DeviceRows<float>(left.rows())};
    for (const int i : {0, 1}) {
      ReduceTailArgs args;
      args.num_rows = rows;
      args.hidden = hidden;
      args.x = x.get();
      args.x_scales = left.get();
      if (i == 1) args.x_scales.rows = scales[1].get();
      args.residual_in = old.get();
      args.residual_out = residuals[i].get();
      args.next = {.kind = NormKind::kRms, .weight = weight.get()};
      args.quantized = {values[i].get(), scales[i].get()};
      ASSERT_CUDA(ReduceTail({}, args));
    }
    ASSERT_CUDA(cudaDeviceSynchronize());
    EXPECT_EQ(
        memcmp(residuals[0].Bits().data(), residuals[1].Bits().data(), sizeof(T) * rows * hidden),
        0)
        << hidden;
    EXPECT_TRUE(values[0].Bits() == values[1].Bits()) << hidden;
    EXPECT_EQ(scales[0].Bits(), scales[1].Bits()) << hidden;
  }
}

template <typename T>
void CheckActivation(Activation activation, GateLayout layout, int width, bool scaled = false) {
  constexpr int kRows = 3;
  const int in_width = layout == GateLayout::kNone ? width : 2 * width;
  const DeviceRows<T> in(RandomValues<T>(kRows * in_width, 11, 6.0f)), out(kRows * width);
  const DeviceRows<T> bias(RandomValues<T>(in_width, 12));
  const DeviceRows<uint8_t> fused(kRows * width), apart(kRows * width);
  const LeftScales left(kRows, in_width, 13);
  const DeviceRows<float> fused_scales(left.rows()), apart_scales(kRows);
  ActivateArgs args = {.type = TypeOf<T>(),
                       .activation = activation,
                       .layout = layout,
                       .num_rows = kRows,
                       .width = width,
                       .in = in.get(),
                       .in_stride = in_width,
                       .in_scales = scaled ? left.get() : ProductScales(),
                       .bias = bias.get(),
                       .out = out.get(),
                       .out_stride = width};
  ASSERT_CUDA(Activate({}, args));
  ASSERT_CUDA(QuantizeRows({}, {.type = TypeOf<T>(),
                                .num_rows = kRows,
                                .width = width,
                                .in = out.get(),
                                .in_stride = width,
                                .out = apart.get(),
                                .out_stride = width,
                                .scales = apart_scales.get()}));
  args.out = nullptr;
  args.quantized = {fused.get(), fused_scales.get()};
  if (scaled) args.in_scales.rows = fused_scales.get();
  ASSERT_CUDA(Activate({}, args));
  ASSERT_CUDA(cudaDeviceSynchronize());
  fused.ExpectGuards("fused");
  fused_scales.ExpectGuards("fused scales");
  EXPECT_EQ(fused_scales.Bits(), apart_scales.Bits()) << width;
  EXPECT_TRUE(fused.Bits() == apart.Bits()) << width;
}

TEST(QuantizeActivations, GiveWhatQuantizeRowsOfThemGives) {
  for (const int width : {16, 96, 4096, 4112, 14336, 32768}) {
    for (const GateLayout layout :
         {GateLayout::kNone, GateLayout::kHalves, GateLayout::kInterleaved}) {
      CheckActivation<__half>(Activation::kSilu, layout, width);
      CheckActivation<__nv_bfloat16>(Activation::kGeluTanh, layout, width);
      CheckActivation<__nv_bfloat16>(Activation::kSilu, layout, width, true);
    }
  }
  ActivateArgs args = {.type = Type::kF32, .num_rows = 1, .width = 16, .in_stride = 32};
  args.quantized.values = &args;
  EXPECT_EQ(Activate({}, args), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace lockstep::kernels
