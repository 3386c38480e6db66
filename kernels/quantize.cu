#include "kernels/quantize.h"
#include "kernels/quantize_row.cuh"

// A block a row. Rows of 16-bit types stay in registers until their scale is known; others are
// passed over twice: the second time they come from the cache of the multiprocessor or from L2.
namespace lockstep::kernels {
namespace {

constexpr int kThreads = 256;

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    QuantizeKernel(const __grid_constant__ QuantizeRowsArgs a) {
  __shared__ float scratch[32];
  TriggerDependents();
  WaitForPrevious();
  const int64_t row = blockIdx.x;
  if (a.slot != nullptr && a.slot[row] < 0) return;
  const T* const in = static_cast<const T*>(a.in) + row * a.in_stride;
  __nv_fp8_e4m3* const out = static_cast<__nv_fp8_e4m3*>(a.out) + row * a.out_stride;
  const int first = static_cast<int>(threadIdx.x) * N;

  float max = 0.0f;
#pragma unroll 4
  for (int i = first; i < a.width; i += kThreads * N) {
    float v[N];
    Unpack(Load<T, N>(in + i), v);
#pragma unroll
    for (int e = 0; e < N; ++e) max = fmaxf(max, fabsf(v[e]));
  }
  const RowScale scale(BlockMax(max, scratch));
  if (threadIdx.x == 0) a.scales[row] = scale.scale;
#pragma unroll 4
  for (int i = first; i < a.width; i += kThreads * N) {
    float v[N];
    Unpack(Load<T, N>(in + i), v);
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] *= scale.inverse;
    Store(out + i, Pack<__nv_fp8_e4m3, N>(v));
  }
}

template <typename T, int kPieces>
__global__ void __launch_bounds__(kRowMaxThreads)
    QuantizeOnceKernel(const __grid_constant__ QuantizeRowsArgs a) {
  TriggerDependents();
  WaitForPrevious();
  const int64_t row = blockIdx.x;
  if (a.slot != nullptr && a.slot[row] < 0) return;
  const T* const in = static_cast<const T*>(a.in) + row * a.in_stride;
  Packed<T, kRowPiece> pieces[kPieces] = {};
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    if (RowPieceAt(j) < a.width) pieces[j] = LoadData<T, kRowPiece>(in + RowPieceAt(j));
  }
  QuantizeRow(pieces, a.width, static_cast<__nv_fp8_e4m3*>(a.out) + row * a.out_stride,
              a.scales + row);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    DequantizeKernel(const __grid_constant__ DequantizeRowsArgs a) {
  TriggerDependents();
  WaitForPrevious();
  const int64_t row = blockIdx.x;
  const __nv_fp8_e4m3* const in = static_cast<const __nv_fp8_e4m3*>(a.in) + row * a.in_stride;
  T* const out = static_cast<T*>(a.out) + row * a.out_stride;
  const float scale = a.scales[row];
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x) * N; i < a.width; i += kThreads * N) {
    float v[N];
    Unpack(Load<__nv_fp8_e4m3, N>(in + i), v);
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] *= scale;
    Store(out + i, Pack<T, N>(v));
  }
}

template <typename T, typename Args>
bool IsAligned(const Args& a) {
  constexpr int kN = 16 / sizeof(T);
  return a.width % kN == 0 && a.in_stride % kN == 0 && a.out_stride % kN == 0 && Aligned16(a.in) &&
         Aligned16(a.out);
}

// Kernel<T, N>: pieces of 16 bytes on the side of T, or single elements.
template <typename T, typename Args>
cudaError_t LaunchRows(const Launch& launch, const Args& a, void (*wide)(Args),
                       void (*single)(Args)) {
  const bool aligned = IsAligned<T>(a);
  return LaunchKernel(launch, aligned ? wide : single, dim3(a.num_rows), dim3(kThreads), 0, 1, a);
}

template <typename T>
cudaError_t QuantizeOf(const Launch& launch, const QuantizeRowsArgs& a) {
  if constexpr (sizeof(T) == 2) {
    if (IsAligned<T>(a) && a.width <= kRowMaxWidth) {
      return WithRowPieces(a.width, [&](auto each, int threads) {
        return LaunchKernel(launch, QuantizeOnceKernel<T, each>, dim3(a.num_rows), dim3(threads), 0,
                            1, a);
      });
    }
  }
  return LaunchRows<T>(launch, a, QuantizeKernel<T, 16 / sizeof(T)>, QuantizeKernel<T, 1>);
}
template <typename T>
cudaError_t DequantizeOf(const Launch& launch, const DequantizeRowsArgs& a) {
  return LaunchRows<T>(launch, a, DequantizeKernel<T, 16 / sizeof(T)>, DequantizeKernel<T, 1>);
}

template <typename Args>
bool Invalid(const Args& a) {
  return a.num_rows < 0 || a.width < 1 || a.in_stride < a.width || a.out_stride < a.width;
}

}  // namespace

cudaError_t QuantizeRows(const Launch& launch, const QuantizeRowsArgs& args) {
  if (Invalid(args)) return cudaErrorInvalidValue;
  if (args.num_rows == 0) return cudaSuccess;
  switch (args.type) {
    case Type::kF32:
      return QuantizeOf<float>(launch, args);
    case Type::kF16:
      return QuantizeOf<__half>(launch, args);
    case Type::kBF16:
      return QuantizeOf<__nv_bfloat16>(launch, args);
    case Type::kE4M3:
      break;
  }
  return cudaErrorInvalidValue;
}

cudaError_t DequantizeRows(const Launch& launch, const DequantizeRowsArgs& args) {
  if (Invalid(args)) return cudaErrorInvalidValue;
  if (args.num_rows == 0) return cudaSuccess;
  switch (args.type) {
    case Type::kF32:
      return DequantizeOf<float>(launch, args);
    case Type::kF16:
      return DequantizeOf<__half>(launch, args);
    case Type::kBF16:
      return DequantizeOf<__nv_bfloat16>(launch, args);
    case Type::kE4M3:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace lockstep::kernels
