// Prefill attention with warpgroup products, head_dim 64, 128 and 256. A block
// takes 128 rows; producer warps stream k and v, 64 or 128 positions a step,
// through two stages of shared memory by the tensor copy engine (a box a block and 64
// elements); two consumer warpgroups take 64 rows each:
//
//   scores(t + 1) = q k^T  enqueued   | one warpgroup's products run while the
//   out += p(t) v          enqueued   | other, and this one, exponentiate
//   softmax of scores(t + 1)
//
// q lies in shared memory, p never does. Positions of a step that nobody sees
// may hold anything: their scores are masked and their v is zeroed first.
#include <cudaTypedefs.h>

#include <cmath>

#include "kernels/attention_mma.cuh"
#include "kernels/attention_prefill_rows.cuh"
#include "kernels/attention_prefill_wgmma.h"
#include "kernels/attention_wgmma.cuh"

namespace lockstep::kernels::prefill {
namespace {

constexpr int kRows = 128, kStages = 2;
[[maybe_unused]] constexpr int kGroupRows = 64;
constexpr int kGroupThreads = 128, kConsumers = 2, kThreads = kGroupThreads * (1 + kConsumers);
// Cached positions a step: fewer where the output takes the registers.
constexpr int PositionsOf(int dim) { return dim == 256 ? 64 : 128; }
enum NamedBarrier { kTurn = 1, kGroup = 3 };  // and the next one, for the other warpgroup

struct WgmmaParams {
  CUtensorMap k, v;  // [blocks * kv_heads][block_size][head_dim], boxes of 64 elements
  Params p;
};

template <int kDim>
struct Shared {
  // Panels: 64 elements of every row or position.
  static constexpr int kPanels = kDim / 64, kPanelBytes = PositionsOf(kDim) * 128;
  using Panel = unsigned char[kPanelBytes];
  alignas(1024) unsigned char q[kPanels][kRows * 128];
  alignas(1024) Panel k[kStages][kPanels];
  alignas(1024) Panel v[kStages][kPanels];
  uint64_t k_full[kStages], v_full[kStages], k_empty[kStages], v_empty[kStages];
};
template <int kDim>
constexpr size_t SharedBytesOf() {
  return sizeof(Shared<kDim>) + 1024;  // the base is aligned by hand
}

// The stage of a step and the parity of its barriers.
template <int kCount>
struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void Advance() {
    if (++stage == kCount) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Steps {
  int first = 0, end = 0;
};

// Warps that copy k, and as many that copy v, each its share of the panels. A warp requests its
// lanes' boxes one after another, and one warp was too slow for all of a step's (6,144 tokens
// of an 8B: 627 us, not 562).
template <int kDim>
constexpr int kFeeders = kDim > 64 ? 2 : 1;

template <int kDim, bool kOfV>
__device__ __forceinline__ void Produce(const WgmmaParams& w, Shared<kDim>& s, const TileRows& rows,
                                        const Steps& steps, int kv_head, int feeder) {
  constexpr int kPositions = PositionsOf(kDim);
  const Params& p = w.p;
  const int lane = threadIdx.x % 32;
  const int32_t* table = p.block_table + static_cast<int64_t>(rows.span.slot) * p.table_stride;
  const int blocks = kPositions / p.block_size;
  const auto block_of = [&](int step) {
    const int position = step * kPositions + lane * p.block_size;
    const bool seen = lane < blocks && step < steps.end && position < rows.see_end &&
                      position + p.block_size > rows.see_begin;
    return seen ? __ldg(table + position / p.block_size) : -1;
  };
  Ring<kStages> ring;
  int block = block_of(steps.first);
  for (int step = steps.first; step < steps.end; ++step) {
    const int next = block_of(step + 1);
    const int count = __popc(__ballot_sync(~0u, block >= 0));
    uint64_t* const full = &(kOfV ? s.v_full : s.k_full)[ring.stage];
    Await(&(kOfV ? s.v_empty : s.k_empty)[ring.stage], ring.parity ^ 1);
    if (lane == 0) BarrierArriveExpecting(full, count * p.block_size * kDim * 2 / kFeeders<kDim>);
    __syncwarp();
    if (block >= 0) {
#pragma unroll
      for (int i = 0; i < kDim / 64 / kFeeders<kDim>; ++i) {
        const int panel = i * kFeeders<kDim> + feeder;
        CopyBox((kOfV ? s.v : s.k)[ring.stage][panel] + lane * p.block_size * 128,
                kOfV ? &w.v : &w.k, panel * 64, 0, block * p.kv_heads + kv_head, full);
      }
    }
    __syncwarp();
    block = next;
    ring.Advance();
  }
}

template <typename T, int kDim>
class Consumer {
  static constexpr int kPositions = PositionsOf(kDim), kScores = kPositions / 2;
  static constexpr int kPanelBytes = Shared<kDim>::kPanelBytes;

 public:
  __device__ __forceinline__ Consumer(const Params& p, Shared<kDim>& s, const TileRows& rows,
                                      const Steps& steps, int kv_head)
      : p_(p), s_(s), rows_(rows), steps_(steps), kv_head_(kv_head) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int m = min(group_ * kGroupRows + warp_ * 16 + r_ + 8 * i, rows.count - 1);
      position_[i] = rows.span.begin + (rows.first + m) / p.group;
    }
  }

  __device__ __forceinline__ void Run() {
    LoadQuery();
    float score[kScores], out[kDim / 2] = {};
    uint32_t weight[kScores / 2];
    Ring<kStages> k_ring, v_ring;

    Await(&s_.k_full[k_ring.stage], k_ring.parity);
    ProductsFence();
    Scores(score, k_ring.stage);
    ProductsCommit();
    ProductsAwait<0>();
    Pin(score);
    Leave(&s_.k_empty[k_ring.stage]);
    k_ring.Advance();
    Softmax(score, steps_.first);
    Convert(score, weight);

    if (group_ == 1 && steps_.first + 1 < steps_.end) NamedArrive(kTurn, 2 * kGroupThreads);
    for (int step = steps_.first; step + 1 < steps_.end; ++step) {
      Await(&s_.k_full[k_ring.stage], k_ring.parity);
      Await(&s_.v_full[v_ring.stage], v_ring.parity);
      ZeroUnseen(step, v_ring.stage);
      NamedSync(kTurn + group_, 2 * kGroupThreads);
      Pin(score);
      Pin(weight);
      Pin(out);
      ProductsFence();
      Scores(score, k_ring.stage);
      ProductsCommit();
      Outputs(out, weight, v_ring.stage);
      ProductsCommit();
      // The first warpgroup's turn comes again only if there is another step.
      if (group_ == 0 || step + 2 < steps_.end) {
        NamedArrive(kTurn + (group_ ^ 1), 2 * kGroupThreads);
      }
      ProductsAwait<1>();
      Pin(score);
      Leave(&s_.k_empty[k_ring.stage]);
      k_ring.Advance();
      Softmax(score, step + 1);
      ComputeBeforeAwaiting(sum_[0] + sum_[1]);
      ProductsAwait<0>();
      Pin(out);
      Pin(weight);
      Leave(&s_.v_empty[v_ring.stage]);
      v_ring.Advance();
      if (__any_sync(~0u, shrink_[0] != 1.0f || shrink_[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) out[i] *= shrink_[i / 2 % 2];
      }
      Convert(score, weight);
    }
    Await(&s_.v_full[v_ring.stage], v_ring.parity);
    ZeroUnseen(steps_.end - 1, v_ring.stage);
    Pin(weight);
    Pin(out);
    ProductsFence();
    Outputs(out, weight, v_ring.stage);
    ProductsCommit();
    ProductsAwait<0>();
    Pin(out);
    Write(out);
  }

 private:
  // The warp's products no longer read the stage.
  __device__ __forceinline__ void Leave(uint64_t* empty) const {
    __syncwarp();
    if (thread_ % 32 == 0) BarrierArrive(empty);
  }

  __device__ __forceinline__ void LoadQuery() const {
    constexpr int kChunks = kDim / 8;
#pragma unroll
    for (int i = 0; i < kGroupRows * kChunks / kGroupThreads; ++i) {
      const int at = i * kGroupThreads + thread_, chunk = at % kChunks;
      const int m = group_ * kGroupRows + at / kChunks;
      uint4 value = make_uint4(0, 0, 0, 0);
      if (m < rows_.count) {
        value =
            __ldcg(reinterpret_cast<const uint4*>(static_cast<const T*>(p_.q) +
                                                  RowOffset(p_, rows_, m, p_.q_stride, kv_head_)) +
                   chunk);
      }
      *reinterpret_cast<uint4*>(s_.q[chunk / 8] + m * 128 + ((chunk % 8) ^ (m % 8)) * 16) = value;
    }
    FenceStoresBeforeProducts();
    NamedSync(kGroup + group_, kGroupThreads);
  }

  __device__ __forceinline__ void Scores(float (&score)[kScores], int stage) const {
    const uint32_t q = SharedAddress(s_.q[0]) + group_ * kGroupRows * 128;
    const uint32_t k = SharedAddress(s_.k[stage][0]);
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      const uint32_t in_panel = i % 4 * 32;
      ScoreProduct<T>(score, SwizzledMatrix(q + i / 4 * kRows * 128 + in_panel, 16),
                      SwizzledMatrix(k + i / 4 * kPanelBytes + in_panel, 16), i > 0);
    }
  }

  __device__ __forceinline__ void Outputs(float (&out)[kDim / 2],
                                          const uint32_t (&weight)[kScores / 2], int stage) const {
    const uint32_t v = SharedAddress(s_.v[stage][0]);
#pragma unroll
    for (int i = 0; i < kPositions / 16; ++i) {
      OutputProduct<T>(out, weight[4 * i], weight[4 * i + 1], weight[4 * i + 2], weight[4 * i + 3],
                       v + i * 16 * 128, kPanelBytes);
    }
  }

  // v of the step's positions outside [see_begin, see_end). Both warpgroups do it
  // all, so that neither waits for the other.
  __device__ __forceinline__ void ZeroUnseen(int step, int stage) const {
    const int first = step * kPositions;
    if (first >= rows_.see_begin && first + kPositions <= rows_.see_end) return;
    constexpr int kChunks = kDim / 8;
    for (int at = thread_; at < kPositions * kChunks; at += kGroupThreads) {
      const int t = at / kChunks, chunk = at % kChunks;
      if (first + t >= rows_.see_begin && first + t < rows_.see_end) continue;
      *reinterpret_cast<uint4*>(s_.v[stage][chunk / 8] + t * 128 + chunk % 8 * 16) =
          make_uint4(0, 0, 0, 0);
    }
    FenceStoresBeforeProducts();
    NamedSync(kGroup + group_, kGroupThreads);
  }

  // Scores to weights, in place; shrink_ is what the output so far is worth now.
  // Lane (r, c) has rows r and r + 8, positions 8 n + 2 c and the next.
  __device__ __forceinline__ void Softmax(float (&score)[kScores], int step) {
    const int first = step * kPositions;
    const bool edge = first + kPositions - 1 > rows_.first_position ||
                      (p_.window > 0 && first < rows_.last_position + 1 - p_.window);
    if (edge) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int at = first + i / 4 * 8 + 2 * c_ + i % 2, mine = position_[i / 2 % 2];
        if (at > mine || (p_.window > 0 && at + p_.window <= mine)) score[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float m = score[2 * row];
#pragma unroll
      for (int n = 0; n < kPositions / 8; ++n) {
        m = fmaxf(m, fmaxf(score[4 * n + 2 * row], score[4 * n + 2 * row + 1]));
      }
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      m = fmaxf(top_[row], m * p_.factors.score);
      const float base = m == -INFINITY ? 0.0f : m;
      shrink_[row] = Exp2(top_[row] - base);
      top_[row] = m;
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < kPositions / 8; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float& s = score[4 * n + 2 * row + h];
          s = Exp2(__fmaf_rn(s, p_.factors.score, -base));
          total += s;
        }
      }
      sum_[row] = sum_[row] * shrink_[row] + total;
    }
  }

  __device__ __forceinline__ static void Convert(const float (&score)[kScores],
                                                 uint32_t (&weight)[kScores / 2]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) weight[i] = PackPair<T>(score[2 * i], score[2 * i + 1]);
  }

  __device__ __forceinline__ void Write(const float (&out)[kDim / 2]) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float total = sum_[row];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int m = group_ * kGroupRows + warp_ * 16 + r_ + 8 * row;
      if (m >= rows_.count) continue;
      const float factor = p_.factors.v / total;
      T* at = static_cast<T*>(p_.out) + RowOffset(p_, rows_, m, p_.out_stride, kv_head_) + 2 * c_;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        *reinterpret_cast<uint32_t*>(at + n * 8) =
            PackPair<T>(out[4 * n + 2 * row] * factor, out[4 * n + 2 * row + 1] * factor);
      }
    }
  }

  const Params& p_;
  Shared<kDim>& s_;
  const TileRows& rows_;
  const Steps& steps_;
  const int kv_head_;
  const int group_ = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
  const int thread_ = threadIdx.x % kGroupThreads;
  const int warp_ = thread_ / 32, r_ = thread_ % 32 / 4, c_ = thread_ % 4;
  int position_[2];
  float top_[2] = {-INFINITY, -INFINITY}, sum_[2] = {0.0f, 0.0f}, shrink_[2] = {1.0f, 1.0f};
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) WgmmaKernel(const __grid_constant__ WgmmaParams w) {
#if __CUDA_ARCH__ == 900
  extern __shared__ unsigned char raw[];
  Shared<kDim>& s =
      *reinterpret_cast<Shared<kDim>*>(raw + ((1024 - SharedAddress(raw) % 1024) & 1023));
  TriggerDependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(&s.k_full[i], kFeeders<kDim>);
      BarrierInit(&s.v_full[i], kFeeders<kDim>);
      BarrierInit(&s.k_empty[i], kConsumers * kGroupThreads / 32);
      BarrierInit(&s.v_empty[i], kConsumers * kGroupThreads / 32);
    }
    FenceBarrierInit();
  }
  WaitForPrevious();
  const TileRows rows = FindRows(w.p, w.p.spans[blockIdx.z], gridDim.y - 1 - blockIdx.y, kRows);
  if (rows.count == 0) return;
  const int kv_head = blockIdx.x;
  constexpr int kPositions = PositionsOf(kDim);
  const Steps steps = {rows.see_begin / kPositions, (rows.see_end + kPositions - 1) / kPositions};
  __syncthreads();
  if (threadIdx.x < kGroupThreads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp < kFeeders<kDim>) {
      Produce<kDim, false>(w, s, rows, steps, kv_head, warp);
    } else if (warp < 2 * kFeeders<kDim>) {
      Produce<kDim, true>(w, s, rows, steps, kv_head, warp - kFeeders<kDim>);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Consumer<T, kDim>(w.p, s, rows, steps, kv_head).Run();
  }
#endif
}

using WgmmaKernelPointer = void (*)(WgmmaParams);
template <typename T>
WgmmaKernelPointer FindOf(int dim) {
  return dim == 64 ? WgmmaKernel<T, 64> : dim == 128 ? WgmmaKernel<T, 128> : WgmmaKernel<T, 256>;
}
WgmmaKernelPointer FindWgmma(Type type, int dim) {
  return type == Type::kBF16 ? FindOf<__nv_bfloat16>(dim) : FindOf<__half>(dim);
}
size_t SharedBytes(int dim) {
  return dim == 64 ? SharedBytesOf<64>() : dim == 128 ? SharedBytesOf<128>() : SharedBytesOf<256>();
}

// Set by InitWgmma; null where the kernel cannot run.
PFN_cuTensorMapEncodeTiled_v12000 encode_tiled = nullptr;

cudaError_t MakeMap(const void* base, Type type, const KvLayer& kv, CUtensorMap* map) {
  // Nothing is copied but whole boxes of blocks that exist, so the outermost size
  // need not be known.
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(kv.head_dim),
                               static_cast<cuuint64_t>(kv.block_size), cuuint64_t{1} << 31};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(kv.head_dim) * 2,
                                 static_cast<cuuint64_t>(kv.head_dim) * 2 * kv.block_size};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(kv.block_size), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result = encode_tiled(
      map, type == Type::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      3, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t InitWgmma() {
  int device = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) return cudaSuccess;
  for (const Type type : {Type::kBF16, Type::kF16}) {
    for (const int dim : {64, 128, 256}) {
      status =
          cudaFuncSetAttribute(FindWgmma(type, dim), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(SharedBytes(dim)));
      if (status != cudaSuccess) return status;
    }
  }
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                            cudaEnableDefault, &result);
  if (status != cudaSuccess) return status;
  if (result != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
  encode_tiled = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  return cudaSuccess;
}

bool WgmmaTakes(const PrefillAttentionArgs& args) {
  return encode_tiled != nullptr && args.kv.type == args.type &&
         (args.kv.head_dim == 64 || args.kv.head_dim == 128 || args.kv.head_dim == 256) &&
         args.kv.block_size >= 8 && PositionsOf(args.kv.head_dim) % args.kv.block_size == 0;
}

cudaError_t LaunchWgmma(const Launch& launch, const PrefillAttentionArgs& args, const Params& p) {
  WgmmaParams w = {};
  w.p = p;
  cudaError_t status = MakeMap(args.kv.k, args.type, args.kv, &w.k);
  if (status != cudaSuccess) return status;
  status = MakeMap(args.kv.v, args.type, args.kv, &w.v);
  if (status != cudaSuccess) return status;
  const int rows = args.max_count * p.group;
  const dim3 grid(args.kv.kv_heads, (rows + kRows - 1) / kRows, args.num_spans);
  return LaunchKernel(launch, FindWgmma(args.type, args.kv.head_dim), grid, kThreads,
                      SharedBytes(args.kv.head_dim), 1, w);
}

}  // namespace lockstep::kernels::prefill
