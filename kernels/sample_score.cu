// Log-probabilities: of the logits as they came, for the rows that ask. A block a
// chunk reads its logits once (4 bytes each) into registers and finds its maximum,
// its sum of exponentials, how many tokens come before the chosen one, and its
// most likely; a block a row puts the chunks together.
#include "kernels/sample_internal.cuh"

namespace lockstep::kernels::sample {
namespace {

// How many alternatives the row asks for; -1: it asks for nothing.
__device__ __forceinline__ int NumTop(const Row& row) {
  return row.scores ? min(max(row.params.prompt_logprobs, 0), kMaxTopLogprobs)
                    : min(row.params.logprobs, kMaxTopLogprobs);
}

struct ReduceScratch {
  double sum[kThreads / 32];
  float max[kThreads / 32];
  uint32_t before[kThreads / 32];
  uint64_t top[2][kThreads / 32];
};

// In every thread; in an order that only the number of threads decides.
__device__ __forceinline__ double BlockTotal(double v, double* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  v = WarpTotal(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  return WarpTotal(lane < kThreads / 32 ? scratch[lane] : 0.0);
}
__device__ __forceinline__ float BlockLargest(float v, float* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  v = WarpMax(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  return WarpMax(lane < kThreads / 32 ? scratch[lane] : -INFINITY);
}

// The n largest keys of all threads, descending, into out (0 beyond the end).
// next(): the calling thread's largest key that was not taken yet; 0: none.
// taken(): it was taken.
template <typename Next, typename Taken>
__device__ __forceinline__ void BlockTop(int n, ReduceScratch* scratch, uint64_t* out, Next next,
                                         Taken taken) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = 0; i < n; ++i) {
    const uint64_t mine = next();
    const uint64_t in_warp = WarpMax64(mine);
    if (lane == 0) scratch->top[i % 2][warp] = in_warp;
    // One barrier a round: a warp writes this half again only after the next one.
    __syncthreads();
    const uint64_t best = WarpMax64(lane < kThreads / 32 ? scratch->top[i % 2][lane] : 0);
    if (threadIdx.x == 0) out[i] = best;
    if (best != 0 && mine == best) taken();
  }
  for (int i = n + static_cast<int>(threadIdx.x); i < kMaxTopLogprobs; i += kThreads) out[i] = 0;
}

__global__ void __launch_bounds__(kThreads) ScoreChunkKernel(const __grid_constant__ Job job) {
  __shared__ ReduceScratch scratch;
  TriggerDependents();
  WaitForPrevious();
  const SampleArgs& a = job.a;
  const int row_index = static_cast<int>(blockIdx.y);
  const Row row(a, row_index);
  if (row.slot < 0) return;
  const int num_top = NumTop(row);
  if (num_top < 0) return;
  const uint64_t choice = GatheredMax(a, kChoose, row_index);
  if (choice == 0) return;  // poisoned
  const float chosen_logit = ChoiceLogit(choice);
  const int chosen = static_cast<int>(ChoiceToken(choice)) - a.first_vocab;

  const int begin = static_cast<int>(blockIdx.x) * kChunk;
  const float* logits = a.logits + row_index * a.logits_stride;
  float values[kItems];
  float max = -INFINITY;
  uint32_t before = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int column = begin + i * kThreads + static_cast<int>(threadIdx.x);
    values[i] = column < a.columns ? __ldcg(logits + column) : -INFINITY;
    max = fmaxf(max, values[i]);
    before += values[i] > chosen_logit || (values[i] == chosen_logit && column < chosen);
  }
  max = BlockLargest(max, scratch.max);
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (values[i] > -INFINITY) sum += expf(values[i] - max);
  }
  sum = BlockTotal(sum, scratch.sum);
  before = BlockScan(before, scratch.before).total;

  ScorePart* part =
      job.w.scores + static_cast<int64_t>(row_index) * job.chunks + static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) {
    part->sum = sum;
    part->max = max;
    part->before = before;
  }
  const auto key = [&](int i) -> uint64_t {
    const int column = begin + i * kThreads + static_cast<int>(threadIdx.x);
    return values[i] > -INFINITY
               ? TokenKey(values[i], static_cast<uint32_t>(a.first_vocab + column))
               : 0;
  };
  uint64_t best = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) best = ::max(best, key(i));
  const auto advance = [&] {
    const uint64_t last = best;
    best = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint64_t k = key(i);
      if (k < last) best = ::max(best, k);
    }
  };
  BlockTop(
      num_top, &scratch, part->top, [&] { return best; }, advance);
}

// One block a row; a thread has a chunk, whose list descends.
__global__ void __launch_bounds__(kThreads) ScoreRowKernel(const __grid_constant__ Job job) {
  extern __shared__ uint64_t lists[];  // [chunks][num_top]
  __shared__ ReduceScratch scratch;
  static_assert(kMaxChunks <= kThreads);
  TriggerDependents();
  WaitForPrevious();
  const SampleArgs& a = job.a;
  const int row_index = static_cast<int>(blockIdx.x);
  const Row row(a, row_index);
  if (row.slot < 0) return;
  const int num_top = NumTop(row);
  if (num_top < 0 || GatheredMax(a, kChoose, row_index) == 0) return;

  const ScorePart* parts = job.w.scores + static_cast<int64_t>(row_index) * job.chunks;
  for (int i = static_cast<int>(threadIdx.x); i < job.chunks * num_top; i += kThreads) {
    lists[i] =
        __ldcg(reinterpret_cast<const unsigned long long*>(&parts[i / num_top].top[i % num_top]));
  }
  const int chunk = static_cast<int>(threadIdx.x);
  ScorePart mine;
  mine.max = -INFINITY;
  if (chunk < job.chunks) {
    mine.sum = __ldcg(&parts[chunk].sum);
    mine.max = __ldcg(&parts[chunk].max);
    mine.before = __ldcg(&parts[chunk].before);
  }
  const float max = BlockLargest(mine.max, scratch.max);
  const double scaled =
      mine.sum > 0.0 ? mine.sum * exp(static_cast<double>(mine.max) - static_cast<double>(max))
                     : 0.0;
  const double sum = BlockTotal(scaled, scratch.sum);
  const uint32_t before = BlockScan(mine.before, scratch.before).total;

  ScorePart* out = Sent<ScorePart>(a, kScore, row_index);
  if (threadIdx.x == 0) {
    out->sum = sum;
    out->max = max;
    out->before = before;
  }
  __syncthreads();
  int head = 0;
  BlockTop(
      num_top, &scratch, out->top,
      [&]() -> uint64_t {
        return chunk < job.chunks && head < num_top ? lists[chunk * num_top + head] : 0;
      },
      [&] { ++head; });
}

}  // namespace

cudaError_t RunScore(const Launch& launch, const Job& job) {
  const unsigned rows = static_cast<unsigned>(job.a.rows);
  const cudaError_t error =
      LaunchKernel(launch, ScoreChunkKernel, dim3(static_cast<unsigned>(job.chunks), rows),
                   dim3(kThreads), 0, 1, job);
  if (error != cudaSuccess) return error;
  const size_t lists = sizeof(uint64_t) * kMaxTopLogprobs * static_cast<size_t>(job.chunks);
  return LaunchKernel(launch, ScoreRowKernel, dim3(rows), dim3(kThreads), lists, 1, job);
}

}  // namespace lockstep::kernels::sample
