// Sixteen floats in one register. Only for files compiled for AVX-512.
#ifndef LOCKSTEP_WORKER_BACKEND_CPU_VEC_AVX512_H_
#define LOCKSTEP_WORKER_BACKEND_CPU_VEC_AVX512_H_

#include <immintrin.h>

#include <cstdint>

#include "worker/backend/cpu/half.h"

namespace lockstep::cpu {

struct Avx512 {
  using F = __m512;
  static constexpr int kTileM = 6, kTileN = 4;
  static constexpr int kDirectM = 6, kDirectN = 4, kGemvN = 8;
  static constexpr int kDotHeads = 4, kSumHeads = 4, kSumVecs = 4;

  static __mmask16 First(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

  static F Zero() { return _mm512_setzero_ps(); }
  static F Set(float x) { return _mm512_set1_ps(x); }
  static F Load(const float* p) { return _mm512_loadu_ps(p); }
  static F Load(const BFloat16* p) {
    return Widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F Load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // Lanes from n on are zero; n in [1, 15].
  static F LoadFirst(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(First(n), p); }
  static F LoadFirst(const BFloat16* p, int64_t n) {
    return Widen(_mm256_maskz_loadu_epi16(First(n), p));
  }
  static F LoadFirst(const Float16* p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(First(n), p));
  }
  static void Store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void StoreFirst(float* p, F x, int64_t n) { _mm512_mask_storeu_ps(p, First(n), x); }

  static F Add(F a, F b) { return _mm512_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm512_div_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // The second operand where one is NaN.
  static F Max(F a, F b) { return _mm512_max_ps(a, b); }
  static F Min(F a, F b) { return _mm512_min_ps(a, b); }
  static F Round(F x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // 2^x for whole x in [-126, 127].
  static F Pow2(F x) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
  }
  // x where not at < limit, else 0.
  static F ZeroBelow(F x, F at, F limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(at, limit, _CMP_NLT_UQ), x);
  }

  static float Sum(F x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static void Sum4(F a, F b, F c, F d, float* out) {
    const F ab = Add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    const F cd = Add(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    const F four = Add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    const F two = Add(four, _mm512_permute_ps(four, 0x4e));
    const F one = Add(two, _mm512_permute_ps(two, 0xb1));
    const __m512i heads = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(heads, one)));
  }

 private:
  static F Widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
};

}  // namespace lockstep::cpu

#endif  // LOCKSTEP_WORKER_BACKEND_CPU_VEC_AVX512_H_
