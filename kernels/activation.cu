#include "kernels/activation.h"
#include "kernels/vector.cuh"

// A thread makes N outputs of one row, 16 bytes of them where all is aligned. A
// row's threads are whole blocks, so that its number is the block's.
namespace lockstep::kernels {
namespace {

constexpr int kThreads = 256;

// For 16-bit results the fast exponential and division are exact enough by far.
template <typename T>
__device__ __forceinline__ float Logistic(float x) {  // 1 / (1 + e^-x)
  if constexpr (sizeof(T) == 4) return 1.0f / (1.0f + expf(-x));
  return __frcp_rn(1.0f + __expf(-x));
}

template <typename T, Activation kActivation>
__device__ __forceinline__ float Apply(float x) {
  if constexpr (kActivation == Activation::kSilu) {
    return x * Logistic<T>(x);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // (1 + tanh(y)) / 2 is the logistic function of 2 y.
    const float cubic = fmaf(x * x * x, 0.044715f, x);
    return x * Logistic<T>(cubic * (2.0f * 0.7978845608028654f));
  } else if constexpr (kActivation == Activation::kGelu) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  } else {
    return x < 0.0f ? 0.0f : x;  // NaN stays
  }
}

template <typename T, int N>
__device__ __forceinline__ void Load(const T* in, const T* bias, int64_t at, float (&out)[N]) {
  Unpack(LoadData<T, N>(in + at), out);
  if (bias == nullptr) return;
  float b[N];
  Unpack(LoadConstant<T, N>(bias + at), b);
#pragma unroll
  for (int e = 0; e < N; ++e) out[e] += b[e];
}

template <typename T, int N, Activation kActivation>
__global__ void __launch_bounds__(kThreads)
    ActivateKernel(const __grid_constant__ ActivateArgs a, int blocks_per_row) {
  TriggerDependents();
  const int row = static_cast<int>(blockIdx.x) / blocks_per_row;
  const int at =
      (static_cast<int>(blockIdx.x) % blocks_per_row * kThreads + static_cast<int>(threadIdx.x)) *
      N;
  WaitForPrevious();
  if (at >= a.width || (a.slot != nullptr && a.slot[row] < 0)) return;
  const T* in = static_cast<const T*>(a.in) + row * a.in_stride;
  const T* bias = static_cast<const T*>(a.bias);
  float gate[N], up[N];
  if (a.layout == GateLayout::kInterleaved) {
    float first[N], second[N];
    Load(in, bias, int64_t{2} * at, first);
    Load(in, bias, int64_t{2} * at + N, second);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const int pair = 2 * e;
      gate[e] = pair < N ? first[pair] : second[pair - N];
      up[e] = pair + 1 < N ? first[pair + 1 < N ? pair + 1 : 0] : second[pair + 1 - N];
    }
  } else {
    Load(in, bias, at, gate);
    if (a.layout == GateLayout::kHalves) Load(in, bias, int64_t{a.width} + at, up);
  }
#pragma unroll
  for (int e = 0; e < N; ++e) {
    gate[e] = Apply<T, kActivation>(gate[e]);
    if (a.layout != GateLayout::kNone) gate[e] *= up[e];
  }
  Store(static_cast<T*>(a.out) + row * a.out_stride + at, Pack<T, N>(gate));
}

template <typename T, int N>
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
      return run(ActivateKernel<T, N, Activation::kSilu>);
    case Activation::kGeluTanh:
      return run(ActivateKernel<T, N, Activation::kGeluTanh>);
    case Activation::kGelu:
      return run(ActivateKernel<T, N, Activation::kGelu>);
    case Activation::kRelu:
      return run(ActivateKernel<T, N, Activation::kRelu>);
  }
  return cudaErrorInvalidValue;
}

template <typename T>
cudaError_t ActivateOf(const Launch& launch, const ActivateArgs& a) {
  constexpr int kN = 16 / sizeof(T);
  const bool wide = a.width % kN == 0 && a.in_stride % kN == 0 && a.out_stride % kN == 0 &&
                    Aligned16(a.in) && Aligned16(a.bias) && Aligned16(a.out);
  return wide ? LaunchActivate<T, kN>(launch, a) : LaunchActivate<T, 1>(launch, a);
}

}  // namespace

cudaError_t Activate(const Launch& launch, const ActivateArgs& a) {
  const int64_t in_width = a.layout == GateLayout::kNone ? a.width : int64_t{2} * a.width;
  if (a.num_rows < 0 || a.width < 1 || a.in_stride < in_width || a.out_stride < a.width) {
    return cudaErrorInvalidValue;
  }
  if (a.num_rows == 0) return cudaSuccess;
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
