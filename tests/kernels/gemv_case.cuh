// One decode product on a device: random inputs, guarded outputs, and a reference
// in double by a kernel that has nothing in common with those under test.
#ifndef LOCKSTEP_TESTS_KERNELS_GEMV_CASE_CUH_
#define LOCKSTEP_TESTS_KERNELS_GEMV_CASE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/gemv.h"
#include "tests/kernels/sanitizer_run.h"

namespace lockstep::kernels::testing {

#define EXPECT_CUDA(expression)                                                                  \
  do {                                                                                           \
    const cudaError_t cuda_error = (expression);                                                 \
    EXPECT_EQ(cuda_error, cudaSuccess) << #expression << ": " << cudaGetErrorString(cuda_error); \
  } while (false)

inline constexpr unsigned char kUnwritten = 0xff;

// Device memory between guards; all of it starts as kUnwritten bytes.
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes) {
    EXPECT_CUDA(cudaMalloc(&base_, bytes + 2 * kGuard));
    EXPECT_CUDA(cudaMemset(base_, kUnwritten, bytes + 2 * kGuard));
  }
  Memory(Memory&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)), bytes_(other.bytes_) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { cudaFree(base_); }

  template <typename T = void>
  T* get() const {
    return reinterpret_cast<T*>(base_ + kGuard);
  }
  size_t bytes() const { return bytes_; }
  template <typename T>
  std::vector<T> Read() const {
    std::vector<T> values(bytes_ / sizeof(T));
    EXPECT_CUDA(cudaMemcpy(values.data(), get(), bytes_, cudaMemcpyDeviceToHost));
    return values;
  }
  template <typename T>
  void Write(const std::vector<T>& values) {
    EXPECT_CUDA(cudaMemcpy(get(), values.data(), bytes_, cudaMemcpyHostToDevice));
  }
  bool GuardsIntact() const {
    std::vector<unsigned char> guards(2 * kGuard);
    EXPECT_CUDA(cudaMemcpy(guards.data(), base_, kGuard, cudaMemcpyDeviceToHost));
    EXPECT_CUDA(cudaMemcpy(guards.data() + kGuard, base_ + kGuard + bytes_, kGuard,
                           cudaMemcpyDeviceToHost));
    for (unsigned char byte : guards) {
      if (byte != kUnwritten) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kGuard = 512;
  unsigned char* base_ = nullptr;
  size_t bytes_;
};

__device__ inline uint32_t Mix(uint64_t v) {
  v ^= v >> 33;
  v *= 0xff51afd7ed558ccdull;
  v ^= v >> 33;
  v *= 0xc4ceb9fe1a85ec53ull;
  return static_cast<uint32_t>(v >> 32);
}
template <typename T>
__device__ T RandomElement(uint32_t bits, float scale) {
  if constexpr (sizeof(T) == 1) {
    // Every value e4m3 has, denormals and zeros of both signs too.
    T v;
    v.__x = static_cast<uint8_t>((bits & 0x7fu) == 0x7fu ? bits & 0xf7u : bits);
    return v;
  } else {
    const float uniform = static_cast<float>(static_cast<int32_t>(bits)) * 0x1p-31f;
    return T(uniform * scale);
  }
}
template <typename T>
__global__ void FillKernel(T* out, int64_t count, uint64_t seed, float scale) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x)
    out[i] = RandomElement<T>(Mix(seed * 0x9e3779b97f4a7c15ull + i), scale);
}
template <typename T>
void Fill(T* out, int64_t count, uint64_t seed, float scale) {
  FillKernel<<<512, 256>>>(out, count, seed, scale);
  EXPECT_CUDA(cudaGetLastError());
}

// sums and magnitudes [m][n]: x . w in double and the same of absolute values. A
// warp per output.
template <typename W, typename T>
__global__ void ReferenceKernel(const W* w, const float* scales, const T* x, int64_t x_stride,
                                int m, int n, int k, double* sums, double* magnitudes) {
  const int lane = threadIdx.x % 32;
  const int64_t warp = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32;
  const int64_t row = warp / n, col = warp % n;
  if (row >= m) return;
  double sum = 0, magnitude = 0;
  for (int i = lane; i < k; i += 32) {
    const double product = static_cast<double>(static_cast<float>(w[col * k + i])) *
                           static_cast<double>(static_cast<float>(x[row * x_stride + i]));
    sum += product;
    magnitude += fabs(product);
  }
  for (int offset = 16; offset > 0; offset >>= 1) {
    sum += __shfl_xor_sync(~0u, sum, offset);
    magnitude += __shfl_xor_sync(~0u, magnitude, offset);
  }
  if (lane != 0) return;
  const double scale = scales == nullptr ? 1.0 : static_cast<double>(scales[col]);
  sums[row * n + col] = sum * scale;
  magnitudes[row * n + col] = magnitude * fabs(scale);
}

template <typename T>
constexpr Type TypeOf() {
  if constexpr (sizeof(T) == 1) return Type::kE4M3;
  return std::is_same_v<T, __half> ? Type::kF16 : Type::kBF16;
}
// Rounding to T, relative.
template <typename T>
constexpr double HalfUlp() {
  return std::is_same_v<T, __half> ? 0x1p-11 : sizeof(T) == 2 ? 0x1p-8 : 0.0;
}

// Everything a product reads and writes.
template <typename W, typename T>
struct Case {
  Case(int m, int n, int k, uint64_t seed, int64_t x_pad = 0, int64_t out_pad = 0)
      : m(m),
        n(n),
        k(k),
        x_stride(k + x_pad),
        out_stride(n + out_pad),
        weights(sizeof(W) * n * k),
        scales(sizeof(float) * n),
        x(sizeof(T) * m * x_stride),
        bias(sizeof(T) * n),
        sums(sizeof(double) * m * n),
        magnitudes(sizeof(double) * m * n) {
    Fill(weights.get<W>(), int64_t{n} * k, seed, 0.05f);
    Fill(x.get<T>(), m * x_stride, seed + 1, 2.0f);
    Fill(bias.get<T>(), n, seed + 2, 1.0f);
    FillPositive(seed);
  }
  const float* scale_data() const { return sizeof(W) == 1 ? scales.get<float>() : nullptr; }

  GemvArgs Args() const {
    GemvArgs args;
    args.weights = weights.get();
    args.weight_type = TypeOf<W>();
    args.scales = scale_data();
    args.n = n;
    args.k = k;
    args.type = TypeOf<T>();
    args.m = m;
    args.x = x.get();
    args.x_stride = x_stride;
    args.out_stride = out_stride;
    return args;
  }
  // `from`: what meets the weights, x unless a prologue changed it.
  void Reference(const T* from = nullptr) {
    const int64_t warps = int64_t{m} * n;
    ReferenceKernel<W, T><<<static_cast<unsigned>((warps + 7) / 8), 256>>>(
        weights.get<W>(), scale_data(), from == nullptr ? x.get<T>() : from, x_stride, m, n, k,
        sums.get<double>(), magnitudes.get<double>());
    EXPECT_CUDA(cudaGetLastError());
    expected = sums.Read<double>();
    allowed = magnitudes.Read<double>();
    for (double& v : allowed) v = v * 4e-6 + 1e-30;
  }

  int m, n, k;
  int64_t x_stride, out_stride;
  Memory weights, scales, x, bias, sums, magnitudes;
  std::vector<double> expected, allowed;  // [m][n], after Reference

 private:
  void FillPositive(uint64_t seed) {
    std::vector<float> values(n);
    for (int i = 0; i < n; ++i)
      values[i] = 0.001f + 0.0001f * static_cast<float>((seed + i * 37ull) % 101);
    scales.Write(values);
  }
};

inline double Silu(double g) { return g / (1 + std::exp(-g)); }
inline double GeluTanh(double g) {
  return 0.5 * g * (1 + std::tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)));
}

// What an output of the case must be, and how far off it may be before rounding.
struct Wanted {
  double value, slack;
};
template <typename W, typename T>
Wanted WantedOf(const Case<W, T>& c, GemvEpilogue epilogue, const std::vector<float>& bias, int row,
                int i) {
  const int64_t base = int64_t{row} * c.n;
  if (epilogue == GemvEpilogue::kSiluGate || epilogue == GemvEpilogue::kGeluGate) {
    const double gate = c.expected[base + 2 * i], up = c.expected[base + 2 * i + 1];
    const double act = epilogue == GemvEpilogue::kSiluGate ? Silu(gate) : GeluTanh(gate);
    // Both activations have slopes below 1.13, and their own error.
    return {act * up, (1.13 * c.allowed[base + 2 * i] + 2e-6 * std::fabs(gate)) * std::fabs(up) +
                          std::fabs(act) * c.allowed[base + 2 * i + 1]};
  }
  const double b = bias.empty() ? 0.0 : static_cast<double>(bias[i]);
  return {c.expected[base + i] + b, c.allowed[base + i]};
}

// Compares all outputs, and that nothing else was written. Returns the outputs.
template <typename Out, typename W, typename T>
std::vector<float> ExpectOutputs(const Case<W, T>& c, GemvEpilogue epilogue, const Memory& out,
                                 int64_t stride, int width, const std::vector<float>& bias = {}) {
  const std::vector<Out> got = out.Read<Out>();
  std::vector<float> values;
  int wrong = 0;
  for (int row = 0; row < c.m; ++row) {
    for (int64_t i = 0; i < stride; ++i) {
      const Out element = got[row * stride + i];
      unsigned char bytes[sizeof(Out)], blank[sizeof(Out)];
      std::memcpy(bytes, &element, sizeof(Out));
      std::memset(blank, kUnwritten, sizeof(Out));
      const bool untouched = std::memcmp(bytes, blank, sizeof(Out)) == 0;
      if (i >= width) {
        EXPECT_TRUE(untouched) << "padding of row " << row << " was written";
        continue;
      }
      const float v = static_cast<float>(element);
      values.push_back(v);
      const Wanted wanted = WantedOf(c, epilogue, bias, row, static_cast<int>(i));
      const double limit = wanted.slack + 1e-7 * std::fabs(wanted.value) +
                           HalfUlp<Out>() * 1.01 * (std::fabs(wanted.value) + wanted.slack) +
                           (sizeof(Out) == 2 ? 3.1e-8 : 0.0);  // f16 denormals
      if (!(std::fabs(static_cast<double>(v) - wanted.value) <= limit) && ++wrong <= 5) {
        ADD_FAILURE() << "row " << row << " output " << i << ": " << v << ", wanted "
                      << wanted.value << " +- " << limit;
      }
    }
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_TRUE(out.GuardsIntact());
  return values;
}

}  // namespace lockstep::kernels::testing

#endif  // LOCKSTEP_TESTS_KERNELS_GEMV_CASE_CUH_
