// What the files of the sampling family share: where things lie in the workspace
// and in the exchanges, what a row is, reductions and scans of 64-bit integers.
// All loads of what another kernel wrote bypass L1 (__ldcg) and come after
// WaitForPrevious.
#ifndef LOCKSTEP_KERNELS_SAMPLE_INTERNAL_CUH_
#define LOCKSTEP_KERNELS_SAMPLE_INTERNAL_CUH_

#include <cstdint>
#include <cstring>

#include "kernels/device.cuh"
#include "kernels/sample.h"
#include "kernels/sample_math.h"

namespace lockstep::kernels::sample {

constexpr int kThreads = 256;
constexpr int kItems = 16;                 // values of a thread
constexpr int kChunk = kThreads * kItems;  // of a block, except in the greedy maximum
constexpr int kMaxChunks = 256;

inline int NumChunks(int columns) { return columns > kChunk ? (columns + kChunk - 1) / kChunk : 1; }

// What top_k and top_p keep of a row: classes below `threshold`, and the first
// `ties` tokens of it by id. Until that is known, what the next pass over the
// tokens of the coarse class `bin` is to find.
struct RowCut {
  static constexpr uint32_t kNoBin = ~0u;
  uint32_t threshold = kNumClasses;
  uint32_t ties = 0;
  uint32_t bin = kNoBin;
  uint32_t by_count = 0;      // target counts tokens, otherwise mass
  uint64_t target = 0;        // the class at which the running sum reaches it
  uint64_t count_before = 0;  // in the classes before bin
  uint64_t mass_before = 0;
  // With a threshold: what is kept of all ranks and, classes below the threshold
  // and its ties apart, of those before this one.
  uint64_t kept = 0;
  uint64_t ranks_mass = 0;
  uint64_t ranks_ties = 0;
};
static_assert(sizeof(RowCut) % 16 == 0);

// kMass, a chunk or a rank.
struct MassPart {
  uint64_t mass = 0;  // of classes below the threshold
  uint64_t ties = 0;  // tokens of the threshold
};
static_assert(sizeof(MassPart) == SampleExchangeBytes(kMass));

// kScore, a chunk or a rank.
struct ScorePart {
  double sum = 0.0;                    // of exp(logit - max)
  float max = 0.0f;                    // -infinity: of nothing
  uint32_t before = 0;                 // tokens more likely than the one scored
  uint64_t top[kMaxTopLogprobs] = {};  // TokenKey, descending, 0 beyond the end
};
static_assert(sizeof(ScorePart) == SampleExchangeBytes(kScore));

struct Workspace {
  float* adjusted = nullptr;  // [rows][adjusted_stride]
  int64_t adjusted_stride = 0;
  RowCut* cuts = nullptr;       // [rows]
  MassPart* masses = nullptr;   // [rows][chunks]
  ScorePart* scores = nullptr;  // [rows][chunks]
  size_t bytes = 0;
};
Workspace LayOut(const SampleNeeds& needs, int rows, int columns, void* base);

// A phase's kernels take the arguments and where the workspace's parts are.
struct Job {
  SampleArgs a;
  Workspace w;
  int chunks = 0;  // of kChunk
};

cudaError_t RunMaximum(const Launch& launch, const Job& job);
cudaError_t RunCoarse(const Launch& launch, const Job& job);
cudaError_t RunSelectFine(const Launch& launch, const Job& job, SamplePhase phase);
cudaError_t RunFine(const Launch& launch, const Job& job);
cudaError_t RunNested(const Launch& launch, const Job& job);
cudaError_t RunMass(const Launch& launch, const Job& job);
cudaError_t RunChoose(const Launch& launch, const Job& job);
cudaError_t RunScore(const Launch& launch, const Job& job);
cudaError_t RunFinish(const Launch& launch, const Job& job);

#ifdef __CUDACC__

// A struct of whole 16 byte pieces, 16 byte aligned.
template <typename T>
__device__ __forceinline__ T LoadStruct(const T* at) {
  static_assert(sizeof(T) % 16 == 0);
  uint4 words[sizeof(T) / 16];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 16); ++i) {
    words[i] = __ldcg(reinterpret_cast<const uint4*>(at) + i);
  }
  T value;
  memcpy(static_cast<void*>(&value), static_cast<const void*>(words), sizeof(T));
  return value;
}

// Rank r's contribution for `row`.
template <typename T>
__device__ __forceinline__ const T* Gathered(const SampleArgs& a, SamplePhase phase, int r,
                                             int row) {
  const size_t bytes = SampleExchangeBytes(phase);
  return reinterpret_cast<const T*>(static_cast<const char*>(a.gathered[phase]) +
                                    (static_cast<size_t>(r) * a.rows + row) * bytes);
}
template <typename T>
__device__ __forceinline__ T* Sent(const SampleArgs& a, SamplePhase phase, int row) {
  return reinterpret_cast<T*>(static_cast<char*>(a.send[phase]) +
                              static_cast<size_t>(row) * SampleExchangeBytes(phase));
}

// The largest of every rank's 64-bit word of a row; the same in all threads.
__device__ __forceinline__ uint64_t GatheredMax(const SampleArgs& a, SamplePhase phase, int row) {
  uint64_t max = 0;
  for (int r = 0; r < a.tp_size; ++r) {
    const auto* at = Gathered<unsigned long long>(a, phase, r, row);
    max = ::max(max, static_cast<uint64_t>(__ldcg(at)));
  }
  return max;
}

// kChoose: 0, or a token and its logit.
__device__ __forceinline__ uint64_t MakeChoice(uint32_t token, float logit) {
  return static_cast<uint64_t>(token + 1) << 32 | __float_as_uint(logit);
}
__device__ __forceinline__ uint32_t ChoiceToken(uint64_t choice) {
  return static_cast<uint32_t>(choice >> 32) - 1;
}
__device__ __forceinline__ float ChoiceLogit(uint64_t choice) {
  return __uint_as_float(static_cast<uint32_t>(choice));
}

__device__ __forceinline__ bool HasPenalties(const SlotParams& p) {
  return p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
}

// A row as every phase sees it.
struct Row {
  int slot;  // -1: padding, and nothing else is set
  int position;
  bool scores;
  SlotParams params;

  __device__ __forceinline__ Row(const SampleArgs& a, int row) {
    // Together, so that they wait for memory once.
    slot = __ldcg(a.slot + row);
    position = __ldcg(a.position + row);
    scores = a.scores != nullptr && __ldcg(a.scores + row) != 0;
    if (slot >= 0) params = LoadStruct(a.params + slot);
  }
  // Its ending ids are still masked.
  __device__ __forceinline__ bool masks() const {
    return params.num_ending_ids > 0 && position + 1 - params.num_prompt_tokens < params.min_tokens;
  }
  // Its values are in the workspace, not the logits.
  __device__ __forceinline__ bool adjusts(const SampleArgs& a) const {
    return a.needs.adjust && !scores && (params.num_bias > 0 || HasPenalties(params) || masks());
  }
  __device__ __forceinline__ const float* values(const Job& job, int row) const {
    return adjusts(job.a) ? job.w.adjusted + row * job.w.adjusted_stride
                          : job.a.logits + row * job.a.logits_stride;
  }
  // Once the row's maximum is known.
  __device__ __forceinline__ bool draws(const SampleArgs& a, uint64_t maximum) const {
    return a.needs.draw && !scores && params.temperature > 0.0f && params.top_k != 1 &&
           maximum != kPoisonedKey && KeyValue(maximum) >= -3.402823466e38f;
  }
  __device__ __forceinline__ int known_token(const SampleArgs& a) const {
    return __ldcg(a.tokens + slot * a.tokens_stride + position + 1);
  }
};

// A row that draws: its maximum and how values become classes.
struct DrawRow : Row {
  bool active = false;
  float max = 0.0f;
  float inverse_temperature = 0.0f;

  __device__ __forceinline__ DrawRow(const SampleArgs& a, int row)
      : DrawRow(a, row, GatheredMax(a, kMaximum, row)) {}
  __device__ __forceinline__ DrawRow(const SampleArgs& a, int row, uint64_t maximum) : Row(a, row) {
    if (slot < 0) return;
    active = draws(a, maximum);
    max = KeyValue(maximum);
    inverse_temperature = InverseTemperature(params.temperature);
  }
  __device__ __forceinline__ uint32_t class_of(float v) const {
    return TokenClass(v, max, inverse_temperature);
  }
  // Also where it cuts nothing, if nothing else tells its mass.
  __device__ __forceinline__ bool counts_classes(const SampleArgs& a) const {
    return params.top_k > 0 || params.top_p < 1.0f || !HasPhase(a.needs, kMass);
  }
};

__device__ __forceinline__ uint64_t WarpMax64(uint64_t v) {
  const uint32_t high = __reduce_max_sync(~0u, static_cast<uint32_t>(v >> 32));
  const uint32_t low =
      __reduce_max_sync(~0u, static_cast<uint32_t>(v >> 32) == high ? static_cast<uint32_t>(v) : 0);
  return static_cast<uint64_t>(high) << 32 | low;
}
template <typename T>
__device__ __forceinline__ T WarpTotal(T v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}

__device__ __forceinline__ uint64_t ScanWarp(uint64_t v) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const uint64_t other = __shfl_up_sync(~0u, v, offset);
    if (lane >= offset) v += other;
  }
  return v;
}

// The sum over the threads before this one, and over all of them. `scratch`: a
// value a warp, not used by another call without a barrier between.
template <typename T>
struct Scanned {
  T before, total;
};
template <typename T>
__device__ __forceinline__ Scanned<T> BlockScan(T v, T* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  T sum = v;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const T other = __shfl_up_sync(~0u, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  const T mine = lane < warps ? scratch[lane] : T{};
  const T total = WarpTotal(mine);
  const T before = WarpTotal(lane < warp ? mine : T{});
  return {before + sum - v, total};
}

// Calls f(value, column) for every column of [begin, end), 4 at once where the
// row allows; each column goes to one thread, a thread's columns ascend.
template <int kBlock = kThreads, typename F>
__device__ __forceinline__ void ForEachValue(const float* row, bool vector, int begin, int end,
                                             F f) {
  constexpr int kUnroll = 4;
  const int tid = static_cast<int>(threadIdx.x);
  const int vector_end = vector ? begin + (end - begin) / 4 * 4 : begin;
  for (int base = begin; base < vector_end; base += 4 * kBlock * kUnroll) {
    float4 v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + (u * kBlock + tid) * 4;
      if (i < vector_end) v[u] = __ldcg(reinterpret_cast<const float4*>(row + i));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + (u * kBlock + tid) * 4;
      if (i < vector_end) {
        f(v[u].x, i);
        f(v[u].y, i + 1);
        f(v[u].z, i + 2);
        f(v[u].w, i + 3);
      }
    }
  }
  for (int i = vector_end + tid; i < end; i += kBlock) f(__ldcg(row + i), i);
}

__device__ __forceinline__ bool IsAligned(const void* row) {
  return reinterpret_cast<uintptr_t>(row) % 16 == 0;
}

#endif  // __CUDACC__

}  // namespace lockstep::kernels::sample

#endif  // LOCKSTEP_KERNELS_SAMPLE_INTERNAL_CUH_
