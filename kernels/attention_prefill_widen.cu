#include "kernels/attention_mma.cuh"
#include "kernels/attention_prefill_widen.h"

namespace lockstep::kernels::prefill {
namespace {

constexpr int kThreads = 256;

struct WidenParams {
  const PrefillSpan* spans;
  int num_spans;
  const int32_t* table;
  int32_t* wide_table;
  int table_stride, block_size, window;
  int pieces;  // of 16 elements, of a block of k or v
  const uint4* k;
  const uint4* v;
  uint4* wide_k;
  uint4* wide_v;
};

__device__ __forceinline__ int BlocksOf(const PrefillSpan& span, int block_size) {
  if (span.slot < 0 || span.count <= 0) return 0;
  return (span.begin + span.count + block_size - 1) / block_size;
}

// A pair of f16, which holds all e4m3, as a pair of T; bf16 holds all of those.
template <typename T>
__device__ __forceinline__ uint32_t PairOf(uint32_t halves) {
  if constexpr (std::is_same_v<T, __half>) {
    return halves;
  } else {
    __half2 h;
    memcpy(&h, &halves, sizeof(h));
    const float2 f = __half22float2(h);
    return PackPair<T>(f.x, f.y);
  }
}

template <typename T>
__device__ __forceinline__ void WidenPiece(const uint4& from, uint4* to) {
  const auto widen = [](uint32_t first, uint32_t second) {
    uint4 wide;
    HalvesOfE4M3(first, wide.x, wide.y);
    HalvesOfE4M3(second, wide.z, wide.w);
    return make_uint4(PairOf<T>(wide.x), PairOf<T>(wide.y), PairOf<T>(wide.z), PairOf<T>(wide.w));
  };
  to[0] = widen(from.x, from.y);
  to[1] = widen(from.z, from.w);
}

struct Place {
  int span, block;  // span below 0: none
};

// Whose the scratch's block is. A warp together.
__device__ __forceinline__ Place FindPlace(const WidenParams& p, int wide) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int first = 0, before = 0; first < p.num_spans; first += 32) {
    const int own = first + lane < p.num_spans ? BlocksOf(p.spans[first + lane], p.block_size) : 0;
    int end = before + own;  // of this lane's span, after the scan
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int left = __shfl_up_sync(~0u, end - before, offset);
      if (lane >= offset) end += left;
    }
    const uint32_t behind = __ballot_sync(~0u, wide < end);
    if (behind != 0) {
      const int found = __ffs(static_cast<int>(behind)) - 1;
      return {first + found, wide - __shfl_sync(~0u, end - own, found)};
    }
    before = __shfl_sync(~0u, end, 31);
  }
  return {-1, 0};
}

// grid: blocks of the scratch.
template <typename T>
__global__ void __launch_bounds__(kThreads) WidenKernel(const __grid_constant__ WidenParams p) {
  TriggerDependents();
  WaitForPrevious();
  __shared__ Place shared_place;
  const int64_t to = blockIdx.x;
  if (threadIdx.x < 32) {
    const Place found = FindPlace(p, static_cast<int>(blockIdx.x));
    if (threadIdx.x == 0) shared_place = found;
  }
  __syncthreads();
  const Place place = shared_place;
  if (place.span < 0) return;
  const PrefillSpan span = p.spans[place.span];
  const int64_t entry = static_cast<int64_t>(span.slot) * p.table_stride + place.block;
  const int64_t from = p.table[entry];
  if (threadIdx.x == 0) p.wide_table[entry] = static_cast<int32_t>(to);
  const int seen = p.window > 0 ? span.begin + 1 - p.window : 0;  // by the span's first row
  if ((place.block + 1) * p.block_size <= seen) return;
  for (int i = static_cast<int>(threadIdx.x); i < p.pieces; i += kThreads) {
    const uint4 k = __ldcg(p.k + from * p.pieces + i), v = __ldcg(p.v + from * p.pieces + i);
    WidenPiece<T>(k, p.wide_k + 2 * (to * p.pieces + i));
    WidenPiece<T>(v, p.wide_v + 2 * (to * p.pieces + i));
  }
}

}  // namespace

cudaError_t LaunchWiden(const Launch& launch, const PrefillAttentionArgs& args) {
  const KvLayer& kv = args.kv;
  WidenParams p = {};
  p.spans = args.spans;
  p.num_spans = args.num_spans;
  p.table = args.block_table;
  p.wide_table = args.scratch.block_table;
  p.table_stride = args.table_stride;
  p.block_size = kv.block_size;
  p.window = args.window;
  p.pieces = kv.kv_heads * kv.block_size * kv.head_dim / 16;
  p.k = static_cast<const uint4*>(kv.k);
  p.v = static_cast<const uint4*>(kv.v);
  p.wide_k = static_cast<uint4*>(args.scratch.k);
  p.wide_v = static_cast<uint4*>(args.scratch.v);
  if (args.scratch.blocks == 0) return cudaSuccess;
  const auto kernel = args.type == Type::kBF16 ? WidenKernel<__nv_bfloat16> : WidenKernel<__half>;
  return LaunchKernel(launch, kernel, dim3(static_cast<unsigned>(args.scratch.blocks)),
                      dim3(kThreads), 0, 1, p);
}

}  // namespace lockstep::kernels::prefill
