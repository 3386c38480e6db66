// What top_k and top_p keep of the rows that draw, found by two histograms: of the
// classes' high bits, a block a chunk, and then, within the one coarse class that
// the cut falls into, of their low bits. Each pass reads the logits once (4 bytes
// each; from L2, mostly). In between, a block a row adds up the ranks' histograms
// and looks for the cut.
#include "kernels/sample_internal.cuh"

namespace lockstep::kernels::sample {
namespace {

// [mass] and [count] of the coarse classes in kCoarse's exchange.
struct CoarseBins {
  unsigned long long mass[kNumBins];
  uint32_t count[kNumBins];
};
static_assert(sizeof(CoarseBins) == SampleExchangeBytes(kCoarse));
struct FineBins {
  uint32_t count[kNumBins];
};
static_assert(sizeof(FineBins) == SampleExchangeBytes(kFine));

template <int kBlock>
__global__ void __launch_bounds__(kBlock) CoarseKernel(const __grid_constant__ Job job) {
  // Mass in halves: 32-bit atomics in shared memory are one instruction.
  __shared__ uint32_t count[kNumBins], low[kNumBins], high[kNumBins];
  constexpr int kHalf = kWeightBits / 2;
  static_assert(static_cast<uint64_t>(kChunk) << (kHalf + 1) <= uint64_t{1} << 32);
  TriggerDependents();
  WaitForPrevious();
  const SampleArgs& a = job.a;
  const int row_index = static_cast<int>(blockIdx.y);
  const DrawRow row(a, row_index);
  if (!row.active || !row.counts_classes(a)) return;
  for (uint32_t i = threadIdx.x; i < kNumBins; i += kBlock) count[i] = low[i] = high[i] = 0;
  __syncthreads();

  const int begin = static_cast<int>(blockIdx.x) * kChunk;
  const float* values = row.values(job, row_index);
  ForEachValue<kBlock>(values, IsAligned(values), begin, min(begin + kChunk, a.columns),
                       [&](float v, int) {
                         const uint32_t q = row.class_of(v);
                         const uint64_t weight = ClassWeight(q);
                         if (weight == 0) return;
                         const uint32_t bin = q >> kFineBits;
                         atomicAdd(&count[bin], 1u);
                         atomicAdd(&low[bin], static_cast<uint32_t>(weight) & ((1u << kHalf) - 1));
                         atomicAdd(&high[bin], static_cast<uint32_t>(weight >> kHalf));
                       });
  __syncthreads();
  CoarseBins* bins = Sent<CoarseBins>(a, kCoarse, row_index);
  for (uint32_t i = threadIdx.x; i < kNumBins; i += kBlock) {
    if (count[i] == 0) continue;
    atomicAdd(&bins->count[i], count[i]);
    atomicAdd(&bins->mass[i], (static_cast<unsigned long long>(high[i]) << kHalf) + low[i]);
  }
}

__global__ void __launch_bounds__(kThreads)
    FineKernel(const __grid_constant__ Job job, SamplePhase phase) {
  __shared__ uint32_t count[kNumBins];
  TriggerDependents();
  WaitForPrevious();
  const SampleArgs& a = job.a;
  const int row_index = static_cast<int>(blockIdx.y);
  const uint32_t bin = __ldcg(&job.w.cuts[row_index].bin);
  const DrawRow row(a, row_index);
  if (!row.active || bin == RowCut::kNoBin) return;
  for (uint32_t i = threadIdx.x; i < kNumBins; i += kThreads) count[i] = 0;
  __syncthreads();

  const int begin = static_cast<int>(blockIdx.x) * kChunk;
  const float* values = row.values(job, row_index);
  ForEachValue(values, IsAligned(values), begin, min(begin + kChunk, a.columns), [&](float v, int) {
    const uint32_t q = row.class_of(v);
    if (q >> kFineBits == bin) atomicAdd(&count[q & (kNumBins - 1)], 1u);
  });
  __syncthreads();
  FineBins* bins = Sent<FineBins>(a, phase, row_index);
  for (uint32_t i = threadIdx.x; i < kNumBins; i += kThreads) {
    if (count[i] != 0) atomicAdd(&bins->count[i], count[i]);
  }
}

// The select kernels: a block a row, two neighbouring bins a thread.
constexpr int kSelectThreads = kNumBins / 2;

// What lies in this thread's two bins and before them.
struct Bins {
  uint64_t count[2] = {}, mass[2] = {};
  uint64_t count_before = 0, mass_before = 0;
  uint64_t total_count = 0, total_mass = 0;
};

struct SelectScratch {
  uint64_t count[32], mass[32];
};

__device__ __forceinline__ void Scan(SelectScratch* scratch, Bins* b) {
  const Scanned<uint64_t> count = BlockScan(b->count[0] + b->count[1], scratch->count);
  const Scanned<uint64_t> mass = BlockScan(b->mass[0] + b->mass[1], scratch->mass);
  b->count_before = count.before;
  b->total_count = count.total;
  b->mass_before = mass.before;
  b->total_mass = mass.total;
}

__device__ __forceinline__ Bins ReadCoarse(const SampleArgs& a, int row, SelectScratch* scratch) {
  Bins b;
  for (int r = 0; r < a.tp_size; ++r) {
    const CoarseBins* bins = Gathered<CoarseBins>(a, kCoarse, r, row);
    const ulonglong2 mass = __ldcg(reinterpret_cast<const ulonglong2*>(bins->mass) + threadIdx.x);
    const uint2 count = __ldcg(reinterpret_cast<const uint2*>(bins->count) + threadIdx.x);
    b.mass[0] += mass.x;
    b.mass[1] += mass.y;
    b.count[0] += count.x;
    b.count[1] += count.y;
  }
  Scan(scratch, &b);
  return b;
}

// The class at which the running sum reaches the target, sought by the thread
// that has it: calls found(bin, which of the thread's it is, count before, mass before).
template <typename F>
__device__ __forceinline__ void Find(const Bins& b, bool by_count, uint64_t target, F found) {
  uint64_t count = b.count_before, mass = b.mass_before;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint64_t before = by_count ? count : mass;
    const uint64_t here = by_count ? b.count[i] : b.mass[i];
    if (before < target && target <= before + here) {
      found(2 * threadIdx.x + i, i, count, mass);
    }
    count += b.count[i];
    mass += b.mass[i];
  }
}

__device__ __forceinline__ void RefineNext(const Bins& b, bool by_count, uint64_t target,
                                           RowCut* out) {
  Find(b, by_count, target, [&](uint32_t bin, int, uint64_t count, uint64_t mass) {
    RowCut cut;
    cut.bin = bin;
    cut.by_count = by_count;
    cut.target = target;
    cut.count_before = count;
    cut.mass_before = mass;
    *out = cut;
  });
}

// Of this thread's coarse classes below `end`, the mass that ranks before this one have.
__device__ __forceinline__ uint64_t EarlierRanksMass(const SampleArgs& a, int row, uint32_t end) {
  uint64_t sum = 0;
  for (int r = 0; r < a.rank; ++r) {
    const CoarseBins* bins = Gathered<CoarseBins>(a, kCoarse, r, row);
    const ulonglong2 mass = __ldcg(reinterpret_cast<const ulonglong2*>(bins->mass) + threadIdx.x);
    sum += (2 * threadIdx.x < end ? mass.x : 0) + (2 * threadIdx.x + 1 < end ? mass.y : 0);
  }
  return sum;
}

__global__ void __launch_bounds__(kSelectThreads)
    SelectCoarseKernel(const __grid_constant__ Job job) {
  __shared__ SelectScratch scratch;
  __shared__ uint64_t ranks_scratch[32];
  TriggerDependents();
  WaitForPrevious();
  const int row_index = static_cast<int>(blockIdx.x);
  const DrawRow row(job.a, row_index);
  if (!row.active) return;
  RowCut* out = job.w.cuts + row_index;
  RowCut all;
  if (row.counts_classes(job.a)) {
    const Bins b = ReadCoarse(job.a, row_index, &scratch);
    if (row.params.top_k > 0 && row.params.top_k < b.total_count) {
      RefineNext(b, true, row.params.top_k, out);
      return;
    }
    if (row.params.top_p < 1.0f) {
      RefineNext(b, false, NucleusMass(row.params.top_p, b.total_mass), out);
      return;
    }
    all.kept = b.total_mass;
    all.ranks_mass = BlockScan(EarlierRanksMass(job.a, row_index, kNumBins), ranks_scratch).total;
  }
  if (threadIdx.x == 0) *out = all;
}

// Where in the fine classes the cut falls, known to the block.
struct Edge {
  uint32_t bin;
  uint64_t ties, kept;
};

struct EdgeScratch {
  Edge edge;
  uint64_t mass[32], ties[32];
};

// Completes a cut, once its edge is known: what ranks before this one keep.
__device__ __forceinline__ void CompleteCut(const SampleArgs& a, int row, SamplePhase phase,
                                            const RowCut& refined, const uint64_t (&weight)[2],
                                            EdgeScratch* scratch, RowCut* out) {
  const Edge& edge = scratch->edge;
  uint64_t mass = EarlierRanksMass(a, row, refined.bin), ties = 0;
  for (int r = 0; r < a.rank; ++r) {
    const FineBins* bins = Gathered<FineBins>(a, phase, r, row);
    const uint2 pair = __ldcg(reinterpret_cast<const uint2*>(bins->count) + threadIdx.x);
    const uint32_t count[2] = {pair.x, pair.y};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (2 * threadIdx.x + i < edge.bin) mass += count[i] * weight[i];
      if (2 * threadIdx.x + i == edge.bin) ties += count[i];
    }
  }
  if (a.rank > 0) {
    mass = BlockScan(mass, scratch->mass).total;
    ties = BlockScan(ties, scratch->ties).total;
  }
  if (threadIdx.x != 0) return;
  RowCut done;
  done.threshold = (refined.bin << kFineBits) + edge.bin;
  done.ties = static_cast<uint32_t>(edge.ties);
  done.kept = edge.kept;
  done.ranks_mass = mass;
  done.ranks_ties = ties;
  *out = done;
}

// From the fine bins of `phase` to the cut; for a row whose nucleus is of its top
// k, to the coarse class in which that ends.
__global__ void __launch_bounds__(kSelectThreads)
    SelectFineKernel(const __grid_constant__ Job job, SamplePhase phase) {
  __shared__ SelectScratch fine_scratch, coarse_scratch;
  __shared__ EdgeScratch edge_scratch;
  TriggerDependents();
  WaitForPrevious();
  const SampleArgs& a = job.a;
  const int row_index = static_cast<int>(blockIdx.x);
  RowCut* out = job.w.cuts + row_index;
  const RowCut cut = LoadStruct(out);
  const DrawRow row(a, row_index);
  if (!row.active || cut.bin == RowCut::kNoBin) return;

  Bins b;
  for (int r = 0; r < a.tp_size; ++r) {
    const FineBins* bins = Gathered<FineBins>(a, phase, r, row_index);
    const uint2 count = __ldcg(reinterpret_cast<const uint2*>(bins->count) + threadIdx.x);
    b.count[0] += count.x;
    b.count[1] += count.y;
  }
  const uint32_t first = (cut.bin << kFineBits) + 2 * threadIdx.x;
  const uint64_t weight[2] = {ClassWeight(first), ClassWeight(first + 1)};
  b.mass[0] = b.count[0] * weight[0];
  b.mass[1] = b.count[1] * weight[1];
  Scan(&fine_scratch, &b);
  b.count_before += cut.count_before;
  b.mass_before += cut.mass_before;
  Find(b, cut.by_count, cut.target, [&](uint32_t bin, int i, uint64_t count, uint64_t mass) {
    const uint64_t ties =
        cut.by_count ? cut.target - count : (cut.target - mass + weight[i] - 1) / weight[i];
    edge_scratch.edge = {bin, ties, mass + ties * weight[i]};
  });
  __syncthreads();
  if (cut.by_count && row.params.top_p < 1.0f) {
    const Bins coarse = ReadCoarse(a, row_index, &coarse_scratch);
    RefineNext(coarse, false, NucleusMass(row.params.top_p, edge_scratch.edge.kept), out);
  } else {
    CompleteCut(a, row_index, phase, cut, weight, &edge_scratch, out);
  }
}

dim3 ChunkGrid(const Job& job) {
  return dim3(static_cast<unsigned>(job.chunks), static_cast<unsigned>(job.a.rows));
}
dim3 RowGrid(const Job& job) { return dim3(static_cast<unsigned>(job.a.rows)); }

}  // namespace

cudaError_t RunSelectFine(const Launch& launch, const Job& job, SamplePhase phase) {
  return LaunchKernel(launch, SelectFineKernel, RowGrid(job), dim3(kSelectThreads), 0, 1, job,
                      phase);
}

cudaError_t RunCoarse(const Launch& launch, const Job& job) {
  // Its bins are cleared and written out by the block: with an SM a block, more
  // threads are quicker.
  if (job.chunks * job.a.rows <= 132) {
    return LaunchKernel(launch, CoarseKernel<512>, ChunkGrid(job), dim3(512), 0, 1, job);
  }
  return LaunchKernel(launch, CoarseKernel<kThreads>, ChunkGrid(job), dim3(kThreads), 0, 1, job);
}

cudaError_t RunFine(const Launch& launch, const Job& job) {
  const cudaError_t error =
      LaunchKernel(launch, SelectCoarseKernel, RowGrid(job), dim3(kSelectThreads), 0, 1, job);
  if (error != cudaSuccess) return error;
  return LaunchKernel(launch, FineKernel, ChunkGrid(job), dim3(kThreads), 0, 1, job, kFine);
}

cudaError_t RunNested(const Launch& launch, const Job& job) {
  const cudaError_t error = RunSelectFine(launch, job, kFine);
  if (error != cudaSuccess) return error;
  return LaunchKernel(launch, FineKernel, ChunkGrid(job), dim3(kThreads), 0, 1, job, kNested);
}

}  // namespace lockstep::kernels::sample
