// The arithmetic of sampling that must come out the same to the last bit
// wherever it is done: on every rank, and on the host for tests. sample.h says
// what classes and weights are for. Plain C++, for host and device.
#ifndef LOCKSTEP_KERNELS_SAMPLE_MATH_H_
#define LOCKSTEP_KERNELS_SAMPLE_MATH_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define LOCKSTEP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LOCKSTEP_HOST_DEVICE inline
#endif

namespace lockstep::kernels {

// Unsigned integers that compare as the floats do, -0 as +0.
LOCKSTEP_HOST_DEVICE uint32_t SortableBits(float v) {
  v = v == 0.0f ? 0.0f : v;
  uint32_t bits;
  memcpy(&bits, &v, sizeof(bits));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
LOCKSTEP_HOST_DEVICE float FromSortableBits(uint32_t bits) {
  bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
  float v;
  memcpy(&v, &bits, sizeof(v));
  return v;
}

// Largest value first, then lowest id. 0: nothing. kPoisonedKey beats all.
constexpr uint64_t kPoisonedKey = ~uint64_t{0};
LOCKSTEP_HOST_DEVICE uint64_t TokenKey(float v, uint32_t id) {
  return uint64_t{SortableBits(v)} << 32 | (0xffffffffu - id);
}
LOCKSTEP_HOST_DEVICE uint32_t KeyToken(uint64_t key) {
  return 0xffffffffu - static_cast<uint32_t>(key);
}
LOCKSTEP_HOST_DEVICE float KeyValue(uint64_t key) {
  return FromSortableBits(static_cast<uint32_t>(key >> 32));
}

// A token's class: how far its value is below the maximum, in units of 2^-17
// after temperature. kNumClasses: too far to be drawn.
constexpr int kClassFractionBits = 17;
constexpr uint32_t kNumClasses = 1u << 22;
constexpr int kFineBits = 11;  // of a class; the bits above are its coarse class
constexpr uint32_t kNumBins = 2048;

LOCKSTEP_HOST_DEVICE float InverseTemperature(float temperature) {
  return 1.0f / (temperature > 1e-30f ? temperature : 1e-30f);
}
LOCKSTEP_HOST_DEVICE uint32_t TokenClass(float value, float max, float inverse_temperature) {
#ifdef __CUDA_ARCH__
  const float z = __fmul_rn(__fmul_rn(__fsub_rn(max, value), inverse_temperature),
                            static_cast<float>(1 << kClassFractionBits));
  return z < static_cast<float>(kNumClasses) ? __float2uint_rn(z) : kNumClasses;
#else
  const float z = (max - value) * inverse_temperature * static_cast<float>(1 << kClassFractionBits);
  return z < static_cast<float>(kNumClasses) ? static_cast<uint32_t>(std::lrint(z)) : kNumClasses;
#endif
}

// exp(-q / 2^17) in units of 2^-38, to float's precision: 0 from about q = 27 * 2^17.
constexpr int kWeightBits = 38;
constexpr uint64_t kMaxWeight = uint64_t{1} << kWeightBits;
LOCKSTEP_HOST_DEVICE uint64_t ClassWeight(uint32_t q) {
  if (q >= kNumClasses) return 0;
  const float x = -static_cast<float>(q) * (1.0f / (1 << kClassFractionBits));
  // x = n ln 2 + r, |r| <= ln 2 / 2. Every product that is added to is fused, and
  // the others are exact or single: nothing is left for a compiler to contract.
  const float n = rintf(x * 1.44269504f);
  float r = fmaf(n, -0.693145752f, x);
  r = fmaf(n, -1.42860677e-6f, r);
  float p = 1.0f / 720;
  p = fmaf(p, r, 1.0f / 120);
  p = fmaf(p, r, 1.0f / 24);
  p = fmaf(p, r, 1.0f / 6);
  p = fmaf(p, r, 0.5f);
  p = fmaf(p, r, 1.0f);
  p = fmaf(p, r, 1.0f);
  // p 2^(38 + n): exact, with n from -47 to 0.
  uint32_t bits = static_cast<uint32_t>(127 + kWeightBits + static_cast<int>(n)) << 23;
  float scale;
  memcpy(&scale, &bits, sizeof(scale));
  const float weight = p * scale;
#ifdef __CUDA_ARCH__
  return __float2ull_rn(weight);
#else
  return static_cast<uint64_t>(std::llrint(weight));
#endif
}

// The least weight that min_p keeps.
LOCKSTEP_HOST_DEVICE uint64_t MinWeight(float min_p) {
  const double least = ceil(static_cast<double>(min_p) * static_cast<double>(kMaxWeight));
  return least < 1.0 ? 1 : static_cast<uint64_t>(least);
}
// The mass a nucleus must reach.
LOCKSTEP_HOST_DEVICE uint64_t NucleusMass(float top_p, uint64_t total) {
  const double target = ceil(static_cast<double>(top_p) * static_cast<double>(total));
  const uint64_t mass = target < 1.0 ? 1 : static_cast<uint64_t>(target);
  return mass < total ? mass : total;
}

// As UniformAt of worker/sampler.h: Philox4x32-10 of (position, seed), 53 bits.
LOCKSTEP_HOST_DEVICE double SampleUniform(int64_t seed, uint64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(static_cast<uint64_t>(seed));
  uint32_t k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0];
    const uint64_t b = uint64_t{0xCD9E8D57} * c[2];
    c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(b);
    c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<double>((uint64_t{c[0]} << 32 | c[1]) >> 11) * 0x1p-53;
}

// Which unit of `total` mass u falls on; total > 0.
LOCKSTEP_HOST_DEVICE uint64_t DrawTarget(double u, uint64_t total) {
  const uint64_t target = static_cast<uint64_t>(u * static_cast<double>(total));
  return target < total ? target : total - 1;
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_SAMPLE_MATH_H_
