// The first and the last phase of sampling: what changes single logits and the
// row's maximum; what a chosen token is written to.
//
// kMaximum reads each logit once (4 bytes), and where a row is adjusted writes it
// once and reads its count (2 bytes). Blocks meet in an atomic maximum of 64-bit
// keys, of which the order does not matter. kFinish is a warp a row.
#include <algorithm>

#include "kernels/sample_internal.cuh"

namespace lockstep::kernels::sample {
namespace {

// The maximum key of what it is shown, in ascending order of id.
struct Best {
  float value = -INFINITY;
  int column = -1;
  bool finite = true;

  __device__ __forceinline__ void See(float v, int i) {
    if (column < 0 || v > value) {
      value = v;
      column = i;
    }
  }
  __device__ __forceinline__ void SeeRaw(float v, int i) {
    finite &= fabsf(v) <= 3.402823466e38f;
    See(v, i);
  }
  __device__ __forceinline__ uint64_t key(int first_vocab) const {
    if (!finite) return kPoisonedKey;
    return column < 0 ? 0 : TokenKey(value, static_cast<uint32_t>(first_vocab + column));
  }
};

// At most 32 warps.
__device__ __forceinline__ void BlockAtomicMax(uint64_t key, uint64_t* scratch,
                                               unsigned long long* out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  key = WarpMax64(key);
  if (lane == 0) scratch[warp] = key;
  __syncthreads();
  if (warp == 0) {
    key = WarpMax64(lane < static_cast<int>(blockDim.x) / 32 ? scratch[lane] : 0);
    if (lane == 0 && key != 0) atomicMax(out, static_cast<unsigned long long>(key));
  }
}

__device__ __forceinline__ bool SlotPoisoned(const SampleArgs& a, int slot) {
  return a.poisoned != nullptr && __ldcg(a.poisoned + slot) != 0;
}

constexpr int kGreedyThreads = 256;

__device__ __forceinline__ void MarkBegin(const SampleArgs& a) {
  if (a.begin_ns == nullptr || blockIdx.x + blockIdx.y + threadIdx.x != 0) return;
  const uint64_t taken = __ldcg(&a.collectives->wait_ns) + __ldcg(&a.collectives->transfer_ns);
  __stcg(a.begin_ns, DeviceClockNs() - taken);
}

__global__ void __launch_bounds__(kGreedyThreads)
    MaximumKernel(const __grid_constant__ Job job, int chunk) {
  __shared__ uint64_t scratch[kGreedyThreads / 32];
  TriggerDependents();
  WaitForPrevious();
  const SampleArgs& a = job.a;
  MarkBegin(a);
  const int row = static_cast<int>(blockIdx.y);
  const int slot = __ldcg(a.slot + row);
  if (slot < 0) return;
  const bool poisoned =
      SlotPoisoned(a, slot) && (a.scores == nullptr || __ldcg(a.scores + row) == 0);
  const int begin = static_cast<int>(blockIdx.x) * chunk;
  const float* logits = a.logits + row * a.logits_stride;
  Best best;
  ForEachValue<kGreedyThreads>(logits, IsAligned(logits), begin, min(begin + chunk, a.columns),
                               [&](float v, int i) { best.SeeRaw(v, i); });
  const uint64_t key = poisoned ? kPoisonedKey : best.key(a.first_vocab);
  BlockAtomicMax(key, scratch, Sent<unsigned long long>(a, kMaximum, row));
}

__device__ void Clear(void* at, size_t bytes) {
  uint4* words = static_cast<uint4*>(at);
  const int stride = static_cast<int>(gridDim.x) * kThreads;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < static_cast<int>(bytes / 16); i += stride) {
    words[i] = {};
  }
}

// Sums of later phases start at zero.
__device__ void ClearSums(const SampleArgs& a, int row) {
  if (a.needs.cut) {
    Clear(Sent<char>(a, kCoarse, row), SampleExchangeBytes(kCoarse));
    Clear(Sent<char>(a, kFine, row), SampleExchangeBytes(kFine));
  }
  if (a.needs.nested) Clear(Sent<char>(a, kNested, row), SampleExchangeBytes(kNested));
  if (HasPhase(a.needs, kMass)) Clear(Sent<char>(a, kMass, row), SampleExchangeBytes(kMass));
}

__device__ __forceinline__ float Penalized(float logit, uint16_t count, const SlotParams& p) {
  if (count == 0) return logit;
  logit = logit > 0.0f ? __fdiv_rn(logit, p.repetition_penalty)
                       : __fmul_rn(logit, p.repetition_penalty);
  const int generated = count & 0x7fff;
  if (generated > 0) {
    logit = __fsub_rn(logit, __fmul_rn(p.frequency_penalty, static_cast<float>(generated)));
    logit = __fsub_rn(logit, p.presence_penalty);
  }
  // A penalty next to 0 makes infinities of large logits.
  return fminf(fmaxf(logit, -3.402823466e38f), 3.402823466e38f);
}

// With all that may precede a draw: adjusted rows are written to the workspace.
__global__ void __launch_bounds__(kThreads) AdjustedMaximumKernel(const __grid_constant__ Job job) {
  __shared__ uint64_t scratch[kThreads / 32];
  __shared__ __align__(16) float values[kChunk];
  TriggerDependents();
  WaitForPrevious();
  const SampleArgs& a = job.a;
  MarkBegin(a);
  const int row_index = static_cast<int>(blockIdx.y);
  const Row row(a, row_index);
  if (row.slot < 0) return;
  const SlotParams& p = row.params;
  if (a.needs.draw && !row.scores && p.temperature > 0.0f) ClearSums(a, row_index);

  const int begin = static_cast<int>(blockIdx.x) * kChunk;
  const int end = min(begin + kChunk, a.columns);
  const float* logits = a.logits + row_index * a.logits_stride;
  Best best;
  if (!row.adjusts(a)) {
    ForEachValue(logits, IsAligned(logits), begin, end, [&](float v, int i) { best.SeeRaw(v, i); });
  } else {
    ForEachValue(logits, IsAligned(logits), begin, end, [&](float v, int i) {
      best.SeeRaw(v, i);
      values[i - begin] = v;
    });
    __syncthreads();
    const int first = a.first_vocab + begin, count = end - begin;
    const int64_t slot = row.slot;
    for (int i = static_cast<int>(threadIdx.x); i < p.num_bias; i += kThreads) {
      const int at = __ldcg(a.bias_ids + slot * kMaxBias + i) - first;
      if (at >= 0 && at < count) values[at] += __ldcg(a.bias_values + slot * kMaxBias + i);
    }
    __syncthreads();
    if (HasPenalties(p)) {
      const uint16_t* counts = a.counts + slot * a.counts_stride + begin;
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
        values[i] = Penalized(values[i], __ldcg(counts + i), p);
      }
    }
    __syncthreads();
    if (row.masks()) {
      for (int i = static_cast<int>(threadIdx.x); i < p.num_ending_ids; i += kThreads) {
        const int at = __ldcg(a.ending_ids + slot * kMaxEndingIds + i) - first;
        if (at >= 0 && at < count) values[at] = -INFINITY;
      }
    }
    __syncthreads();
    best.value = -INFINITY;
    best.column = -1;
    float* adjusted = job.w.adjusted + row_index * job.w.adjusted_stride + begin;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      adjusted[i] = values[i];
      best.See(values[i], begin + i);
    }
  }
  const bool poisoned = !row.scores && SlotPoisoned(a, row.slot);
  const uint64_t key = poisoned ? kPoisonedKey : best.key(a.first_vocab);
  BlockAtomicMax(key, scratch, Sent<unsigned long long>(a, kMaximum, row_index));
}

// Lane r has rank r's part. The token's log-probability and the most likely.
__device__ void WriteLogprobs(const SampleArgs& a, int row, float logit, int num_top) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  ScorePart part;
  part.max = -INFINITY;
  if (lane < a.tp_size) part = LoadStruct(Gathered<ScorePart>(a, kScore, lane, row));
  const float max = WarpMax(part.max);
  const double scaled = part.sum * exp(static_cast<double>(part.max) - static_cast<double>(max));
  const double log_sum = static_cast<double>(max) + log(WarpTotal(part.sum > 0.0 ? scaled : 0.0));
  const auto logprob = [&](float v) {
    return static_cast<float>(static_cast<double>(v) - log_sum);
  };
  const uint32_t before = WarpTotal(part.before);
  RowLogprobs* out = a.logprobs + row;
  int found = 0;
  for (; found < num_top; ++found) {
    const uint64_t key = WarpMax64(part.top[0]);
    if (key == 0) break;
    if (part.top[0] == key) {
#pragma unroll
      for (int i = 0; i + 1 < kMaxTopLogprobs; ++i) part.top[i] = part.top[i + 1];
      part.top[kMaxTopLogprobs - 1] = 0;
    }
    if (lane == 0) {
      out->top_id[found] = static_cast<int32_t>(KeyToken(key));
      out->top_logprob[found] = logprob(KeyValue(key));
    }
  }
  if (lane == 0) {
    out->logprob = logprob(logit);
    out->rank = before + 1;
    out->num_top = static_cast<uint32_t>(found);
  }
}

__device__ void Count(const SampleArgs& a, int slot, int token) {
  const int column = token - a.first_vocab;
  if (column < 0 || column >= a.columns) return;
  uint16_t* count = a.counts + slot * a.counts_stride + column;
  const uint16_t old = __ldcg(count);
  if ((old & 0x7fff) < 0x7fff) *count = static_cast<uint16_t>(old + 1);
}

constexpr int kFinishRows = 4;  // of a block, a warp each

__global__ void __launch_bounds__(32 * kFinishRows)
    FinishKernel(const __grid_constant__ SampleArgs a) {
  TriggerDependents();
  WaitForPrevious();
  const int row_index = static_cast<int>(blockIdx.x * kFinishRows + threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (row_index >= a.rows) return;
  const Row row(a, row_index);
  if (row.slot < 0) return;

  const uint64_t maximum = GatheredMax(a, kMaximum, row_index);
  const bool poisoned = maximum == kPoisonedKey;
  const bool chose = a.needs.draw || a.needs.score;
  const uint64_t choice = chose ? GatheredMax(a, kChoose, row_index) : 0;
  __syncwarp();
  if (lane == 0) *Sent<unsigned long long>(a, kMaximum, row_index) = 0;  // for the next batch

  int token = 0;
  if (row.scores) {
    token = row.known_token(a);
  } else if (!poisoned) {
    token = static_cast<int>(row.draws(a, maximum) ? ChoiceToken(choice) : KeyToken(maximum));
  }
  const int num_top = row.scores ? max(row.params.prompt_logprobs, 0) : row.params.logprobs;
  const bool logprobs = a.needs.score && !poisoned && num_top >= 0;
  if (logprobs) WriteLogprobs(a, row_index, ChoiceLogit(choice), min(num_top, kMaxTopLogprobs));
  if (lane != 0) return;

  if (poisoned && a.poisoned != nullptr) a.poisoned[row.slot] = 1;
  if (!row.scores) {
    if (row.position + 1 < a.tokens_stride) {
      a.tokens[row.slot * a.tokens_stride + row.position + 1] = token;
    }
    if (HasPenalties(row.params) && a.needs.adjust) Count(a, row.slot, token);
  }
  const uint32_t flags = (poisoned ? kSampledPoisoned : 0) | (logprobs ? kSampledLogprobs : 0);
  *reinterpret_cast<uint2*>(a.results + row_index) = {static_cast<uint32_t>(token), flags};
}

// One block: clears the slot's counts, then counts its tokens.
constexpr int kCountThreads = 1024;

__device__ void CountShared(uint32_t* word, bool high, bool in_prompt) {
  const int shift = high ? 16 : 0;
  uint32_t seen = __ldcg(word);
  for (;;) {
    uint32_t half = seen >> shift & 0xffff;
    if (in_prompt) {
      half |= 0x8000;
    } else if ((half & 0x7fff) < 0x7fff) {
      ++half;
    }
    const uint32_t next = (seen & ~(0xffffu << shift)) | half << shift;
    const uint32_t found = atomicCAS(word, seen, next);
    if (found == seen) return;
    seen = found;
  }
}

__global__ void __launch_bounds__(kCountThreads) TokenCountKernel(const TokenCountArgs a) {
  TriggerDependents();
  WaitForPrevious();
  uint32_t* words =
      reinterpret_cast<uint32_t*>(a.counts + static_cast<int64_t>(a.slot) * a.counts_stride);
  const int tid = static_cast<int>(threadIdx.x);
  for (int i = tid; i < a.counts_stride / 2; i += kCountThreads) __stcg(words + i, 0u);
  __syncthreads();
  const int32_t* tokens = a.tokens + static_cast<int64_t>(a.slot) * a.tokens_stride;
  for (int i = tid; i < a.num_tokens; i += kCountThreads) {
    const int column = __ldcg(tokens + i) - a.first_vocab;
    if (column < 0 || column >= a.columns) continue;
    CountShared(words + column / 2, column % 2 != 0, i < a.num_prompt_tokens);
  }
}

// Few rows: many small blocks, for latency. Many: fewer, for bandwidth.
int GreedyChunk(int rows, int columns) {
  constexpr int kLeast = 1024, kMost = 8192, kBlocks = 528;
  const int64_t even = static_cast<int64_t>(rows) * columns / kBlocks / kLeast * kLeast;
  return static_cast<int>(std::clamp<int64_t>(even, kLeast, kMost));
}

}  // namespace

cudaError_t RunMaximum(const Launch& launch, const Job& job) {
  const SampleArgs& a = job.a;
  const unsigned rows = static_cast<unsigned>(a.rows);
  if (a.needs.adjust || a.needs.draw) {
    const dim3 grid(static_cast<unsigned>(job.chunks), rows);
    return LaunchKernel(launch, AdjustedMaximumKernel, grid, dim3(kThreads), 0, 1, job);
  }
  const int chunk = GreedyChunk(a.rows, a.columns);
  const dim3 grid(static_cast<unsigned>(std::max(1, (a.columns + chunk - 1) / chunk)), rows);
  return LaunchKernel(launch, MaximumKernel, grid, dim3(kGreedyThreads), 0, 1, job, chunk);
}

cudaError_t RunFinish(const Launch& launch, const Job& job) {
  const dim3 grid(static_cast<unsigned>((job.a.rows + kFinishRows - 1) / kFinishRows));
  return LaunchKernel(launch, FinishKernel, grid, dim3(32 * kFinishRows), 0, 1, job.a);
}

}  // namespace lockstep::kernels::sample

namespace lockstep::kernels {

cudaError_t BuildTokenCounts(const Launch& launch, const TokenCountArgs& args) {
  if (args.counts == nullptr || args.tokens == nullptr || args.counts_stride % 2 != 0 ||
      args.columns > args.counts_stride || args.num_tokens < 0 || args.slot < 0) {
    return cudaErrorInvalidValue;
  }
  return LaunchKernel(launch, sample::TokenCountKernel, dim3(1), dim3(sample::kCountThreads), 0, 1,
                      args);
}

}  // namespace lockstep::kernels
