// 16-bit floats as they lie in memory. The vector types of vec_*.h load and
// store them; the scalar conversions serve the baseline and single values.
// `static`: files compiled for different processors must not share a copy.
#ifndef LOCKSTEP_WORKER_BACKEND_CPU_HALF_H_
#define LOCKSTEP_WORKER_BACKEND_CPU_HALF_H_

#include <cstdint>

namespace lockstep::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline float ToFloat(float x) { return x; }

static inline float ToFloat(BFloat16 x) {
  return __builtin_bit_cast(float, uint32_t{x.bits} << 16);
}

static inline float ToFloat(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1f;
  const uint32_t mantissa = x.bits & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return __builtin_bit_cast(float, sign | __builtin_bit_cast(uint32_t, magnitude));
  }
  const uint32_t biased = exponent == 0x1f ? 0xff : exponent + 112;
  return __builtin_bit_cast(float, sign | biased << 23 | mantissa << 13);
}

// Round to nearest, ties to even; NaN stays NaN.
static inline BFloat16 ToBFloat16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

static inline Float16 ToFloat16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u)
    return {static_cast<uint16_t>(sign | 0x7e00u | (bits >> 13 & 0x1ff))};
  if (magnitude >= 0x477ff000u)
    return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {
    // Below the smallest normal, 2^-14: adding 0.5 puts the units of 2^-24 in the
    // last bit of a float, rounded by the addition.
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return {static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)))};
}

}  // namespace lockstep::cpu

#endif  // LOCKSTEP_WORKER_BACKEND_CPU_HALF_H_
