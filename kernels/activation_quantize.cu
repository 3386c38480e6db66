#include "kernels/activation.cuh"
#include "kernels/quantize_row.cuh"

// A block a row, which stays in registers until its scale is known.
namespace lockstep::kernels {
namespace {

template <typename T, int kPieces, Activation kActivation, bool kInterleaved>
__global__ void __launch_bounds__(kRowMaxThreads)
    ActivateQuantizeKernel(const __grid_constant__ ActivateArgs a) {
  TriggerDependents();
  WaitForPrevious();
  const int64_t row = blockIdx.x;
  if (a.slot != nullptr && a.slot[row] < 0) return;
  const float row_factor = RowFactor(a.in_scales, row);
  Gates<T, kRowPiece, kInterleaved> gates[kPieces];
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    if (RowPieceAt(j) < a.width) gates[j].Load(a, row, RowPieceAt(j));
  }
  Packed<T, kRowPiece> rounded[kPieces] = {};
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    if (RowPieceAt(j) >= a.width) continue;
    float v[kRowPiece];
    gates[j].Activate(a, kActivation, row_factor, RowPieceAt(j), v);
    rounded[j] = Pack<T, kRowPiece>(v);
  }
  QuantizeRow(rounded, a.width, static_cast<__nv_fp8_e4m3*>(a.quantized.values) + row * a.width,
              a.quantized.scales + row);
}

template <typename T, Activation kActivation>
cudaError_t LaunchQuantized(const Launch& launch, const ActivateArgs& a) {
  return WithRowPieces(a.width, [&](auto each, int threads) {
    const auto kernel = a.layout == GateLayout::kInterleaved
                            ? ActivateQuantizeKernel<T, each, kActivation, true>
                            : ActivateQuantizeKernel<T, each, kActivation, false>;
    return LaunchKernel(launch, kernel, dim3(a.num_rows), dim3(threads), 0, 1, a);
  });
}

template <typename T>
cudaError_t QuantizedOf(const Launch& launch, const ActivateArgs& a) {
  switch (a.activation) {
    case Activation::kSilu:
      return LaunchQuantized<T, Activation::kSilu>(launch, a);
    case Activation::kGeluTanh:
      return LaunchQuantized<T, Activation::kGeluTanh>(launch, a);
    case Activation::kGelu:
      return LaunchQuantized<T, Activation::kGelu>(launch, a);
    case Activation::kRelu:
      return LaunchQuantized<T, Activation::kRelu>(launch, a);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t ActivateQuantized(const Launch& launch, const ActivateArgs& a) {
  if (a.width % 16 != 0 || a.width > kRowMaxWidth || a.in_stride % kRowPiece != 0 ||
      !Aligned16(a.in) || !Aligned16(a.bias) || !Aligned16(a.in_scales.columns) ||
      !Aligned16(a.quantized.values)) {
    return cudaErrorInvalidValue;
  }
  if (a.type == Type::kF16) return QuantizedOf<__half>(launch, a);
  if (a.type == Type::kBF16) return QuantizedOf<__nv_bfloat16>(launch, a);
  return cudaErrorInvalidValue;
}

}  // namespace lockstep::kernels
