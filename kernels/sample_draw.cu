// From what is kept to the token drawn: a pass over the logits (4 bytes each) that
// sums each chunk's kept weights, and a block a row that walks the ranks and chunks
// to the one that holds the token, and reads that.
#include "kernels/sample_internal.cuh"

namespace lockstep::kernels::sample {
namespace {

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
  const RowCut cut = CutOf(job, row_index);
  const DrawRow row(a, row_index);
  if (!row.active) return;
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
  if (!HasPhase(a.needs, kMass)) return;
  MassPart* sum = Sent<MassPart>(a, kMass, row_index);
  if (mass != 0) atomicAdd(reinterpret_cast<unsigned long long*>(&sum->mass), mass);
  if (ties != 0) atomicAdd(reinterpret_cast<unsigned long long*>(&sum->ties), ties);
}

// Where the drawn token is: it holds unit `target` of the mass kept from here on,
// `ties` tokens of the threshold being kept from here on.
struct Place {
  bool here = false;
  uint64_t target = 0;
  uint64_t ties = 0;

  // Past a part with so much mass and so many ties, unless it holds the target.
  __device__ __forceinline__ bool Pass(uint64_t mass, uint64_t part_ties, uint64_t tie_weight) {
    const uint64_t kept = min(part_ties, ties);
    mass += kept * tie_weight;
    if (target < mass) return false;
    target -= mass;
    ties -= kept;
    return true;
  }
};

// From the start of this rank on. Not here if it lies before; it may lie after.
__device__ __forceinline__ Place PlaceInRank(const SampleArgs& a, const DrawRow& row, int row_index,
                                             const RowCut& cut, uint64_t tie_weight) {
  const double u = SampleUniform(row.params.seed, static_cast<uint64_t>(row.position) + 1);
  Place at;
  at.ties = cut.ties;
  if (!HasPhase(a.needs, kMass)) {
    at.target = DrawTarget(u, cut.kept);
    at.here = a.rank == 0 || at.Pass(cut.ranks_mass, cut.ranks_ties, tie_weight);
    return at;
  }
  uint64_t mass = 0, ties = 0, ranks_mass = 0, ranks_ties = 0;
  for (int r = 0; r < a.tp_size; ++r) {
    const MassPart part = LoadStruct(Gathered<MassPart>(a, kMass, r, row_index));
    if (r == a.rank) {
      ranks_mass = mass;
      ranks_ties = ties;
    }
    mass += part.mass;
    ties += part.ties;
  }
  const uint64_t total = mass + min(ties, at.ties) * tie_weight;
  if (total == 0) return at;
  at.target = DrawTarget(u, total);
  at.here = a.rank == 0 || at.Pass(ranks_mass, ranks_ties, tie_weight);
  return at;
}

// The chunk that holds the target, -1 if it lies beyond this rank. Every warp does
// the same, a lane a chunk.
__device__ __forceinline__ int FindChunk(const MassPart* parts, int chunks, MassPart part,
                                         uint64_t tie_weight, Place* at) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int base = 0; base < chunks; base += 32) {
    if (base > 0) part = base + lane < chunks ? LoadStruct(parts + base + lane) : MassPart();
    const uint64_t ties = ScanWarp(part.ties);
    const uint64_t kept = min(ties, at->ties) * tie_weight + ScanWarp(part.mass);
    const uint32_t beyond = __ballot_sync(~0u, kept > at->target);
    const int chunk = beyond == 0 ? 32 : __ffs(static_cast<int>(beyond)) - 1;
    if (chunk > 0) {
      at->target -= __shfl_sync(~0u, kept, chunk - 1);
      at->ties -= min(__shfl_sync(~0u, ties, chunk - 1), at->ties);
    }
    if (chunk < 32) return base + chunk;
  }
  return -1;
}

// One block a row: more threads than where blocks are many.
constexpr int kChooseThreads = 512;
constexpr int kChooseItems = 8;
static_assert(kChooseThreads * kChooseItems == kChunk);

struct FindScratch {
  uint64_t mass[kChooseThreads / 32], ties[kChooseThreads / 32];
};

// The drawn token's column in the chunk; -1 in the threads that do not have it.
__device__ __forceinline__ int FindInChunk(const DrawRow& row, const float* values, int begin,
                                           int end, const RowCut& cut, uint64_t min_weight,
                                           uint64_t tie_weight, const Place& at,
                                           FindScratch* scratch) {
  const int first = begin + static_cast<int>(threadIdx.x) * kChooseItems;
  float v[kChooseItems];
#pragma unroll
  for (int i = 0; i < kChooseItems; ++i) {
    v[i] = first + i < end ? __ldcg(values + first + i) : -INFINITY;
  }
  uint64_t weights[kChooseItems], mass = 0, ties = 0;
  uint32_t is_tie = 0;
#pragma unroll
  for (int i = 0; i < kChooseItems; ++i) {
    const uint32_t q = row.class_of(v[i]);
    weights[i] = q < cut.threshold ? KeptWeight(q, min_weight) : 0;
    mass += weights[i];
    if (q == cut.threshold && q < kNumClasses) {
      is_tie |= 1u << i;
      ++ties;
    }
  }
  const uint64_t ties_before = BlockScan(ties, scratch->ties).before;
  const uint64_t mass_before = BlockScan(mass, scratch->mass).before;
  Place mine = at;
  if (!mine.Pass(mass_before, ties_before, tie_weight)) return -1;  // an earlier thread's
  int column = -1;
#pragma unroll
  for (int i = 0; i < kChooseItems; ++i) {
    if (column < 0 && !mine.Pass(weights[i], is_tie >> i & 1, tie_weight)) column = first + i;
  }
  return column;
}

// A row that draws nothing: who has the token says so.
__device__ __forceinline__ uint64_t KnownChoice(const SampleArgs& a, const Row& row, int row_index,
                                                uint64_t maximum) {
  const uint32_t token = row.scores ? static_cast<uint32_t>(row.known_token(a)) : KeyToken(maximum);
  const uint32_t column = token - static_cast<uint32_t>(a.first_vocab);
  if (maximum == kPoisonedKey || column >= static_cast<uint32_t>(a.columns)) return 0;
  return MakeChoice(token, __ldcg(a.logits + row_index * a.logits_stride + column));
}

__global__ void __launch_bounds__(kChooseThreads) ChooseKernel(const __grid_constant__ Job job) {
  __shared__ FindScratch scratch;
  TriggerDependents();
  WaitForPrevious();
  const SampleArgs& a = job.a;
  const int row_index = static_cast<int>(blockIdx.x), lane = static_cast<int>(threadIdx.x % 32);
  // Nothing of this depends on anything else: one wait for memory.
  const uint64_t maximum = GatheredMax(a, kMaximum, row_index);
  const RowCut cut = CutOf(job, row_index);
  const MassPart* parts = job.w.masses + static_cast<int64_t>(row_index) * job.chunks;
  const MassPart part = a.needs.draw && lane < job.chunks ? LoadStruct(parts + lane) : MassPart();
  const DrawRow row(a, row_index, maximum);
  if (row.slot < 0) return;
  auto* out = Sent<unsigned long long>(a, kChoose, row_index);
  if (!row.active) {
    if (threadIdx.x == 0) *out = KnownChoice(a, row, row_index, maximum);
    return;
  }

  const uint64_t min_weight = MinWeight(row.params.min_p);
  const uint64_t tie_weight = KeptWeight(cut.threshold, min_weight);
  Place at = PlaceInRank(a, row, row_index, cut, tie_weight);
  const int chunk = at.here ? FindChunk(parts, job.chunks, part, tie_weight, &at) : -1;
  if (chunk < 0) {  // of the whole block
    if (threadIdx.x == 0) *out = 0;
    return;
  }
  const int begin = chunk * kChunk;
  const int column =
      FindInChunk(row, row.values(job, row_index), begin, min(begin + kChunk, a.columns), cut,
                  min_weight, tie_weight, at, &scratch);
  if (column < 0) return;
  *out = MakeChoice(static_cast<uint32_t>(a.first_vocab + column),
                    __ldcg(a.logits + row_index * a.logits_stride + column));
}

// The cut's last step, and each chunk's mass.
cudaError_t SumMasses(const Launch& launch, const Job& job) {
  if (job.a.needs.cut) {
    const cudaError_t error = RunSelectFine(launch, job, job.a.needs.nested ? kNested : kFine);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(job.chunks), static_cast<unsigned>(job.a.rows));
  return LaunchKernel(launch, MassKernel, grid, dim3(kThreads), 0, 1, job);
}

}  // namespace

cudaError_t RunMass(const Launch& launch, const Job& job) { return SumMasses(launch, job); }

cudaError_t RunChoose(const Launch& launch, const Job& job) {
  if (job.a.needs.draw && !HasPhase(job.a.needs, kMass)) {
    const cudaError_t error = SumMasses(launch, job);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(job.a.rows));
  return LaunchKernel(launch, ChooseKernel, grid, dim3(kChooseThreads), 0, 1, job);
}

}  // namespace lockstep::kernels::sample
