// The activations themselves, over pieces of a row.
#ifndef LOCKSTEP_KERNELS_ACTIVATION_CUH_
#define LOCKSTEP_KERNELS_ACTIVATION_CUH_

#include "kernels/activation.h"
#include "kernels/vector.cuh"

namespace lockstep::kernels {

// For 16-bit results the fast exponential is exact enough by far.
template <typename T>
__device__ __forceinline__ float Logistic(float x) {  // 1 / (1 + e^-x)
  if constexpr (sizeof(T) == 4) return 1.0f / (1.0f + expf(-x));
  return __frcp_rn(1.0f + __expf(-x));
}

template <typename T>
__device__ __forceinline__ float Apply(Activation activation, float x) {
  switch (activation) {
    case Activation::kSilu:
      return x * Logistic<T>(x);
    case Activation::kGeluTanh:
      // (1 + tanh(y)) / 2 is the logistic function of 2 y.
      return x * Logistic<T>(fmaf(x * x * x, 0.044715f, x) * (2.0f * 0.7978845608028654f));
    case Activation::kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::kRelu:
      return x < 0.0f ? 0.0f : x;  // NaN stays
  }
  return x;
}

template <typename T, int N>
__device__ __forceinline__ void LoadBiased(const T* in, const T* bias, int64_t at,
                                           float (&out)[N]) {
  Unpack(LoadData<T, N>(in + at), out);
  if (bias == nullptr) return;
  float b[N];
  Unpack(LoadConstant<T, N>(bias + at), b);
#pragma unroll
  for (int e = 0; e < N; ++e) out[e] += b[e];
}

// out = outputs [at, at + N) of a row.
template <typename T, int N>
__device__ __forceinline__ void ActivatePiece(const ActivateArgs& a, Activation activation,
                                              int64_t row, int at, float (&out)[N]) {
  const T* in = static_cast<const T*>(a.in) + row * a.in_stride;
  const T* bias = static_cast<const T*>(a.bias);
  float up[N];
  if (a.layout == GateLayout::kInterleaved) {
    float both[2][N];
    LoadBiased(in, bias, int64_t{2} * at, both[0]);
    LoadBiased(in, bias, int64_t{2} * at + N, both[1]);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      out[e] = both[2 * e / N][2 * e % N];
      up[e] = both[(2 * e + 1) / N][(2 * e + 1) % N];
    }
  } else {
    LoadBiased(in, bias, at, out);
    if (a.layout == GateLayout::kHalves) LoadBiased(in, bias, int64_t{a.width} + at, up);
  }
#pragma unroll
  for (int e = 0; e < N; ++e) {
    out[e] = Apply<T>(activation, out[e]);
    if (a.layout != GateLayout::kNone) out[e] *= up[e];
  }
}

// Activate where args.quantized is given.
cudaError_t ActivateQuantized(const Launch& launch, const ActivateArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_ACTIVATION_CUH_
