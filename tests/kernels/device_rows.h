// Device memory for the kernels' tests: what is written beside it is noticed.
// Values go in and come out as floats, rounded to the element type on the way.
#ifndef LOCKSTEP_TESTS_KERNELS_DEVICE_ROWS_H_
#define LOCKSTEP_TESTS_KERNELS_DEVICE_ROWS_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/types.h"
#include "tests/kernels/sanitizer_run.h"

namespace lockstep::kernels {

#define ASSERT_CUDA(call)                                                                    \
  do {                                                                                       \
    const cudaError_t cuda_status = (call);                                                  \
    ASSERT_EQ(cuda_status, cudaSuccess) << #call << ": " << cudaGetErrorString(cuda_status); \
  } while (0)

template <typename T>
constexpr Type TypeOf() {
  if constexpr (std::is_same_v<T, float>) return Type::kF32;
  if constexpr (std::is_same_v<T, __half>) return Type::kF16;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return Type::kBF16;
  return Type::kE4M3;
}

template <typename T>
float HostFloat(T v) {
  if constexpr (std::is_same_v<T, __half>) return __half2float(v);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float(v);
  return static_cast<float>(v);
}
template <typename T>
T HostElement(float v) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(v);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(v);
  return T(v);
}
template <typename T>
float HostRounded(float v) {
  return HostFloat(HostElement<T>(v));
}

// Half a unit in the last place of T relative to a value, with some room for
// fp32 sums in another order.
template <typename T>
double HalfUlp() {
  if constexpr (std::is_same_v<T, __half>) return 0x1p-11 * 1.02 + 2e-6;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return 0x1p-8 * 1.02 + 2e-6;
  if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) return 0x1p-4 * 1.01;
  return 4e-6;
}

// `count` elements of T between guards, all of it filled with a pattern.
// `shift` elements off a 256-byte boundary.
template <typename T>
class DeviceRows {
 public:
  explicit DeviceRows(int64_t count, int64_t shift = 0)
      : count_(count), begin_(kGuard + shift * static_cast<int64_t>(sizeof(T))) {
    bytes_ = begin_ + count * static_cast<int64_t>(sizeof(T)) + kGuard;
    EXPECT_EQ(cudaMalloc(&memory_, bytes_), cudaSuccess);
    EXPECT_EQ(cudaMemset(memory_, kPattern, bytes_), cudaSuccess);
  }
  DeviceRows(const std::vector<float>& values, int64_t shift = 0)
      : DeviceRows(static_cast<int64_t>(values.size()), shift) {
    Put(values);
  }
  ~DeviceRows() { cudaFree(memory_); }
  DeviceRows(const DeviceRows&) = delete;
  DeviceRows& operator=(const DeviceRows&) = delete;

  T* get() const { return reinterpret_cast<T*>(memory_ + begin_); }

  void Put(const std::vector<float>& values) {
    std::vector<T> elements;
    for (const float v : values) elements.push_back(HostElement<T>(v));
    PutBits(elements);
  }
  void PutBits(const std::vector<T>& elements) {
    ASSERT_EQ(static_cast<int64_t>(elements.size()), count_);
    ASSERT_CUDA(cudaMemcpy(get(), elements.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> Bits() const {
    std::vector<T> elements(count_);
    EXPECT_EQ(cudaMemcpy(elements.data(), get(), count_ * sizeof(T), cudaMemcpyDeviceToHost),
              cudaSuccess);
    return elements;
  }
  std::vector<float> Values() const {
    std::vector<float> values;
    for (const T element : Bits()) values.push_back(HostFloat(element));
    return values;
  }

  // Whether an element still has the pattern that was there at first.
  static bool Untouched(T element) {
    unsigned char bytes[sizeof(T)];
    std::memcpy(bytes, &element, sizeof(T));
    for (const unsigned char byte : bytes) {
      if (byte != kPattern) return false;
    }
    return true;
  }

  void ExpectGuards(const std::string& what) const {
    std::vector<unsigned char> all(bytes_);
    ASSERT_CUDA(cudaMemcpy(all.data(), memory_, bytes_, cudaMemcpyDeviceToHost));
    const int64_t end = begin_ + count_ * static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < bytes_; ++i) {
      if (i >= begin_ && i < end) continue;
      ASSERT_EQ(all[i], kPattern) << what << ": byte " << i - begin_ << " of " << end - begin_
                                  << " was written";
    }
  }

 private:
  static constexpr int64_t kGuard = 256;
  static constexpr unsigned char kPattern = 0xa5;
  const int64_t count_, begin_;
  int64_t bytes_ = 0;
  char* memory_ = nullptr;
};

// Uniform in [-range, range], rounded to T.
template <typename T>
std::vector<float> RandomValues(int64_t count, uint32_t seed, float range = 2.0f) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-range, range);
  std::vector<float> values(count);
  for (float& v : values) v = HostRounded<T>(uniform(generator));
  return values;
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_TESTS_KERNELS_DEVICE_ROWS_H_
