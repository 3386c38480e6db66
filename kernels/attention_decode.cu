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

Kernel FindKernel(Type type, Type kv_type, const decode::KernelShape& shape) {
  if (type == Type::kBF16 && kv_type == Type::kBF16) return decode::FindBF16(shape);
  if (type == Type::kF16 && kv_type == Type::kF16) return decode::FindF16(shape);
  if (kv_type != Type::kE4M3) return nullptr;
  if (type == Type::kBF16) return decode::FindBF16OverE4M3(shape);
  if (type == Type::kF16) return decode::FindF16OverE4M3(shape);
  return nullptr;
}

// That a multiprocessor holds.
int BlocksOf(Type kv_type, int head_dim, int group, Way way) {
  return decode::BlocksOf(TypeBytes(kv_type), RoundedDim(head_dim), HeadTiles(group), way);
}
// A device without clusters has no copy engine that fills one either.
bool HasRing(Type kv_type, int head_dim, int group) {
  return HasClusters() &&
         decode::HasRing(TypeBytes(kv_type), RoundedDim(head_dim), HeadTiles(group));
}

// Of work that is dealt out: of few rows and KV heads parts are short, and a ring of one tile is at
// first as long in coming (us alone, 8K, plain and by rings: 512 504 and 494, 2,048 1,961 and
// 1,927, 128 134 and 134; where seven of eight have a sixteenth 33.2 and 34.9, 32 16.5 and 19.8).
constexpr int kMinDealtRingPairs = 256;
Way DealtWay(int pairs, bool has_ring) {
  return has_ring && pairs >= kMinDealtRingPairs ? Way::kRing : Way::kPlain;
}
// The blocks that it is dealt out to: as many as the device holds.
int DealtBlocks(Type kv_type, int head_dim, int group, Way way) {
  return std::min(SmCount() * BlocksOf(kv_type, head_dim, group, way), decode::kMaxDealtBlocks);
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

cudaError_t Allow(Kernel kernel, size_t shared_bytes) {
  const cudaError_t status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (status != cudaSuccess || !HasClusters()) return status;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

struct Shares {
  int cluster_size = 1;
  int clusters = 1;
};

// Rows and KV heads whose tiles come by deep rings, and of those the fewest that come in halves,
// which is as few blocks as keep the device busy. (8B, 1.1K, served, ms a step, quarters or wholes
// without and halves with: tp 2 16 rows 2.884 and 2.800, 24 3.128 and 3.073; tp 1 24 rows 5.373
// and 5.301. Quarters of 40 to 63, us a layer: 126.3 and 125.5; eighths of 32, 123.0 and 125.5.)
// Of more, four blocks of rings of one tile fit where three without do, and bring as much as one
// round of them can (us alone: 512 77.1 and 71.4, 1,024 142.4 and 137.7, 2,048 271.9 and 267.0).
constexpr int kMinRingPairs = 40, kMinHalvedPairs = 64, kMaxDeepRingPairs = 192;
constexpr int kMinRingContext = 512;  // of which each warp has several tiles

Way WayOf(int pairs, int max_context, bool has_ring) {
  if (!has_ring || pairs < kMinRingPairs || max_context < kMinRingContext) return Way::kPlain;
  return pairs <= kMaxDeepRingPairs ? Way::kDeepRing : Way::kRing;
}

// room: blocks that the device holds.
Shares Choose(int pairs, int max_context, int splits, Way way, int room) {
  Shares shares;
  if (!HasClusters()) return shares;  // a row and KV head is one block's
  if (way == Way::kDeepRing && splits == 0 && pairs >= kMinHalvedPairs) {
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
  // Of one to one and a half rounds of blocks the second would leave most of the device idle: 512
  // rows and KV heads where 396 fit take 5 % less in halves, but 1,024 of them 3 % more.
  if (pairs > room && pairs <= room * 3 / 2) shares.cluster_size = 2;
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
// step: 16 rows 4.91 and 5.04 dealt; 64 by rings 6.90 and 7.00, though alone one takes as long as
// the other), and of e4m3 where halves of them fit the device (128 rows and KV heads 14.4 and 15.3
// us, 256 24.9 and 23.7).
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
    const int clusters = Choose(rows * kv_heads, max_context, 0, Way::kPlain, 0).clusters;
    if (clusters > 1)
      partials = std::max(partials, static_cast<size_t>(rows) * kv_heads * clusters);
  }
  partials = std::max(
      partials, size_t{2} * DealtBlocks(Type::kE4M3, head_dim, heads / kv_heads, Way::kPlain));
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
  const int group = args.heads / args.kv.kv_heads;
  const Way way =
      DealtWay(args.num_rows * args.kv.kv_heads, HasRing(args.kv.type, args.kv.head_dim, group));
  const int blocks = DealtBlocks(args.kv.type, args.kv.head_dim, group, way);
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
        for (Way way : {Way::kPlain, Way::kRing, Way::kDeepRing}) {
          for (bool dealt : {false, true}) {
            const Kernel kernel = FindKernel(pair[0], pair[1], {dim, HeadTiles(group), way, dealt});
            const cudaError_t status = Allow(
                kernel,
                std::max(decode::SharedBytes(decode::kMaxGroup, dim, decode::kMaxCluster, way),
                         decode::Spread::LargestBytes()));
            if (status != cudaSuccess) return status;
          }
        }
      }
    }
  }
  const cudaError_t status =
      spread.Init(FindKernel(Type::kBF16, Type::kE4M3, {128, 1, Way::kPlain, false}));
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
  const auto blocks_of = [&](Way way) {
    return BlocksOf(args.kv.type, args.kv.head_dim, group, way);
  };
  const bool has_ring = HasRing(args.kv.type, args.kv.head_dim, group);
  Way way = dealt ? DealtWay(pairs, has_ring) : WayOf(pairs, args.max_context, has_ring);
  Shares shares;
  if (!dealt) {
    shares = Choose(pairs, args.max_context, args.splits, way, SmCount() * blocks_of(way));
    if (has_ring && args.ring != 0)
      way = args.ring < 0 ? Way::kPlain : args.ring == 1 ? Way::kRing : Way::kDeepRing;
  }
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
  const int dealt_blocks = DealtBlocks(args.kv.type, args.kv.head_dim, group, way);
  if (shares.clusters > 1 || dealt) {
    const size_t quads = static_cast<size_t>(group) * args.kv.head_dim / 4;
    const size_t partials =
        dealt ? size_t{2} * dealt_blocks : static_cast<size_t>(pairs) * shares.clusters;
    char* base = static_cast<char*>(args.workspace);
    p.arrived = reinterpret_cast<int*>(base);
    p.partials = reinterpret_cast<float4*>(base + kArrivedBytes);
    p.partial_statistics = reinterpret_cast<float2*>(p.partials + partials * quads);
  }
  p.warp_bytes = decode::WarpBytes(group, args.kv.head_dim, way);
  const Kernel kernel = FindKernel(args.type, args.kv.type,
                                   {RoundedDim(args.kv.head_dim), HeadTiles(group), way, dealt});
  size_t shared_bytes = decode::SharedBytes(group, args.kv.head_dim, shares.cluster_size, way);
  dim3 grid(shares.cluster_size * shares.clusters, args.kv.kv_heads, args.num_rows);
  if (dealt) {
    grid = dim3(dealt_blocks);
  } else {
    shared_bytes = std::max(shared_bytes, spread.Bytes(static_cast<int>(grid.x * grid.y * grid.z),
                                                       p.cluster_shift, blocks_of(way)));
  }
  // Of 512 rows and KV heads at 1K of context 90 us if brief, 73 if not (by loads to registers).
  const Launch own = {
      .stream = launch.stream, .pdl = launch.pdl, .brief = launch.brief && pairs <= kMaxBriefPairs};
  return LaunchKernel(own, kernel, grid, decode::kThreads, shared_bytes, shares.cluster_size, p);
}

}  // namespace lockstep::kernels
