// The phases between a row's maximum and its token. Each reads the logits of the
// rows that draw once (4 bytes each; from L2, mostly), a block a chunk. What top_k
// and top_p keep is found by two histograms, of a class's high bits and then, within
// the one class of those that the cut falls into, of its low bits.
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

// A row that draws: its maximum and how values become classes.
struct DrawRow : Row {
  bool active = false;
  float max = 0.0f;
  float inverse_temperature = 0.0f;

  __device__ __forceinline__ DrawRow(const SampleArgs& a, int row) : Row(a, row) {
    if (slot < 0 || scores || !(params.temperature > 0.0f)) return;
    const uint64_t maximum = GatheredMax(a, kMaximum, row);
    active = draws(a, maximum);
    max = KeyValue(maximum);
    inverse_temperature = InverseTemperature(params.temperature);
  }
  __device__ __forceinline__ uint32_t class_of(float v) const {
    return TokenClass(v, max, inverse_temperature);
  }
  __device__ __forceinline__ bool cuts() const { return params.top_k > 0 || params.top_p < 1.0f; }
};

__global__ void __launch_bounds__(kThreads) CoarseKernel(const __grid_constant__ Job job) {
  // Mass in halves: 32-bit atomics in shared memory are one instruction.
  __shared__ uint32_t count[kNumBins], low[kNumBins], high[kNumBins];
  constexpr int kHalf = kWeightBits / 2;
  static_assert(static_cast<uint64_t>(kChunk) << (kHalf + 1) <= uint64_t{1} << 32);
  TriggerDependents();
  WaitForPrevious();
  const SampleArgs& a = job.a;
  const int row_index = static_cast<int>(blockIdx.y);
  const DrawRow row(a, row_index);
  if (!row.active || !row.cuts()) return;
  for (uint32_t i = threadIdx.x; i < kNumBins; i += kThreads) count[i] = low[i] = high[i] = 0;
  __syncthreads();

  const int begin = static_cast<int>(blockIdx.x) * kChunk;
  const float* values = row.values(job, row_index);
  ForEachValue(values, IsAligned(values), begin, min(begin + kChunk, a.columns), [&](float v, int) {
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
  for (uint32_t i = threadIdx.x; i < kNumBins; i += kThreads) {
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
  const DrawRow row(a, row_index);
  if (!row.active || !row.cuts()) return;
  const uint32_t bin = LoadStruct(job.w.cuts + row_index).bin;
  if (bin == RowCut::kNoBin) return;
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
// that has it: calls found(class, count before it, mass before it).
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

__global__ void __launch_bounds__(kSelectThreads)
    SelectCoarseKernel(const __grid_constant__ Job job) {
  __shared__ SelectScratch scratch;
  TriggerDependents();
  WaitForPrevious();
  const int row_index = static_cast<int>(blockIdx.x);
  const DrawRow row(job.a, row_index);
  if (!row.active) return;
  RowCut* out = job.w.cuts + row_index;
  if (row.cuts()) {
    const Bins b = ReadCoarse(job.a, row_index, &scratch);
    if (row.params.top_k > 0 && row.params.top_k < b.total_count) {
      RefineNext(b, true, row.params.top_k, out);
      return;
    }
    if (row.params.top_p < 1.0f) {
      RefineNext(b, false, NucleusMass(row.params.top_p, b.total_mass), out);
      return;
    }
  }
  if (threadIdx.x == 0) *out = RowCut();
}

// From the fine bins of `phase` to the cut; for a row whose nucleus is of its top
// k, to the coarse class in which that ends.
__global__ void __launch_bounds__(kSelectThreads)
    SelectFineKernel(const __grid_constant__ Job job, SamplePhase phase) {
  __shared__ SelectScratch fine_scratch, coarse_scratch;
  __shared__ uint64_t kept;
  TriggerDependents();
  WaitForPrevious();
  const SampleArgs& a = job.a;
  const int row_index = static_cast<int>(blockIdx.x);
  const DrawRow row(a, row_index);
  if (!row.active || !row.cuts()) return;
  RowCut* out = job.w.cuts + row_index;
  const RowCut cut = LoadStruct(out);
  if (cut.bin == RowCut::kNoBin) return;

  Bins b;
  for (int r = 0; r < a.tp_size; ++r) {
    const FineBins* bins = Gathered<FineBins>(a, phase, r, row_index);
    const uint2 count = __ldcg(reinterpret_cast<const uint2*>(bins->count) + threadIdx.x);
    b.count[0] += count.x;
    b.count[1] += count.y;
  }
  const uint32_t first = cut.bin << kFineBits;
  const uint64_t weight[2] = {ClassWeight(first + 2 * threadIdx.x),
                              ClassWeight(first + 2 * threadIdx.x + 1)};
  b.mass[0] = b.count[0] * weight[0];
  b.mass[1] = b.count[1] * weight[1];
  Scan(&fine_scratch, &b);
  b.count_before += cut.count_before;
  b.mass_before += cut.mass_before;

  const bool nucleus_of_top = cut.by_count && row.params.top_p < 1.0f;
  Find(b, cut.by_count, cut.target, [&](uint32_t bin, int i, uint64_t count, uint64_t mass) {
    const uint64_t ties =
        cut.by_count ? cut.target - count : (cut.target - mass + weight[i] - 1) / weight[i];
    kept = mass + ties * weight[i];
    if (nucleus_of_top) return;
    RowCut done;
    done.threshold = first + bin;
    done.ties = static_cast<uint32_t>(ties);
    *out = done;
  });
  if (!nucleus_of_top) return;
  // Uniform over the block: every thread has the row's parameters.
  __syncthreads();
  const Bins coarse = ReadCoarse(a, row_index, &coarse_scratch);
  RefineNext(coarse, false, NucleusMass(row.params.top_p, kept), out);
}

__device__ __forceinline__ RowCut CutOf(const Job& job, int row) {
  return job.a.needs.cut ? LoadStruct(job.w.cuts + row) : RowCut();
}

// 0 where min_p drops the class.
__device__ __forceinline__ uint64_t KeptWeight(uint32_t q, uint64_t min_weight) {
  const uint64_t weight = ClassWeight(q);
  return weight >= min_weight ? weight : 0;
}

__global__ void __launch_bounds__(kThreads) MassKernel(const __grid_constant__ Job job) {
  __shared__ uint64_t scratch[2][kThreads / 32];
  TriggerDependents();
  WaitForPrevious();
  const SampleArgs& a = job.a;
  const int row_index = static_cast<int>(blockIdx.y);
  const DrawRow row(a, row_index);
  if (!row.active) return;
  const RowCut cut = CutOf(job, row_index);
  const uint64_t min_weight = MinWeight(row.params.min_p);

  const int begin = static_cast<int>(blockIdx.x) * kChunk;
  const float* values = row.values(job, row_index);
  MassPart part;
  ForEachValue(values, IsAligned(values), begin, min(begin + kChunk, a.columns), [&](float v, int) {
    const uint32_t q = row.class_of(v);
    if (q < cut.threshold) part.mass += KeptWeight(q, min_weight);
    part.ties += q == cut.threshold && q < kNumClasses;
  });
  const uint64_t mass = BlockScan(part.mass, scratch[0]).total;
  const uint64_t ties = BlockScan(part.ties, scratch[1]).total;
  if (threadIdx.x != 0) return;
  job.w.masses[static_cast<int64_t>(row_index) * job.chunks + blockIdx.x] = {mass, ties};
  MassPart* sum = Sent<MassPart>(a, kMass, row_index);
  if (mass != 0) atomicAdd(reinterpret_cast<unsigned long long*>(&sum->mass), mass);
  if (ties != 0) atomicAdd(reinterpret_cast<unsigned long long*>(&sum->ties), ties);
}

// Where the drawn token is: it is the one, of what is kept, that holds unit
// `target` of the mass from here on, `ties` of the threshold's tokens being kept.
struct Place {
  bool here = false;
  uint64_t target = 0;
  uint64_t ties = 0;
};

// Moves past a part (a rank, a chunk) that ends before the target.
__device__ __forceinline__ bool EndsBefore(const MassPart& part, uint64_t tie_weight, Place* at) {
  const uint64_t ties = min(part.ties, at->ties);
  const uint64_t mass = part.mass + ties * tie_weight;
  if (at->target < mass) return false;
  at->target -= mass;
  at->ties -= ties;
  return true;
}

__device__ Place PlaceOfRank(const SampleArgs& a, const DrawRow& row, int row_index,
                             const RowCut& cut, uint64_t tie_weight) {
  uint64_t total = 0, ties_left = cut.ties;
  for (int r = 0; r < a.tp_size; ++r) {
    const MassPart part = LoadStruct(Gathered<MassPart>(a, kMass, r, row_index));
    const uint64_t ties = min(part.ties, ties_left);
    ties_left -= ties;
    total += part.mass + ties * tie_weight;
  }
  Place at;
  if (total == 0) return at;
  const uint64_t position = static_cast<uint64_t>(row.position) + 1;
  at.target = DrawTarget(SampleUniform(row.params.seed, position), total);
  at.ties = cut.ties;
  for (int r = 0; r < a.tp_size; ++r) {
    const MassPart part = LoadStruct(Gathered<MassPart>(a, kMass, r, row_index));
    if (EndsBefore(part, tie_weight, &at)) continue;
    at.here = r == a.rank;
    return at;
  }
  return at;
}

struct ChooseScratch {
  MassPart parts[kMaxChunks];
  Place place;
  int chunk;
  uint64_t ties[kThreads / 32], mass[kThreads / 32];
};

// The drawn token's column in the chunk, -1 in the threads that do not have it.
__device__ int FindInChunk(const DrawRow& row, const float* values, int begin, int end,
                           const RowCut& cut, uint64_t tie_weight, const Place& at,
                           ChooseScratch* scratch) {
  const uint64_t min_weight = MinWeight(row.params.min_p);
  const int first = begin + static_cast<int>(threadIdx.x) * kItems;
  uint32_t classes[kItems];
  uint64_t ties = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    classes[i] = first + i < end ? row.class_of(__ldcg(values + first + i)) : kNumClasses;
    ties += classes[i] == cut.threshold && classes[i] < kNumClasses;
  }
  const uint64_t ties_before = BlockScan(ties, scratch->ties).before;
  uint64_t left = at.ties > ties_before ? at.ties - ties_before : 0;
  const auto weight = [&](uint32_t q, uint64_t* ties_left) -> uint64_t {
    if (q >= kNumClasses) return 0;
    if (q < cut.threshold) return KeptWeight(q, min_weight);
    if (q > cut.threshold || *ties_left == 0) return 0;
    --*ties_left;
    return tie_weight;
  };
  uint64_t mine = 0, left_of_sum = left;
#pragma unroll
  for (int i = 0; i < kItems; ++i) mine += weight(classes[i], &left_of_sum);
  uint64_t sum = BlockScan(mine, scratch->mass).before;
  if (at.target < sum || at.target >= sum + mine) return -1;
  int column = -1;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    sum += weight(classes[i], &left);
    if (column < 0 && at.target < sum) column = first + i;
  }
  return column;
}

// A block a row. Only the rank that has the token says so.
__global__ void __launch_bounds__(kThreads) ChooseKernel(const __grid_constant__ Job job) {
  __shared__ ChooseScratch scratch;
  TriggerDependents();
  WaitForPrevious();
  const SampleArgs& a = job.a;
  const int row_index = static_cast<int>(blockIdx.x);
  const DrawRow row(a, row_index);
  if (row.slot < 0) return;
  auto* out = Sent<unsigned long long>(a, kChoose, row_index);
  const float* logits = a.logits + row_index * a.logits_stride;

  if (!row.active) {
    if (threadIdx.x != 0) return;
    const uint64_t maximum = GatheredMax(a, kMaximum, row_index);
    const uint32_t token =
        row.scores ? static_cast<uint32_t>(row.known_token(a)) : KeyToken(maximum);
    const uint32_t column = token - static_cast<uint32_t>(a.first_vocab);
    const bool mine = maximum != kPoisonedKey && column < static_cast<uint32_t>(a.columns);
    *out = mine ? MakeChoice(token, __ldcg(logits + column)) : 0;
    return;
  }

  const RowCut cut = CutOf(job, row_index);
  const uint64_t tie_weight = KeptWeight(cut.threshold, MinWeight(row.params.min_p));
  if (threadIdx.x == 0) {
    scratch.place = PlaceOfRank(a, row, row_index, cut, tie_weight);
    scratch.chunk = -1;
    if (!scratch.place.here) *out = 0;
  }
  __syncthreads();
  if (!scratch.place.here) return;
  const MassPart* parts = job.w.masses + static_cast<int64_t>(row_index) * job.chunks;
  for (int i = static_cast<int>(threadIdx.x); i < job.chunks; i += kThreads) {
    scratch.parts[i] = LoadStruct(parts + i);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    Place at = scratch.place;
    int chunk = 0;
    while (chunk + 1 < job.chunks && EndsBefore(scratch.parts[chunk], tie_weight, &at)) ++chunk;
    scratch.place = at;
    scratch.chunk = chunk;
  }
  __syncthreads();
  const int begin = scratch.chunk * kChunk;
  const int column =
      FindInChunk(row, row.values(job, row_index), begin, min(begin + kChunk, a.columns), cut,
                  tie_weight, scratch.place, &scratch);
  if (column >= 0) {
    *out = MakeChoice(static_cast<uint32_t>(a.first_vocab + column), __ldcg(logits + column));
  }
}

cudaError_t Select(const Launch& launch, const Job& job, SamplePhase phase) {
  const dim3 grid(static_cast<unsigned>(job.a.rows));
  return LaunchKernel(launch, SelectFineKernel, grid, dim3(kSelectThreads), 0, 1, job, phase);
}

dim3 ChunkGrid(const Job& job) {
  return dim3(static_cast<unsigned>(job.chunks), static_cast<unsigned>(job.a.rows));
}

}  // namespace

cudaError_t RunCoarse(const Launch& launch, const Job& job) {
  return LaunchKernel(launch, CoarseKernel, ChunkGrid(job), dim3(kThreads), 0, 1, job);
}

cudaError_t RunFine(const Launch& launch, const Job& job) {
  const dim3 grid(static_cast<unsigned>(job.a.rows));
  const cudaError_t error =
      LaunchKernel(launch, SelectCoarseKernel, grid, dim3(kSelectThreads), 0, 1, job);
  if (error != cudaSuccess) return error;
  return LaunchKernel(launch, FineKernel, ChunkGrid(job), dim3(kThreads), 0, 1, job, kFine);
}

cudaError_t RunNested(const Launch& launch, const Job& job) {
  const cudaError_t error = Select(launch, job, kFine);
  if (error != cudaSuccess) return error;
  return LaunchKernel(launch, FineKernel, ChunkGrid(job), dim3(kThreads), 0, 1, job, kNested);
}

cudaError_t RunMass(const Launch& launch, const Job& job) {
  if (job.a.needs.cut) {
    const cudaError_t error = Select(launch, job, job.a.needs.nested ? kNested : kFine);
    if (error != cudaSuccess) return error;
  }
  return LaunchKernel(launch, MassKernel, ChunkGrid(job), dim3(kThreads), 0, 1, job);
}

cudaError_t RunChoose(const Launch& launch, const Job& job) {
  const dim3 grid(static_cast<unsigned>(job.a.rows));
  return LaunchKernel(launch, ChooseKernel, grid, dim3(kThreads), 0, 1, job);
}

}  // namespace lockstep::kernels::sample
