#include "kernels/skinny_cluster.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>

#include "kernels/skinny_cluster_plan.h"

namespace lockstep::kernels {
namespace {

// Set by InitSkinnyCluster; null where the kernels cannot run.
PFN_cuTensorMapEncodeTiled_v12000 encode_tiled = nullptr;
int max_clusters[kMaxClusterSplit + 1] = {};

constexpr int DivUp(int a, int b) { return (a + b - 1) / b; }
bool Aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Of x in 16 bits, where the weights want e4m3.
bool QuantizesX(const SkinnyClusterArgs& args) {
  return args.type == Type::kE4M3 && args.x_scales == nullptr;
}

struct Plan {
  int rows = 0, split_log2 = 0, clusters = 0, chunks = 0, x_chunks = 0;
  int stages = 0;  // 0: nothing fits
  size_t shared_bytes = 0;
};

// The split with the least that any block has to stream and to wait for.
Plan PlanOf(const SkinnyClusterArgs& args) {
  Plan best;
  double least = 0;
  const int chunks = DivUp(args.k * static_cast<int>(TypeBytes(args.type)), kClusterChunk);
  const int tiles = DivUp(args.n, kClusterTile);
  const int rows = args.m <= 16 ? 16 : args.m <= 32 ? 32 : 64;
  for (int log2 = 1; 1 << log2 <= kMaxClusterSplit; ++log2) {
    const int split = 1 << log2;
    if ((args.split != 0 && args.split != split) || chunks < split || max_clusters[split] == 0)
      continue;
    const int x_chunks = DivUp(chunks, split);
    if (QuantizesX(args) && x_chunks > kMaxStagedChunks) continue;
    const size_t rest = ClusterLayout(rows, 0, x_chunks).end + 1024;
    if (rest + kMinClusterStages * kClusterStageBytes > kMaxClusterShared) continue;
    // An even number, for two to take turns; a deeper ring would only delay x behind the
    // weights.
    const int stages = static_cast<int>(
        std::min<size_t>((kMaxClusterShared - rest) / kClusterStageBytes / 2 * 2, 18));
    const int clusters = std::min(max_clusters[split], tiles);
    // In stages, by measurement: what is streamed, what a tile costs besides, x from the
    // L2, and more blocks to hand over to.
    const double cost = DivUp(tiles, clusters) * (x_chunks + 1.5 + rows / 8.0) +
                        3.0 * x_chunks * rows / kClusterTile + 0.5 * split;
    if (best.stages != 0 && cost >= least) continue;
    least = cost;
    // More than half an SM's: see kMinGemvShared.
    best = {rows,
            log2,
            clusters,
            chunks,
            x_chunks,
            stages,
            std::max<size_t>(rest + stages * kClusterStageBytes, size_t{118} << 10)};
  }
  return best;
}

// Chunks of each part of x: as many parts as are all alike.
int XPart(int x_chunks) {
  int parts = kXParts;
  while (x_chunks % parts != 0) --parts;
  return x_chunks / parts;
}

// A matrix in boxes of `box_rows` rows and a chunk, or `box_chunks` of them behind each other. More
// than one: rows are of whole chunks.
cudaError_t MakeMap(const void* base, Type type, int rows, int width, int64_t stride, int box_rows,
                    int box_chunks, CUtensorMap* map) {
  const CUtensorMapDataType data_type = type == Type::kBF16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                        : type == Type::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const int bytes = static_cast<int>(TypeBytes(type)), chunk = kClusterChunk / bytes;
  const bool whole = box_chunks > 1;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(whole ? chunk : width),
                               static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(width / chunk)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(stride) * bytes, kClusterChunk};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(chunk), static_cast<cuuint32_t>(box_rows),
                             static_cast<cuuint32_t>(box_chunks)};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result =
      encode_tiled(map, data_type, whole ? 3 : 2, const_cast<void*>(base), sizes, strides, box,
                   steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t InitSkinnyCluster() {
  int device = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) return cudaSuccess;
  int clusters[kMaxClusterSplit + 1];
  for (int& count : clusters) count = 1 << 20;
  for (cudaError_t (*init)(int(&)[kMaxClusterSplit + 1]) :
       {InitCluster<__nv_bfloat16, __nv_bfloat16>, InitCluster<__half, __half>,
        InitCluster<__nv_fp8_e4m3, __nv_bfloat16>, InitCluster<__nv_fp8_e4m3, __half>}) {
    status = init(clusters);
    if (status != cudaSuccess) return status;
  }
  for (int split = 2; split <= kMaxClusterSplit; split *= 2) max_clusters[split] = clusters[split];
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                            cudaEnableDefault, &result);
  if (status != cudaSuccess) return status;
  if (result != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
  encode_tiled = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  return cudaSuccess;
}

bool SkinnyClusterSupports(const SkinnyClusterArgs& args) {
  const bool fp8 = args.type == Type::kE4M3;
  if (encode_tiled == nullptr || args.m < 1 || args.m > 64 || args.n < 1 || args.k < 1)
    return false;
  if (args.out_type != Type::kBF16 && args.out_type != Type::kF16) return false;
  if (fp8 ? args.weight_scales == nullptr : args.type != args.out_type) return false;
  if (QuantizesX(args) && args.m > kMaxStagedRows) return false;
  const int x_unit = fp8 && !QuantizesX(args) ? 16 : 8;  // elements of 16 bytes
  if (args.k % (fp8 ? 16 : 8) != 0 || args.x_stride % x_unit != 0) return false;
  if (!Aligned(args.weights) || !Aligned(args.x)) return false;
  if (args.epilogue == GemvEpilogue::kPush &&
      (args.m > kMaxPushedRows || args.n % 8 != 0 || args.push.size < 1 || args.bias != nullptr))
    return false;
  if (IsGate(args.epilogue) && args.n % 2 != 0) return false;
  return PlanOf(args).stages != 0;
}

cudaError_t SkinnyCluster(const Launch& launch, const SkinnyClusterArgs& args) {
  if (!SkinnyClusterSupports(args)) return cudaErrorInvalidValue;
  const Plan plan = PlanOf(args);
  const int tiles = DivUp(args.n, kClusterTile);
  ClusterParams p = {};
  cudaError_t status =
      MakeMap(args.weights, args.type, args.n, args.k, args.k, kClusterTile, 1, &p.weights);
  p.x_chunks = plan.x_chunks;
  p.x_part = XPart(plan.x_chunks);
  const int64_t x_stride = args.x_stride != 0 ? args.x_stride : args.k;
  if (QuantizesX(args)) {
    p.unquantized_x = args.x;
    p.x_stride = x_stride;
  } else if (status == cudaSuccess) {
    // A row's last chunk, if not all of it is there, would go on in the next row.
    p.x_boxed = p.x_part > 1 && args.k * TypeBytes(args.type) % kClusterChunk == 0;
    status = MakeMap(args.x, args.type, args.m, args.k, x_stride, plan.rows,
                     p.x_boxed ? p.x_part : 1, &p.x);
  }
  if (status != cudaSuccess) return status;
  p.weight_scales = args.weight_scales;
  p.x_scales = args.x_scales;
  p.n = args.n;
  p.m = args.m;
  p.k = args.k;
  p.chunks = plan.chunks;
  p.share = tiles / plan.clusters;
  p.remainder = tiles % plan.clusters;
  p.split_log2 = plan.split_log2;
  p.stages = plan.stages;
  p.epilogue = args.epilogue;
  p.out = args.out;
  p.out_stride = args.out_stride != 0    ? args.out_stride
                 : IsGate(args.epilogue) ? args.n / 2
                                         : args.n;
  p.bias = args.bias;
  p.push = args.push;
  const bool bf16 = args.out_type == Type::kBF16;
  const auto launch_as = args.type == Type::kE4M3
                             ? bf16 ? LaunchCluster<__nv_fp8_e4m3, __nv_bfloat16>
                                    : LaunchCluster<__nv_fp8_e4m3, __half>
                         : bf16 ? LaunchCluster<__nv_bfloat16, __nv_bfloat16>
                                : LaunchCluster<__half, __half>;
  return launch_as(launch, plan.rows, plan.clusters << plan.split_log2, plan.shared_bytes, p);
}

}  // namespace lockstep::kernels
