// The activations themselves, over pieces of a row.
#ifndef LOCKSTEP_KERNELS_ACTIVATION_CUH_
#define LOCKSTEP_KERNELS_ACTIVATION_CUH_

#include "kernels/activation.h"
#include "kernels/vector.cuh"

namespace lockstep::kernels {

// For 16-bit results the fast exponential and reciprocal are exact enough by far.
template <typename T>
__device__ __forceinline__ float Logistic(float x) {  // 1 / (1 + e^-x)
  if constexpr (sizeof(T) == 4) return 1.0f / (1.0f + expf(-x));
  float power, out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-1.4426950408889634f * x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(1.0f + power));
  return out;
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

// What outputs [at, at + N) of a row are made of, as it lies in memory: two pieces, of which the
// layouts without a gate have the first alone. kInterleaved: the layout of that name.
template <typename T, int N, bool kInterleaved>
struct Gates {
  Packed<T, N> pieces[2] = {};

  static __device__ __forceinline__ int64_t PlaceOf(const ActivateArgs& a, int at, int piece) {
    return kInterleaved ? int64_t{2} * at + piece * N : at + int64_t{piece} * a.width;
  }
  static __device__ __forceinline__ bool Has(const ActivateArgs& a, int piece) {
    return kInterleaved || piece == 0 || a.layout == GateLayout::kHalves;
  }

  __device__ __forceinline__ void Load(const ActivateArgs& a, int64_t row, int at) {
    const T* in = static_cast<const T*>(a.in) + row * a.in_stride;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (Has(a, i)) pieces[i] = LoadData<T, N>(in + PlaceOf(a, at, i));
    }
  }

  // row_factor: see RowFactor.
  __device__ __forceinline__ void Activate(const ActivateArgs& a, Activation activation,
                                           float row_factor, int at, float (&out)[N]) const {
    float v[2][N];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Unpack(pieces[i], v[i]);
      if (!Has(a, i)) continue;
      ScaleProduct<T>(a.in_scales, row_factor, static_cast<int>(PlaceOf(a, at, i)), v[i]);
      if (a.bias == nullptr) continue;
      float bias[N];
      Unpack(LoadConstant<T, N>(static_cast<const T*>(a.bias) + PlaceOf(a, at, i)), bias);
#pragma unroll
      for (int e = 0; e < N; ++e) v[i][e] += bias[e];
    }
    const bool gated = Has(a, 1);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      const float gate = kInterleaved ? v[2 * e / N][2 * e % N] : v[0][e];
      const float up = kInterleaved ? v[(2 * e + 1) / N][(2 * e + 1) % N] : v[1][e];
      out[e] = Apply<T>(activation, gate);
      if (gated) out[e] *= up;
    }
  }
};

// Activate where args.quantized is given.
cudaError_t ActivateQuantized(const Launch& launch, const ActivateArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_ACTIVATION_CUH_
