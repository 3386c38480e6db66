// Sixteen floats in an array: any processor, and the readable definition of what
// the vector types mean. Multiplies and adds round separately here: a fused one
// in software would be a hundred times slower.
#ifndef LOCKSTEP_WORKER_BACKEND_CPU_VEC_GENERIC_H_
#define LOCKSTEP_WORKER_BACKEND_CPU_VEC_GENERIC_H_

#include <cstdint>

#include "worker/backend/cpu/half.h"

namespace lockstep::cpu {

struct Generic {
  struct F {
    float lane[16];
  };
  static constexpr int kTileM = 2, kTileN = 1;
  static constexpr int kDirectM = 2, kDirectN = 1, kGemvN = 1;
  static constexpr int kDotHeads = 1, kSumHeads = 1, kSumVecs = 1;

  template <typename Fn>
  static F Each(Fn fn) {
    F out;
    for (int i = 0; i < 16; ++i) out.lane[i] = fn(i);
    return out;
  }

  static F Zero() { return Set(0.0f); }
  static F Set(float x) {
    return Each([&](int) { return x; });
  }
  template <typename T>
  static F Load(const T* p) {
    return Each([&](int i) { return ToFloat(p[i]); });
  }
  // Lanes from n on are zero; n in [1, 15].
  template <typename T>
  static F LoadFirst(const T* p, int64_t n) {
    return Each([&](int i) { return i < n ? ToFloat(p[i]) : 0.0f; });
  }
  static void Store(float* p, F x) { StoreFirst(p, x, 16); }
  static void StoreFirst(float* p, F x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = x.lane[i];
  }

  static F Add(F a, F b) {
    return Each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static F Sub(F a, F b) {
    return Each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static F Mul(F a, F b) {
    return Each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static F Div(F a, F b) {
    return Each([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  static F Fma(F a, F b, F c) {
    return Each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  // The second operand where one is NaN.
  static F Max(F a, F b) {
    return Each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static F Min(F a, F b) {
    return Each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static F Round(F x) {
    return Each([&](int i) { return __builtin_rintf(x.lane[i]); });
  }
  // 2^x for whole x in [-126, 127].
  static F Pow2(F x) {
    return Each([&](int i) {
      // A NaN must not reach the conversion to an integer.
      const float whole = x.lane[i] >= -126.0f && x.lane[i] <= 127.0f ? x.lane[i] : 0.0f;
      return __builtin_bit_cast(float, static_cast<uint32_t>(static_cast<int32_t>(whole) + 127)
                                           << 23);
    });
  }
  // x where not at < limit, else 0.
  static F ZeroBelow(F x, F at, F limit) {
    return Each([&](int i) { return at.lane[i] < limit.lane[i] ? 0.0f : x.lane[i]; });
  }

  static float Sum(F x) {
    for (int width = 8; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) x.lane[i] = x.lane[i] + x.lane[i + width];
    }
    return x.lane[0];
  }
  static void Sum4(F a, F b, F c, F d, float* out) {
    out[0] = Sum(a);
    out[1] = Sum(b);
    out[2] = Sum(c);
    out[3] = Sum(d);
  }
};

}  // namespace lockstep::cpu

#endif  // LOCKSTEP_WORKER_BACKEND_CPU_VEC_GENERIC_H_
