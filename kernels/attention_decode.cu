#include <algorithm>

#include "kernels/attention_decode.h"
#include "kernels/attention_decode_launch.h"
#include "kernels/attention_decode_spread.h"
#include "kernels/attention_plain.h"
#include "kernels/device.cuh"
#include "kernels/device_attributes.h"
#include "kernels/vector.cuh"

namespace lockstep::kernels {
namespace {

using decode::Kernel;
using decode::Params;
using decode::Way;

decode::Spread spread;  // set by InitDecodeAttention

// Thread blocks wanted on the device: two on each of an H200's 132 multiprocessors.
constexpr int kBlocksWanted = 264;

int RoundedDim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

int HeadTiles(int group) { return group <= 8 ? 1 : 2; }

Kernel FindKernel(Type type, Type kv_type, int head_dim, int group, Way way) {
  const int dim = RoundedDim(head_dim), head_tiles = HeadTiles(group);
  if (type == Type::kBF16 && kv_type == Type::kBF16) return decode::FindBF16(dim, head_tiles, way);
  if (type == Type::kF16 && kv_type == Type::kF16) return decode::FindF16(dim, head_tiles, way);
  if (kv_type != Type::kE4M3) return nullptr;
  if (type == Type::kBF16) return decode::FindBF16OverE4M3(dim, head_tiles, way);
  if (type == Type::kF16) return decode::FindF16OverE4M3(dim, head_tiles, way);
  return nullptr;
}

// That a multiprocessor holds.
int BlocksOf(Type kv_type, int head_dim, int group) {
  return decode::BlocksOf(TypeBytes(kv_type), RoundedDim(head_dim), HeadTiles(group));
}

// Blocks that work is dealt out to: as many as the device holds.
int DealtBlocks(Type kv_type, int head_dim, int group) {
  return std::min(SmCount() * BlocksOf(kv_type, head_dim, group), decode::kMaxDealtBlocks);
}

bool TakesFast(const DecodeAttentionArgs& a) {
  const int group = a.heads / a.kv.kv_heads;
  const int row_bytes = a.kv.head_dim * static_cast<int>(TypeBytes(a.kv.type));
  return (a.type == Type::kBF16 || a.type == Type::kF16) &&
         (a.kv.type == a.type || a.kv.type == Type::kE4M3) && group <= decode::kMaxGroup &&
         a.kv.head_dim % 8 == 0 && a.kv.head_dim <= decode::kMaxHeadDim &&
         a.kv.block_size >= decode::kTile && (a.kv.block_size & (a.kv.block_size - 1)) == 0 &&
         a.q_stride % 8 == 0 && a.out_stride % 8 == 0 && Aligned16(a.q) && Aligned16(a.out) &&
         Aligned16(a.fresh_k) && Aligned16(a.fresh_v) && Aligned16(a.rotary) && Aligned16(a.kv.k) &&
         Aligned16(a.kv.v) && row_bytes % 16 == 0;
}

struct Shares {
  int cluster_size = 1;
  int clusters = 1;
};

// Rows and KV heads whose tiles come by rings, and of those the fewest that come in halves, which
// is as few blocks as keep the device busy. (8B, 1.1K, served, ms a step, quarters or wholes
// without and halves with: tp 2 16 rows 2.884 and 2.800, 24 3.128 and 3.073; tp 1 24 rows 5.373
// and 5.301; but wholes, 32 rows, 5.503 and 5.602. Quarters of 40 to 63, us a layer: 126.3 and
// 125.5; eighths of 32, 123.0 and 125.5.)
constexpr int kMinRingPairs = 40, kMinHalvedPairs = 64, kMaxRingPairs = 192;
constexpr int kMinRingContext = 512;  // of which each warp has several tiles

Shares Choose(int pairs, int max_context, int splits, bool by_ring) {
  Shares shares;
  if (by_ring && splits == 0 && pairs >= kMinHalvedPairs) {
    shares.cluster_size = 2;
    return shares;
  }
  const int tiles = (std::max(max_context, 1) + decode::kTile - 1) / decode::kTile;
  if (splits > 0) {
    while (shares.cluster_size * 2 <= std::min(splits, decode::kMaxCluster)) {
      shares.cluster_size *= 2;
    }
    return shares;
  }
  // Between one and three rounds of blocks (three fit on a multiprocessor) the
  // last round would leave most of the device idle: of 512 rows and KV
  // heads, halves were 2 % faster at 1K of context and 10 % at 8K.
  if (pairs > kBlocksWanted * 3 / 2 && pairs <= kBlocksWanted * 4) shares.cluster_size = 2;
  while (shares.cluster_size < decode::kMaxCluster &&
         pairs * shares.cluster_size * 2 <= kBlocksWanted &&
         shares.cluster_size * decode::kWarps < tiles) {
    shares.cluster_size *= 2;
  }
  if (shares.cluster_size == decode::kMaxCluster) {
    const int useful = tiles / (shares.cluster_size * decode::kWarps * decode::kTilesPerWarp);
    const int most =
        std::min({useful, kBlocksWanted / (pairs * shares.cluster_size), decode::kMaxClusters});
    while (shares.clusters * 2 <= most) shares.clusters *= 2;
  }
  return shares;
}

// Of something in the same row, counted from q.
int ColumnOf(const DecodeAttentionArgs& a, const void* part) {
  return part == nullptr
             ? 0
             : static_cast<int>((static_cast<const char*>(part) - static_cast<const char*>(a.q)) /
                                static_cast<int>(TypeBytes(a.type)));
}

constexpr int kMaxBriefPairs = 128;
// Rows and KV heads for which Choose may return several clusters.
constexpr int kMaxPairsOfClusters = kBlocksWanted / (2 * decode::kMaxCluster);
constexpr size_t kArrivedBytes = decode::kMaxDealtBlocks * sizeof(int);
static_assert(kMaxPairsOfClusters * decode::kMaxCluster <= decode::kMaxDealtBlocks);
// From so many rows and KV heads on work may be dealt out; of fewer, a row's blocks are a cluster.
// Contexts that are short, and so not far apart, gain nothing in 16 bits (8B, 1.1K, served, ms a
// step: 16 rows 4.91 and 5.04 dealt, 64 7.05 and 7.09), and of e4m3 where halves of them fit the
// device (128 rows and KV heads 14.4 and 15.3 us, 256 24.9 and 23.7).
constexpr int kMinDealtPairs = 32, kMaxShortContext = 2'048;

}  // namespace

bool DecodeAttentionTakesFresh(const DecodeAttentionArgs& args) {
  return args.kv.kv_heads > 0 && args.kv.head_dim % 16 == 0 && TakesFast(args);
}

size_t DecodeAttentionWorkspaceBytes(int heads, int kv_heads, int head_dim, int max_rows,
                                     int max_context) {
  if (kv_heads < 1) return 0;
  size_t partials = 0;
  for (int rows = 1; rows <= max_rows && rows * kv_heads <= kMaxPairsOfClusters; ++rows) {
    const int clusters = Choose(rows * kv_heads, max_context, 0, false).clusters;
    if (clusters > 1)
      partials = std::max(partials, static_cast<size_t>(rows) * kv_heads * clusters);
  }
  partials = std::max(partials, size_t{2} * DealtBlocks(Type::kE4M3, head_dim, heads / kv_heads));
  const size_t quads = static_cast<size_t>(heads / kv_heads) * head_dim / 4;
  return kArrivedBytes + partials * quads * (sizeof(float4) + sizeof(float2));
}

bool DecodeAttentionDeals(const DecodeAttentionArgs& args) {
  const int pairs = args.num_rows * args.kv.kv_heads;
  return pairs >= kMinDealtPairs &&
         (args.max_context > kMaxShortContext ||
          (args.kv.type == Type::kE4M3 && 2 * pairs > kBlocksWanted)) &&
         args.num_rows <= decode::kMaxDealtRows && TakesFast(args);
}

size_t DecodeAttentionPlanBytes() { return decode::PlanBytes(decode::kMaxDealtBlocks); }

cudaError_t PlanDecodeAttention(const Launch& launch, const DecodeAttentionArgs& args, void* plan) {
  if (args.num_rows < 1 || args.num_rows > decode::kMaxDealtRows || !TakesFast(args))
    return cudaErrorInvalidValue;
  const int blocks = DealtBlocks(args.kv.type, args.kv.head_dim, args.heads / args.kv.kv_heads);
  return decode::LaunchPlan(launch, args.rows, args.num_rows, args.kv.kv_heads, args.window, blocks,
                            static_cast<decode::BlockPlan*>(plan));
}

cudaError_t InitDecodeAttention() {
  const Type pairs[][2] = {{Type::kBF16, Type::kBF16},
                           {Type::kF16, Type::kF16},
                           {Type::kBF16, Type::kE4M3},
                           {Type::kF16, Type::kE4M3}};
  for (const auto& pair : pairs) {
    for (int dim : {64, 128, 256}) {
      for (int group : {1, decode::kMaxGroup}) {
        for (Way way : {Way::kPlain, Way::kRing, Way::kDealt}) {
          const Kernel kernel = FindKernel(pair[0], pair[1], dim, group, way);
          const size_t bytes = std::max(
              decode::SharedBytes(decode::kMaxGroup, dim, decode::kMaxCluster, way == Way::kRing),
              decode::Spread::LargestBytes());
          cudaError_t status = cudaFuncSetAttribute(
              kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
          if (status != cudaSuccess) return status;
          status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
          if (status != cudaSuccess) return status;
        }
      }
    }
  }
  const cudaError_t status = spread.Init(FindKernel(Type::kBF16, Type::kE4M3, 128, 1, Way::kPlain));
  return status != cudaSuccess ? status : InitPlainAttention();
}

cudaError_t DecodeAttention(const Launch& launch, const DecodeAttentionArgs& args) {
  if (args.num_rows == 0) return cudaSuccess;
  if (args.kv.kv_heads < 1 || args.heads < args.kv.kv_heads || args.heads % args.kv.kv_heads != 0) {
    return cudaErrorInvalidValue;
  }
  if (args.fresh_k != nullptr && !DecodeAttentionTakesFresh(args)) return cudaErrorInvalidValue;
  if (args.scales.rows != nullptr && args.fresh_k == nullptr) return cudaErrorInvalidValue;
  if (!Scalable(args.scales, args.type) || !Aligned16(args.scales.columns))
    return cudaErrorInvalidValue;
  if (!TakesFast(args)) {
    return PlainAttention(launch, {.type = args.type,
                                   .kv = args.kv,
                                   .heads = args.heads,
                                   .rows = args.rows,
                                   .spans = nullptr,
                                   .num_spans = 1,
                                   .max_count = args.num_rows,
                                   .q = args.q,
                                   .q_stride = args.q_stride,
                                   .out = args.out,
                                   .out_stride = args.out_stride,
                                   .scale = args.scale,
                                   .window = args.window});
  }

  const int group = args.heads / args.kv.kv_heads, pairs = args.num_rows * args.kv.kv_heads;
  const bool dealt = args.plan != nullptr;
  if (dealt && (args.workspace == nullptr || args.num_rows > decode::kMaxDealtRows))
    return cudaErrorInvalidValue;
  const bool has_ring = !dealt && decode::HasRing(TypeBytes(args.kv.type),
                                                  RoundedDim(args.kv.head_dim), HeadTiles(group));
  const bool by_ring = has_ring && pairs >= kMinRingPairs && pairs <= kMaxRingPairs &&
                       args.max_context >= kMinRingContext;
  const bool ring = args.ring != 0 ? has_ring && args.ring > 0 : by_ring;
  Shares shares;
  if (!dealt) shares = Choose(pairs, args.max_context, args.splits, by_ring);
  if (args.workspace == nullptr) shares.clusters = 1;
  Params p = {};
  p.rows = args.rows;
  p.plan = static_cast<const decode::BlockPlan*>(args.plan);
  p.k = args.kv.k;
  p.v = args.kv.v;
  p.kv_heads = args.kv.kv_heads;
  while ((1 << p.block_shift) < args.kv.block_size) ++p.block_shift;
  p.head_dim = args.kv.head_dim;
  p.group = group;
  p.q = args.q;
  p.out = args.out;
  p.q_stride = args.q_stride;
  p.out_stride = args.out_stride;
  p.factors = FactorsOf(args.type, args.kv, args.scale);
  p.window = args.window;
  p.cluster_size = shares.cluster_size;
  while ((1 << p.cluster_shift) < shares.cluster_size) ++p.cluster_shift;
  p.head_magic = decode::QuotientMagic(args.kv.head_dim / 4);
  p.slice_magic = decode::QuotientMagic(
      std::min(512, decode::QuadsPerBlock(group, args.kv.head_dim, shares.cluster_size)));
  p.clusters = shares.clusters;
  p.history_ready = args.history_ready;
  p.fresh_k = args.fresh_k;
  p.fresh_v = args.fresh_v;
  p.rotary = args.fresh_k != nullptr ? args.rotary : nullptr;
  p.scales = args.scales;
  p.k_column = ColumnOf(args, args.fresh_k);
  p.v_column = ColumnOf(args, args.fresh_v);
  const int dealt_blocks = DealtBlocks(args.kv.type, args.kv.head_dim, group);
  if (shares.clusters > 1 || dealt) {
    const size_t quads = static_cast<size_t>(group) * args.kv.head_dim / 4;
    const size_t partials =
        dealt ? size_t{2} * dealt_blocks : static_cast<size_t>(pairs) * shares.clusters;
    char* base = static_cast<char*>(args.workspace);
    p.arrived = reinterpret_cast<int*>(base);
    p.partials = reinterpret_cast<float4*>(base + kArrivedBytes);
    p.partial_statistics = reinterpret_cast<float2*>(p.partials + partials * quads);
  }
  p.warp_bytes = decode::WarpBytes(group, args.kv.head_dim, ring);
  const Way way = dealt ? Way::kDealt : ring ? Way::kRing : Way::kPlain;
  const Kernel kernel = FindKernel(args.type, args.kv.type, args.kv.head_dim, group, way);
  size_t shared_bytes = decode::SharedBytes(group, args.kv.head_dim, shares.cluster_size, ring);
  dim3 grid(shares.cluster_size * shares.clusters, args.kv.kv_heads, args.num_rows);
  if (dealt) {
    grid = dim3(dealt_blocks);
  } else {
    shared_bytes = std::max(
        shared_bytes, spread.Bytes(static_cast<int>(grid.x * grid.y * grid.z), p.cluster_shift,
                                   BlocksOf(args.kv.type, args.kv.head_dim, group)));
  }
  // Of 512 rows and KV heads at 1K of context 90 us if brief, 73 if not.
  const Launch own = {
      .stream = launch.stream, .pdl = launch.pdl, .brief = launch.brief && pairs <= kMaxBriefPairs};
  return LaunchKernel(own, kernel, grid, decode::kThreads, shared_bytes, shares.cluster_size, p);
}

}  // namespace lockstep::kernels
