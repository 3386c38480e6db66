// Thousands of rounds of exchanges in replayed CUDA graphs, inputs that change
// every round (a stale slot shows), checked on the device, so that nothing but
// the exchanges keeps the ranks together.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "kernels/all_reduce.h"
#include "kernels/device.cuh"
#include "tests/kernels/virtual_ranks.h"

namespace lockstep::kernels {
namespace {

using testing::Guarded;
using testing::SanitizerRun;
using testing::VirtualRanks;

struct Progress {
  unsigned long long round, errors, digest;
};

__host__ __device__ inline uint32_t Mix(uint32_t a, uint32_t b, uint32_t c) {
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

template <typename T>
__global__ void MakeInput(const Progress* progress, int k, int rank, T* in, T* residual,
                          uint32_t count) {
  TriggerDependents();
  WaitForPrevious();
  const uint32_t round = static_cast<uint32_t>(progress->round) + k;
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    in[i] = FromFloat<T>(Value(rank, round, i));
    residual[i] = FromFloat<T>(Value(100, round, i));
  }
}

// out: the sums themselves, or only digested if `residual_out` holds them.
template <typename T>
__global__ void CheckSums(Progress* progress, int k, int size, const T* out, const T* residual_out,
                          uint32_t count) {
  TriggerDependents();
  WaitForPrevious();
  const uint32_t round = static_cast<uint32_t>(progress->round) + k;
  unsigned long long errors = 0, digest = 0;
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    float sum = residual_out != nullptr ? Value(100, round, i) : 0.0f;
    for (int r = 0; r < size; ++r) sum += Value(r, round, i);
    if (ToFloat(residual_out != nullptr ? residual_out[i] : out[i]) != sum) ++errors;
    digest += Mix(__float_as_uint(ToFloat(out[i])), round, i);
  }
  if (errors != 0) atomicAdd(&progress->errors, errors);
  atomicAdd(&progress->digest, digest);
}

__global__ void MakeWords(const Progress* progress, int k, int rank, uint32_t* in, uint32_t words) {
  TriggerDependents();
  WaitForPrevious();
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < words) in[i] = Mix(rank, static_cast<uint32_t>(progress->round) + k, i);
}
__global__ void CheckWords(Progress* progress, int k, int size, const uint32_t* out,
                           uint32_t words) {
  TriggerDependents();
  WaitForPrevious();
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= words) return;
  for (int r = 0; r < size; ++r) {
    if (out[r * words + i] != Mix(r, static_cast<uint32_t>(progress->round) + k, i)) {
      atomicAdd(&progress->errors, 1ull);
    }
  }
}

__global__ void Advance(Progress* progress, int rounds) {
  TriggerDependents();
  WaitForPrevious();
  progress->round += rounds;
}

// One exchange of a graph. words > 0: an all-gather of so many.
struct Item {
  int rows, hidden;
  bool fused, two_shot;
  uint32_t words;
};

// An odd number of each kind: every replay begins in the other slot.
std::vector<Item> Items(int size) {
  std::vector<Item> items = {
      {1, 4096, true, false, 0},   {1, 4096, true, false, 0}, {0, 0, false, false, 2},
      {7, 1032, true, false, 0},   {1, 5, false, false, 0},   {5, 4096, true, true, 0},
      {1, 70001, false, true, 0},  {0, 0, false, false, 300}, {1, 40000, false, false, 0},
      {16, 4096, true, true, 0},   {0, 0, false, false, 3},   {2, 2048, true, false, 0},
      {1, 131072, false, false, 0}};
  if (size > 2) items.push_back({1, 300000, false, true, 0});
  return items;
}

template <typename T>
constexpr Type kTypeOf = sizeof(T) == 4 ? Type::kF32 : Type::kBF16;

struct RankState {
  cudaGraphExec_t graph = nullptr;
  Guarded in{1 << 21}, residual{1 << 21}, out{1 << 21}, weight{1 << 16}, progress{sizeof(Progress)};
};

template <typename T>
void Capture(const VirtualRanks& ranks, int rank, bool pdl, RankState* state) {
  const Launch launch = ranks.launch(rank, pdl);
  auto* progress = static_cast<Progress*>(state->progress.get());
  T* in = static_cast<T*>(state->in.get());
  T* residual = static_cast<T*>(state->residual.get());
  T* out = static_cast<T*>(state->out.get());
  ASSERT_CUDA(cudaStreamBeginCapture(launch.stream, cudaStreamCaptureModeThreadLocal));
  int k = 0;
  for (const Item& item : Items(ranks.size())) {
    ++k;
    if (item.words > 0) {
      auto* words = reinterpret_cast<uint32_t*>(in);
      auto* all = reinterpret_cast<uint32_t*>(out);
      const dim3 grid((item.words + 127) / 128), block(128);
      ASSERT_CUDA(
          LaunchKernel(launch, MakeWords, grid, block, 0, 1, progress, k, rank, words, item.words));
      ASSERT_CUDA(
          SmallAllGather(launch, ranks.peers(rank), ranks.layout(), words, all, item.words * 4));
      ASSERT_CUDA(LaunchKernel(launch, CheckWords, grid, block, 0, 1, progress, k, ranks.size(),
                               all, item.words));
      continue;
    }
    AllReduceArgs args;
    args.type = kTypeOf<T>;
    args.rows = item.rows;
    args.hidden = item.hidden;
    args.in = in;
    args.out = item.fused ? out : in;
    if (item.fused) {
      args.residual = args.residual_out = residual;
      args.norm_weight = state->weight.get();
    }
    args.max_blocks = ranks.BlocksAtOnce(item.fused ? 512 : 256) * 3 / 4;
    const uint32_t count = item.rows * item.hidden;
    ASSERT_CUDA(LaunchKernel(launch, MakeInput<T>, dim3(8), dim3(256), 0, 1, progress, k, rank, in,
                             residual, count));
    ASSERT_CUDA(AllReduce(launch, ranks.peers(rank), ranks.layout(),
                          item.two_shot ? AllReducePath::kTwoShot : AllReducePath::kOneShot, args));
    ASSERT_CUDA(LaunchKernel(launch, CheckSums<T>, dim3(8), dim3(256), 0, 1, progress, k,
                             ranks.size(), static_cast<const T*>(args.out),
                             static_cast<const T*>(args.residual_out), count));
  }
  ASSERT_CUDA(LaunchKernel(launch, Advance, dim3(1), dim3(1), 0, 1, progress, k));
  cudaGraph_t graph = nullptr;
  ASSERT_CUDA(cudaStreamEndCapture(launch.stream, &graph));
  ASSERT_CUDA(cudaGraphInstantiate(&state->graph, graph, 0));
  ASSERT_CUDA(cudaGraphDestroy(graph));
}

template <typename T>
void Soak(int size, bool pdl, int replays) {
  SCOPED_TRACE(::testing::Message() << size << " ranks, pdl " << pdl);
  VirtualRanks ranks(size, ExchangeLayout{.one_shot_bytes = 1 << 20, .two_shot_bytes = 2 << 20});
  ranks.set_patience_ns(5'000'000'000);
  std::vector<RankState> states;
  for (int r = 0; r < size; ++r) {
    ranks.Use(r);
    RankState& state = states.emplace_back();
    ASSERT_CUDA(cudaMemset(state.progress.get(), 0, sizeof(Progress)));
    std::vector<T> weight(8192);
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = T(0.5f + i % 7);
    state.weight.Set(weight);
    Capture<T>(ranks, r, pdl, &state);
    ASSERT_CUDA(cudaGraphUpload(state.graph, ranks.launch(r).stream));
  }
  ranks.Synchronize();
  for (int i = 0; i < replays; ++i) {
    // Who comes first changes too.
    for (int j = 0; j < size; ++j) {
      const int r = (i + j) % size;
      ranks.Use(r);
      ASSERT_CUDA(cudaGraphLaunch(states[r].graph, ranks.launch(r).stream));
    }
  }
  ranks.Synchronize();
  if (::testing::Test::HasFatalFailure()) return;
  unsigned long long digest = 0;
  for (int r = 0; r < size; ++r) {
    ranks.Use(r);
    const Progress p = states[r].progress.Get<Progress>()[0];
    EXPECT_EQ(p.round, Items(size).size() * static_cast<unsigned long long>(replays));
    EXPECT_EQ(p.errors, 0u) << "rank " << r;
    if (r == 0) digest = p.digest;
    EXPECT_EQ(p.digest, digest) << "rank " << r << " has other bits than rank 0";
    EXPECT_TRUE(states[r].out.GuardsIntact() && states[r].residual.GuardsIntact());
    cudaGraphExecDestroy(states[r].graph);
  }
}

int Replays() { return SanitizerRun() ? 2 : 300; }

TEST(AllReduceSoakTest, TwoRanksStayExact) {
  Soak<__nv_bfloat16>(2, false, Replays());
  Soak<__nv_bfloat16>(2, true, Replays());
}
TEST(AllReduceSoakTest, FourRanksStayExact) {
  Soak<__nv_bfloat16>(4, false, Replays());
  Soak<float>(4, true, Replays());
}
TEST(AllReduceSoakTest, AnyNumberOfRanksStaysExact) {
  for (const int size : {3, 5, 6, 7, 8}) {
    if (SanitizerRun() && size > 3) return;
    Soak<__nv_bfloat16>(size, true, Replays() / 3 + 1);
  }
}

}  // namespace
}  // namespace lockstep::kernels
