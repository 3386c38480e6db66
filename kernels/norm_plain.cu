#include "kernels/device_attributes.h"
#include "kernels/norm_rows.cuh"

// residual += x; normed = rms(residual). Few rows want many threads each, and
// the fewest of the widest a cluster of blocks; many rows want more work a
// thread. Whatever the cut, vector v of a row (16 bytes) is summed by lane v % 32
// of the v/32nd of as many warps, and those in order: the same bits.
namespace lockstep::kernels {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxVectors = 4096;  // of a row

// Before sm_90 there are no clusters: every row is one block's.
__device__ __forceinline__ int ClusterSize() {
  uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
#endif
  return static_cast<int>(size);
}
__device__ __forceinline__ int ClusterRank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
__device__ __forceinline__ void ClusterArrive() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void ClusterWait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// *at of block `rank` of the cluster.
__device__ __forceinline__ void StoreRemote(float* at, int rank, float v) {
#if __CUDA_ARCH__ >= 900
  const uint32_t local = static_cast<uint32_t>(__cvta_generic_to_shared(at));
  asm volatile(
      "{\n"
      ".reg .u32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.f32 [remote], %2;\n"
      "}" ::"r"(local),
      "r"(rank), "f"(v)
      : "memory");
#endif
}

struct Cut {
  int blocks, rank, thread, threads;
};

// scratch[warp of the row] = v, in every block of the row.
__device__ __forceinline__ void Share(float v, int warp, float* scratch, const Cut& cut) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (cut.blocks == 1) {
    if (lane == 0) scratch[warp] = v;
  } else if (lane < cut.blocks) {
    StoreRemote(scratch + warp, lane, v);
  }
}
__device__ __forceinline__ void WaitForShared(const Cut& cut) {
  if (cut.blocks == 1) {
    __syncthreads();
  } else {
    ClusterArrive();
    ClusterWait();
  }
}

// What a block may have: registers for more of the row, or for its scales or parts, mean fewer
// threads.
constexpr int MaxThreads(size_t element, int pieces, bool scaled, bool parts) {
  return scaled || parts || (element == 2 && pieces == 4) ? kMaxThreads / 2 : kMaxThreads;
}

template <typename T, int kPieces, bool kScaled, bool kParts>
__global__ void __launch_bounds__(MaxThreads(sizeof(T), kPieces, kScaled, kParts))
    PlainKernel(const __grid_constant__ RowArgs a) {
  constexpr int kN = 16 / sizeof(T);
  __shared__ float squares_of[kMaxVectors / 32], max_of[32];
  TriggerDependents();
  Cut cut;
  cut.blocks = ClusterSize();
  cut.rank = ClusterRank();
  cut.thread = cut.rank * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
  cut.threads = cut.blocks * static_cast<int>(blockDim.x);
  // A block's shared memory may be written only once that block runs.
  if (cut.blocks > 1) ClusterArrive();

  const int64_t row = static_cast<int>(blockIdx.x) / cut.blocks, begin = row * a.hidden;
  const auto place = [&](int j) { return (j * cut.threads + cut.thread) * kN; };
  Packed<T, kN> weight[kPieces], residual[kPieces] = {};
  XPiece<T, kN, kParts> x[kPieces];
  float columns[kPieces][kN];
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    if (place(j) >= a.hidden) continue;
#pragma unroll
    for (int e = 0; e < kN; ++e) columns[j][e] = 1.0f;
    if constexpr (kScaled) ScaleProduct<T>(a.x_scales, 1.0f, place(j), columns[j]);
    weight[j] = LoadConstant<T, kN>(static_cast<const T*>(a.next.weight) + place(j));
  }
  WaitForPrevious();
  // Whether the row is padding is asked along with its values, not before: behind the
  // weights that the next product requests, one answer takes microseconds.
  const int slot = a.slot != nullptr ? __ldcg(a.slot + row) : 0;
  const float row_factor = kScaled ? RowFactor(a.x_scales, row) : 1.0f;
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    if (place(j) >= a.hidden) continue;
    const int64_t at = begin + place(j);
    x[j].Load(a, at);
    if (a.residual_in == nullptr) continue;
    residual[j] = LoadData<T, kN>(static_cast<const T*>(a.residual_in) + at);
  }
  const bool skipped = slot < 0;
  if (cut.blocks > 1) ClusterWait();
  if (skipped) return;  // all blocks of the row

  float v[kPieces][kN];
  const int warps = cut.threads / 32;  // of one piece
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    float squares = 0.0f;
    if (place(j) < a.hidden) {
      float f[kN];
      x[j].Get(v[j]);
      Unpack(residual[j], f);
#pragma unroll
      for (int e = 0; e < kN; ++e)
        v[j][e] = kScaled ? fmaf(v[j][e], columns[j][e] * row_factor, f[e]) : v[j][e] + f[e];
      if (a.residual_out != nullptr) {
        const Packed<T, kN> rounded = Pack<T, kN>(v[j]);
        Store(static_cast<T*>(a.residual_out) + begin + place(j), rounded);
        Unpack(rounded, v[j]);
      }
#pragma unroll
      for (int e = 0; e < kN; ++e) squares = fmaf(v[j][e], v[j][e], squares);
    }
    Share(WarpSum(squares), j * warps + cut.thread / 32, squares_of, cut);
  }
  WaitForShared(cut);
  float sum = 0.0f;
  const int used = (a.hidden / kN + 31) / 32;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < used; i += 32) sum += squares_of[i];
  const float mean = WarpSum(sum) / static_cast<float>(a.hidden);
  const float scale = rsqrtf(mean + a.next.eps);
  const float offset = a.next.plus_one ? 1.0f : 0.0f;
  float max = 0.0f;
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    if (place(j) >= a.hidden) continue;
    float w[kN];
    Unpack(weight[j], w);
#pragma unroll
    for (int e = 0; e < kN; ++e) v[j][e] = v[j][e] * scale * (w[e] + offset);
    const Packed<T, kN> rounded = Pack<T, kN>(v[j]);
    if (a.normed != nullptr) Store(static_cast<T*>(a.normed) + begin + place(j), rounded);
    if (a.quantized.values == nullptr) continue;
    Unpack(rounded, v[j]);
#pragma unroll
    for (int e = 0; e < kN; ++e) max = fmaxf(max, fabsf(v[j][e]));
  }
  if (a.quantized.values == nullptr) return;
  Share(WarpMax(max), cut.thread / 32, max_of, cut);
  WaitForShared(cut);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const RowScale to(WarpMax(lane < warps ? max_of[lane] : 0.0f));
  if (cut.thread == 0) a.quantized.scales[row] = to.scale;
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    if (place(j) >= a.hidden) continue;
#pragma unroll
    for (int e = 0; e < kN; ++e) v[j][e] *= to.inverse;
    Store(static_cast<__nv_fp8_e4m3*>(a.quantized.values) + begin + place(j),
          Pack<__nv_fp8_e4m3, kN>(v[j]));
  }
}

template <typename T, bool kScaled, bool kParts>
cudaError_t LaunchPlainOf(const Launch& launch, int num_rows, const RowArgs& args) {
  const int vectors = args.hidden * static_cast<int>(sizeof(T)) / 16;
  const bool many = int64_t{num_rows} * vectors > 128 * 1024;
  const int most = many ? kMaxThreads / 2 : MaxThreads(sizeof(T), 1, kScaled, kParts);
  int pieces = 1;
  while (pieces < 4 && vectors > pieces * most) pieces *= 2;
  if (many && pieces == 1 && vectors > 256) pieces = 2;
  const int threads = ((vectors + pieces - 1) / pieces + 31) / 32 * 32;
  const int blocks = HasClusters() && num_rows <= 4 && threads == kMaxThreads ? 4 : 1;
  const auto run = [&](void (*kernel)(RowArgs)) {
    return LaunchKernel(launch, kernel, dim3(num_rows * blocks), dim3(threads / blocks), 0, blocks,
                        args);
  };
  switch (pieces) {
    case 1:
      return run(PlainKernel<T, 1, kScaled, kParts>);
    case 2:
      return run(PlainKernel<T, 2, kScaled, kParts>);
    default:
      return run(PlainKernel<T, 4, kScaled, kParts>);
  }
}

template <typename T, bool kScaled>
cudaError_t LaunchPlainIn(const Launch& launch, int num_rows, const RowArgs& args) {
  return args.x_parts != nullptr ? LaunchPlainOf<T, kScaled, true>(launch, num_rows, args)
                                 : LaunchPlainOf<T, kScaled, false>(launch, num_rows, args);
}

}  // namespace

bool IsPlain(Type type, const RowArgs& a) {
  return IsWide(type, a) && (a.x_parts == nullptr || type != Type::kF32) && a.scale == 1.0f &&
         a.bias == nullptr && a.post.kind == NormKind::kNone && a.position_table == nullptr &&
         !a.norm_is_residual && a.next.kind == NormKind::kRms && a.next.weight != nullptr &&
         a.next.bias == nullptr;
}

cudaError_t LaunchPlain(const Launch& launch, Type type, int num_rows, const RowArgs& args) {
  switch (type) {
    case Type::kF32:
      return LaunchPlainOf<float, false, false>(launch, num_rows, args);
    case Type::kF16:
      return LaunchPlainIn<__half, false>(launch, num_rows, args);
    case Type::kBF16:
      return args.x_scales.rows != nullptr
                 ? LaunchPlainIn<__nv_bfloat16, true>(launch, num_rows, args)
                 : LaunchPlainIn<__nv_bfloat16, false>(launch, num_rows, args);
    case Type::kE4M3:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace lockstep::kernels
