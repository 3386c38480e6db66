#include "kernels/embed.h"
#include "kernels/vector.cuh"

// A block a row; 128 threads of one 16-byte piece each, in a loop.
namespace lockstep::kernels {
namespace {

constexpr int kThreads = 128;

// from null: zeros.
template <typename T, int N, bool kCanonicalZero>
__device__ __forceinline__ void CopyRow(const T* from, T* to, int width) {
  for (int i = static_cast<int>(threadIdx.x) * N; i < width; i += kThreads * N) {
    Packed<T, N> v = {};
    if (from != nullptr) v = LoadData<T, N>(from + i);
    if constexpr (kCanonicalZero) {
      float f[N];
      Unpack(v, f);
#pragma unroll
      for (int j = 0; j < N; ++j) f[j] = __fadd_rn(f[j], 0.0f);
      v = Pack<T, N>(f);
    }
    Store(to + i, v);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) EmbedKernel(const __grid_constant__ EmbedRowsArgs a) {
  TriggerDependents();
  WaitForPrevious();
  const int row = static_cast<int>(blockIdx.x);
  const int slot = a.rows.slot[row];
  const T* from = nullptr;
  if (slot >= 0) {
    const int token = a.tokens[static_cast<int64_t>(slot) * a.tokens_stride + a.rows.position[row]];
    const int64_t local = int64_t{token} - a.first_vocab;
    if (local >= 0 && local < a.local_vocab) from = static_cast<const T*>(a.table) + local * a.dim;
  }
  CopyRow<T, N, true>(from, static_cast<T*>(a.out) + int64_t{row} * a.dim, a.dim);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) GatherKernel(const __grid_constant__ GatherRowsArgs a) {
  TriggerDependents();
  WaitForPrevious();
  const int row = static_cast<int>(blockIdx.x);
  const int64_t index = a.index[row];
  const HeldRows& held = a.held;
  const bool present = index >= 0 && index % held.of == held.rank &&
                       ((index >= held.begin[0] && index < held.end[0]) ||
                        (index >= held.begin[1] && index < held.end[1]));
  const T* from = present ? static_cast<const T*>(a.in) + index * a.width : nullptr;
  CopyRow<T, N, false>(from, static_cast<T*>(a.out) + int64_t{row} * a.width, a.width);
}

__global__ void __launch_bounds__(kThreads)
    AppendKernel(const __grid_constant__ AppendTokensArgs a) {
  TriggerDependents();
  WaitForPrevious();
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= a.count) return;
  const int slot = a.slot[i], position = a.position[i] + 1, token = a.sampled[i];
  if (slot < 0 || token < 0 || position >= a.tokens_stride) return;
  a.tokens[static_cast<int64_t>(slot) * a.tokens_stride + position] = token;
}

template <typename T, typename Args>
cudaError_t LaunchRows(const Launch& launch, const Args& args, void (*vector)(Args),
                       void (*scalar)(Args), int width, const void* in) {
  const bool wide = width * sizeof(T) % 16 == 0 && Aligned16(in) && Aligned16(args.out);
  return LaunchKernel(launch, wide ? vector : scalar, dim3(args.num_rows), dim3(kThreads), 0, 1,
                      args);
}

template <typename T>
cudaError_t EmbedOf(const Launch& launch, const EmbedRowsArgs& args) {
  return LaunchRows<T>(launch, args, EmbedKernel<T, 16 / sizeof(T)>, EmbedKernel<T, 1>, args.dim,
                       args.table);
}

// Bits are moved, so that only the element's size matters.
template <typename T>
cudaError_t GatherOf(const Launch& launch, const GatherRowsArgs& args) {
  return LaunchRows<T>(launch, args, GatherKernel<T, 16 / sizeof(T)>, GatherKernel<T, 1>,
                       args.width, args.in);
}

}  // namespace

cudaError_t EmbedRows(const Launch& launch, const EmbedRowsArgs& args) {
  if (args.num_rows < 0 || args.dim <= 0 || args.tokens_stride <= 0 || args.local_vocab < 0) {
    return cudaErrorInvalidValue;
  }
  if (args.num_rows == 0) return cudaSuccess;
  switch (args.type) {
    case Type::kF32:
      return EmbedOf<float>(launch, args);
    case Type::kF16:
      return EmbedOf<__half>(launch, args);
    case Type::kBF16:
      return EmbedOf<__nv_bfloat16>(launch, args);
    case Type::kE4M3:
      break;
  }
  return cudaErrorInvalidValue;
}

cudaError_t GatherRows(const Launch& launch, const GatherRowsArgs& args) {
  if (args.num_rows < 0 || args.width <= 0) return cudaErrorInvalidValue;
  if (args.num_rows == 0) return cudaSuccess;
  switch (TypeBytes(args.type)) {
    case 4:
      return GatherOf<float>(launch, args);
    case 2:
      return GatherOf<__half>(launch, args);
    case 1:
      return GatherOf<uint8_t>(launch, args);
  }
  return cudaErrorInvalidValue;
}

cudaError_t AppendTokens(const Launch& launch, const AppendTokensArgs& args) {
  if (args.count < 0 || args.tokens_stride <= 0) return cudaErrorInvalidValue;
  if (args.count == 0) return cudaSuccess;
  return LaunchKernel(launch, AppendKernel, dim3((args.count + kThreads - 1) / kThreads),
                      dim3(kThreads), 0, 1, args);
}

}  // namespace lockstep::kernels
