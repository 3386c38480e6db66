#include <iterator>

#include "kernels/device.cuh"
#include "tests/kernels/exchange_rounds.h"

namespace lockstep::kernels::testing {
namespace {

__device__ inline uint32_t Mix(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t h = a * 0x9E3779B1u ^ b * 0x85EBCA77u ^ c * 0xC2B2AE3Du;
  h ^= h >> 15;
  h *= 0x2C1B3C6Du;
  h ^= h >> 12;
  h *= 0x297A2D39u;
  return h ^ (h >> 15);
}
// What rank `rank` puts at i in a round: adds up exactly in every type.
__device__ inline float Value(int rank, uint32_t round, uint32_t i) {
  return static_cast<float>(static_cast<int>(Mix(rank + 1, round, i) % 17) - 8);
}
constexpr int kResidual = 100;  // as a rank

template <typename T>
__global__ void MakeInput(const RoundsProgress* progress, int k, int rank, T* in, T* residual,
                          uint32_t count) {
  TriggerDependents();
  WaitForPrevious();
  const uint32_t round = static_cast<uint32_t>(progress->round) + k;
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    in[i] = FromFloat<T>(Value(rank, round, i));
    residual[i] = FromFloat<T>(Value(kResidual, round, i));
  }
}

// The checks trigger late: ranks that share a GPU must not fill it with kernels
// launched ahead while a peer's exchange waits for room.
//
// The sums are in residual_out where there is one, and `out` is only digested.
template <typename T>
__global__ void CheckSums(RoundsProgress* progress, int k, int size, const T* out,
                          const T* residual_out, uint32_t count) {
  WaitForPrevious();
  TriggerDependents();
  const uint32_t round = static_cast<uint32_t>(progress->round) + k;
  unsigned long long errors = 0, digest = 0;
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    float sum = residual_out != nullptr ? Value(kResidual, round, i) : 0.0f;
    for (int r = 0; r < size; ++r) sum += Value(r, round, i);
    if (ToFloat(residual_out != nullptr ? residual_out[i] : out[i]) != sum) ++errors;
    digest += Mix(__float_as_uint(ToFloat(out[i])), round, i);
  }
  if (errors != 0) atomicAdd(&progress->errors, errors);
  atomicAdd(&progress->digest, digest);
}

__global__ void MakeWords(const RoundsProgress* progress, int k, int rank, uint32_t* in,
                          uint32_t words) {
  TriggerDependents();
  WaitForPrevious();
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < words) in[i] = Mix(rank, static_cast<uint32_t>(progress->round) + k, i);
}
__global__ void CheckWords(RoundsProgress* progress, int k, int size, const uint32_t* out,
                           uint32_t words) {
  WaitForPrevious();
  TriggerDependents();
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= words) return;
  for (int r = 0; r < size; ++r) {
    if (out[r * words + i] != Mix(r, static_cast<uint32_t>(progress->round) + k, i)) {
      atomicAdd(&progress->errors, 1ull);
    }
  }
}

__global__ void Advance(RoundsProgress* progress, int rounds) {
  TriggerDependents();
  WaitForPrevious();
  progress->round += rounds;
}

// words > 0: an all-gather of so many.
struct Item {
  int rows, hidden;
  bool fused, two_shot;
  uint32_t words;
};
constexpr Item kItems[] = {
    {1, 4096, true, false, 0},    {1, 4096, true, false, 0}, {0, 0, false, false, 2},
    {7, 1032, true, false, 0},    {1, 5, false, false, 0},   {5, 4096, true, true, 0},
    {1, 70001, false, true, 0},   {0, 0, false, false, 300}, {1, 40000, false, false, 0},
    {16, 4096, true, true, 0},    {0, 0, false, false, 3},   {2, 2048, true, false, 0},
    {1, 131072, false, false, 0}, {1, 100, false, true, 0},  {1, 300000, false, true, 0},
};

struct Context {
  const Launch& launch;
  const Peers& peers;
  const ExchangeLayout& layout;
  int threads;
  const RoundsBuffers& buffers;
};

cudaError_t Gather(const Context& c, const Item& item, int k) {
  auto* in = static_cast<uint32_t*>(c.buffers.in);
  auto* out = static_cast<uint32_t*>(c.buffers.out);
  const dim3 grid((item.words + 127) / 128), block(128);
  cudaError_t error = LaunchKernel(c.launch, MakeWords, grid, block, 0, 1, c.buffers.progress, k,
                                   c.peers.rank, in, item.words);
  if (error != cudaSuccess) return error;
  error = SmallAllGather(c.launch, c.peers, c.layout, in, out, size_t{item.words} * 4);
  if (error != cudaSuccess) return error;
  return LaunchKernel(c.launch, CheckWords, grid, block, 0, 1, c.buffers.progress, k, c.peers.size,
                      out, item.words);
}

template <typename T>
cudaError_t Reduce(const Context& c, const Item& item, int k) {
  T* in = static_cast<T*>(c.buffers.in);
  T* residual = static_cast<T*>(c.buffers.residual);
  const uint32_t count = item.rows * item.hidden;
  cudaError_t error = LaunchKernel(c.launch, MakeInput<T>, dim3(8), dim3(256), 0, 1,
                                   c.buffers.progress, k, c.peers.rank, in, residual, count);
  if (error != cudaSuccess) return error;
  AllReduceArgs args;
  args.type = sizeof(T) == 4 ? Type::kF32 : Type::kBF16;
  args.rows = item.rows;
  args.hidden = item.hidden;
  args.in = in;
  args.out = item.fused ? c.buffers.out : in;
  if (item.fused) {
    args.residual = args.residual_out = residual;
    args.norm_weight = c.buffers.weight;
  }
  args.max_blocks = c.threads / 256;
  error = AllReduce(c.launch, c.peers, c.layout,
                    item.two_shot ? AllReducePath::kTwoShot : AllReducePath::kOneShot, args);
  if (error != cudaSuccess) return error;
  return LaunchKernel(c.launch, CheckSums<T>, dim3(8), dim3(256), 0, 1, c.buffers.progress, k,
                      c.peers.size, static_cast<const T*>(args.out),
                      static_cast<const T*>(args.residual_out), count);
}

}  // namespace

cudaError_t EnqueueRounds(const Launch& launch, const Peers& peers, const ExchangeLayout& layout,
                          Type type, int threads, const RoundsBuffers& buffers, int* rounds) {
  const Context context{launch, peers, layout, threads, buffers};
  *rounds = static_cast<int>(std::size(kItems));
  for (int k = 0; k < *rounds; ++k) {
    const Item& item = kItems[k];
    const cudaError_t error = item.words > 0       ? Gather(context, item, k)
                              : type == Type::kF32 ? Reduce<float>(context, item, k)
                                                   : Reduce<__nv_bfloat16>(context, item, k);
    if (error != cudaSuccess) return error;
  }
  return LaunchKernel(launch, Advance, dim3(1), dim3(1), 0, 1, buffers.progress, *rounds);
}

}  // namespace lockstep::kernels::testing
