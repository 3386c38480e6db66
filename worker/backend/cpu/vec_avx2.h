// Sixteen floats in two registers. Only for files compiled for AVX2, FMA, F16C.
#ifndef LOCKSTEP_WORKER_BACKEND_CPU_VEC_AVX2_H_
#define LOCKSTEP_WORKER_BACKEND_CPU_VEC_AVX2_H_

#include <immintrin.h>

#include <cstdint>

#include "worker/backend/cpu/half.h"

namespace lockstep::cpu {

struct Avx2 {
  struct F {
    __m256 lo, hi;
  };
  static constexpr int kTileM = 3, kTileN = 2;
  static constexpr int kDirectM = 3, kDirectN = 2, kGemvN = 4;
  static constexpr int kDotHeads = 2, kSumHeads = 2, kSumVecs = 2;

  static F Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F Set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static F Load(const BFloat16* p) { return {Widen(p), Widen(p + 8)}; }
  static F Load(const Float16* p) { return {Widen(p), Widen(p + 8)}; }
  // Lanes from n on are zero; n in [1, 15].
  template <typename T>
  static F LoadFirst(const T* p, int64_t n) {
    alignas(32) float lanes[16] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = ToFloat(p[i]);
    return Load(lanes);
  }
  static void Store(float* p, F x) {
    _mm256_storeu_ps(p, x.lo);
    _mm256_storeu_ps(p + 8, x.hi);
  }
  static void StoreFirst(float* p, F x, int64_t n) {
    alignas(32) float lanes[16];
    Store(lanes, x);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
  }

  static F Add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
  static F Sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
  static F Mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
  static F Div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
  static F Fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  // The second operand where one is NaN.
  static F Max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
  static F Min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
  static F Round(F x) { return {Round(x.lo), Round(x.hi)}; }
  // 2^x for whole x in [-126, 127].
  static F Pow2(F x) { return {Pow2(x.lo), Pow2(x.hi)}; }
  // x where not at < limit, else 0.
  static F ZeroBelow(F x, F at, F limit) {
    return {_mm256_and_ps(x.lo, _mm256_cmp_ps(at.lo, limit.lo, _CMP_NLT_UQ)),
            _mm256_and_ps(x.hi, _mm256_cmp_ps(at.hi, limit.hi, _CMP_NLT_UQ))};
  }

  static float Sum(F x) {
    const __m128 four = Four(x);
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static void Sum4(F a, F b, F c, F d, float* out) {
    const __m128 ab = Two(Four(a), Four(b));
    const __m128 cd = Two(Four(c), Four(d));
    _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(ab, cd, _MM_SHUFFLE(2, 0, 2, 0)),
                                  _mm_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 1, 3, 1))));
  }

 private:
  static __m128 Four(F x) {
    const __m256 eight = _mm256_add_ps(x.lo, x.hi);
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  }
  // a0+a2, a1+a3, b0+b2, b1+b3
  static __m128 Two(__m128 a, __m128 b) {
    return _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
  }
  static __m256 Widen(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static __m256 Widen(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static __m256 Round(__m256 x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static __m256 Pow2(__m256 x) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }
};

}  // namespace lockstep::cpu

#endif  // LOCKSTEP_WORKER_BACKEND_CPU_VEC_AVX2_H_
