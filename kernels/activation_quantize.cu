#include "kernels/activation.cuh"

// A block a row, which stays in registers until its scale is known.
namespace lockstep::kernels {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kN = 8;  // 16 bytes of a 16-bit type

template <typename T, int kPieces>
__global__ void __launch_bounds__(kMaxThreads)
    ActivateQuantizeKernel(const __grid_constant__ ActivateArgs a) {
  __shared__ float scratch[32];
  TriggerDependents();
  WaitForPrevious();
  const int64_t row = blockIdx.x;
  if (a.slot != nullptr && a.slot[row] < 0) return;
  Packed<T, kN> rounded[kPieces] = {};
  float max = 0.0f;
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int at = (j * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kN;
    if (at >= a.width) continue;
    float v[kN];
    ActivatePiece<T, kN>(a, a.activation, row, at, v);
    rounded[j] = Pack<T, kN>(v);
    Unpack(rounded[j], v);
#pragma unroll
    for (int e = 0; e < kN; ++e) max = fmaxf(max, fabsf(v[e]));
  }
  const RowScale scale(BlockMax(max, scratch));
  if (threadIdx.x == 0) a.quantized.scales[row] = scale.scale;
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int at = (j * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kN;
    if (at >= a.width) continue;
    float v[kN];
    Unpack(rounded[j], v);
#pragma unroll
    for (int e = 0; e < kN; ++e) v[e] *= scale.inverse;
    Store(static_cast<__nv_fp8_e4m3*>(a.quantized.values) + row * a.width + at,
          Pack<__nv_fp8_e4m3, kN>(v));
  }
}

template <typename T>
cudaError_t LaunchQuantized(const Launch& launch, const ActivateArgs& a) {
  const int pieces = a.width / kN;
  const auto run = [&](void (*kernel)(ActivateArgs), int each) {
    const int threads = ((pieces + each - 1) / each + 31) / 32 * 32;
    return LaunchKernel(launch, kernel, dim3(a.num_rows), dim3(threads), 0, 1, a);
  };
  if (pieces <= 512) return run(ActivateQuantizeKernel<T, 1>, 1);
  if (pieces <= 2048) return run(ActivateQuantizeKernel<T, 2>, 2);
  return run(ActivateQuantizeKernel<T, 4>, 4);
}

}  // namespace

cudaError_t ActivateQuantized(const Launch& launch, const ActivateArgs& a) {
  if (a.width % 16 != 0 || a.width > 4 * kMaxThreads * kN || a.in_stride % kN != 0 ||
      !Aligned16(a.in) || !Aligned16(a.bias) || !Aligned16(a.quantized.values)) {
    return cudaErrorInvalidValue;
  }
  if (a.type == Type::kF16) return LaunchQuantized<__half>(launch, a);
  if (a.type == Type::kBF16) return LaunchQuantized<__nv_bfloat16>(launch, a);
  return cudaErrorInvalidValue;
}

}  // namespace lockstep::kernels
