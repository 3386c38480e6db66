#include "kernels/activation.cuh"
#include "kernels/activation.h"

// A thread makes N outputs of one row, 16 bytes of them where all is aligned. A
// row's threads are whole blocks, so that its number is the block's.
namespace lockstep::kernels {
namespace {

constexpr int kThreads = 256;

template <typename T, int N, Activation kActivation, bool kInterleaved>
__global__ void __launch_bounds__(kThreads)
    ActivateKernel(const __grid_constant__ ActivateArgs a, int blocks_per_row) {
  TriggerDependents();
  const int row = static_cast<int>(blockIdx.x) / blocks_per_row;
  const int at =
      (static_cast<int>(blockIdx.x) % blocks_per_row * kThreads + static_cast<int>(threadIdx.x)) *
      N;
  WaitForPrevious();
  if (at >= a.width || (a.slot != nullptr && a.slot[row] < 0)) return;
  Gates<T, N, kInterleaved> gates;
  gates.Load(a, row, at);
  float v[N];
  gates.Activate(a, kActivation, RowFactor(a.in_scales, row), at, v);
  Store(static_cast<T*>(a.out) + row * a.out_stride + at, Pack<T, N>(v));
}

template <typename T, int N, bool kInterleaved>
cudaError_t LaunchActivate(const Launch& launch, const ActivateArgs& args) {
  const int blocks_per_row = (args.width / N + kThreads - 1) / kThreads;
  const int64_t blocks = int64_t{args.num_rows} * blocks_per_row;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto run = [&](void (*kernel)(ActivateArgs, int)) {
    return LaunchKernel(launch, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, 1,
                        args, blocks_per_row);
  };
  switch (args.activation) {
    case Activation::kSilu:
      return run(ActivateKernel<T, N, Activation::kSilu, kInterleaved>);
    case Activation::kGeluTanh:
      return run(ActivateKernel<T, N, Activation::kGeluTanh, kInterleaved>);
    case Activation::kGelu:
      return run(ActivateKernel<T, N, Activation::kGelu, kInterleaved>);
    case Activation::kRelu:
      return run(ActivateKernel<T, N, Activation::kRelu, kInterleaved>);
  }
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t ActivateOf(const Launch& launch, const ActivateArgs& a) {
  constexpr int kN = 16 / sizeof(T);
  const bool wide = a.width % kN == 0 && a.in_stride % kN == 0 && a.out_stride % kN == 0 &&
                    Aligned16(a.in) && Aligned16(a.bias) && Aligned16(a.out) &&
                    Aligned16(a.in_scales.columns);
  if (a.layout == GateLayout::kInterleaved) {
    return wide ? LaunchActivate<T, kN, true>(launch, a) : LaunchActivate<T, 1, true>(launch, a);
  }
  return wide ? LaunchActivate<T, kN, false>(launch, a) : LaunchActivate<T, 1, false>(launch, a);
}

}  // namespace

cudaError_t Activate(const Launch& launch, const ActivateArgs& a) {
  const int64_t in_width = a.layout == GateLayout::kNone ? a.width : int64_t{2} * a.width;
  if (a.num_rows < 0 || a.width < 1 || a.in_stride < in_width ||
      (a.quantized.values == nullptr && a.out_stride < a.width) || !Scalable(a.in_scales, a.type)) {
    return cudaErrorInvalidValue;
  }
  if (a.num_rows == 0) return cudaSuccess;
  if (a.quantized.values != nullptr) return ActivateQuantized(launch, a);
  switch (a.type) {
    case Type::kF32:
      return ActivateOf<float>(launch, a);
    case Type::kF16:
      return ActivateOf<__half>(launch, a);
    case Type::kBF16:
      return ActivateOf<__nv_bfloat16>(launch, a);
    case Type::kE4M3:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace lockstep::kernels
