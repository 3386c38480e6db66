#include "kernels/gemv.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>

#include "kernels/device_attributes.h"
#include "kernels/gemv_plan.h"

namespace lockstep::kernels {
namespace {

bool Aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

constexpr int kPushUnit = 8;  // rows of a vector of 16 bytes

constexpr int DivUp(int a, int b) { return (a + b - 1) / b; }

bool SupportsExchange(const GemvArgs& args) {
  const bool reduce = args.prologue == GemvPrologue::kReduce;
  const bool push = args.epilogue == GemvEpilogue::kPush;
  if (!reduce && !push) return true;
  if (reduce == push || args.exchange == nullptr) return false;
  const GemvExchange& exchange = *args.exchange;
  if (exchange.peers.size < 1 || exchange.peers.size > kMaxPeers) return false;
  if (exchange.width % 8 != 0 || exchange.width != (push ? args.n : args.k)) return false;
  if (push) return args.prologue == GemvPrologue::kPlain && args.n % 8 == 0;
  return args.residual_in != nullptr && args.residual_out != nullptr &&
         args.residual_in != args.residual_out;
}

int MostBlocks(const GemvArgs& args, int sm_count) {
  return args.max_blocks > 0 ? std::min(args.max_blocks, sm_count) : sm_count;
}

// Of the kPush whose sums a kReduce takes.
int PushedBlocks(const GemvArgs& reduce) {
  return std::min(MostBlocks(reduce, SmCount()), reduce.exchange->width / kPushUnit);
}

template <typename W, typename T>
cudaError_t LaunchAs(const Launch& launch, const GemvArgs& args) {
  if (args.m == 1) {
    // A kReduce polls before it waits, and may: while the blocks of the kPush before it are on all
    // SMs, what cleared its slot three exchanges ago has ended. A small row's are not.
    Launch behind = launch;
    if (args.prologue == GemvPrologue::kReduce && PushedBlocks(args) < SmCount())
      behind.pdl = false;
    return LaunchRow<W, T>(behind, args, PlanRow(args, SmCount()));
  }
  return LaunchSkinny<W, T>(launch, args, PlanSkinny(args, SmCount()));
}

}  // namespace

RowPlan PlanRow(const GemvArgs& args, int sm_count) {
  const int weight_bytes = static_cast<int>(TypeBytes(args.weight_type));
  // Capacity: 64 registers of x, and where eight warps' are too few, 128. With 64 a block
  // leaves registers for one of the attention that comes behind it.
  const int usual = weight_bytes == 2 ? 8 : 4, largest = 2 * usual;
  const int pieces = DivUp(args.k * weight_bytes, 512);  // of 32 lanes x 16 bytes
  RowPlan plan;
  plan.unit = args.epilogue == GemvEpilogue::kPush ? kPushUnit : IsGate(args.epilogue) ? 2 : 1;
  while (plan.split < kGemvWarps && DivUp(pieces, plan.split) > usual) plan.split *= 2;
  int vectors = largest;
  while (vectors > largest / 4 && vectors / 2 * plan.split >= pieces) vectors /= 2;
  if (vectors * plan.split < pieces) return plan;

  const size_t rest = size_t{2} * args.k + sizeof(float) * plan.split * kRowChunk;
  plan.stage_bytes = static_cast<size_t>(StageRows(vectors)) * args.k * weight_bytes;
  const int groups = kGemvWarps / plan.split;
  // A deeper ring would not be faster, but delay x behind the weights; and no fewer
  // than three stages, where one is large.
  const size_t wanted = std::max<size_t>(3 * plan.stage_bytes, size_t{144} << 10);
  plan.stages = static_cast<int>(
      std::min<size_t>(std::min(wanted, kMaxGemvShared - rest) / plan.stage_bytes, kMaxGemvStages));
  plan.stages = plan.stages / groups * groups;
  if (plan.stages == 0) return plan;
  plan.shared_bytes = std::max(kMinGemvShared, plan.stages * plan.stage_bytes + rest);
  plan.blocks = std::min(MostBlocks(args, sm_count), args.n / plan.unit);
  plan.vectors = vectors;
  return plan;
}

SkinnyPlan PlanSkinny(const GemvArgs& args, int sm_count) {
  const int weight_bytes = static_cast<int>(TypeBytes(args.weight_type));
  const int pieces = args.k * weight_bytes / 64;
  const int capacity = weight_bytes == 2 ? kSkinnyPieces : kSkinnyPieces / 2;
  SkinnyPlan plan;
  plan.phases = DivUp(pieces, kGemvWarps * capacity);
  plan.pieces = DivUp(pieces, kGemvWarps * plan.phases);
  plan.row_stride = static_cast<size_t>(plan.pieces | 1) * 64;
  plan.stage_bytes = 16 * plan.row_stride;
  const size_t partial = sizeof(float) * 2 * kGemvWarps * (args.m <= 8 ? 8 : 16) * 20;
  plan.depth = static_cast<int>(std::min<size_t>(
      (kMaxGemvShared - partial) / (kGemvWarps * plan.stage_bytes), kMaxGemvStages / kGemvWarps));
  plan.shared_bytes =
      std::max(kMinGemvShared, kGemvWarps * plan.depth * plan.stage_bytes + partial);
  plan.blocks = std::min(MostBlocks(args, sm_count), DivUp(args.n, 16));
  return plan;
}

size_t GemvExchangeBytes(int size, int width) { return size_t{4} * size * width * 2; }

cudaError_t ClearGemvExchange(const GemvExchange& exchange, cudaStream_t stream) {
  const Peers& peers = exchange.peers;
  return cudaMemsetAsync(peers.base[peers.rank] + exchange.offset, 0xff,
                         GemvExchangeBytes(peers.size, exchange.width), stream);
}

cudaError_t InitGemv() {
  for (cudaError_t (*init)() :
       {InitRow<__nv_bfloat16, __nv_bfloat16>, InitRow<__half, __half>,
        InitRow<__nv_fp8_e4m3, __nv_bfloat16>, InitRow<__nv_fp8_e4m3, __half>,
        InitSkinny<__nv_bfloat16, __nv_bfloat16>, InitSkinny<__half, __half>,
        InitSkinny<__nv_fp8_e4m3, __nv_bfloat16>, InitSkinny<__nv_fp8_e4m3, __half>}) {
    const cudaError_t status = init();
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

bool GemvSupports(const GemvArgs& args) {
  const bool fp8 = args.weight_type == Type::kE4M3;
  if (args.type != Type::kBF16 && args.type != Type::kF16) return false;
  if (fp8 ? args.scales == nullptr : args.weight_type != args.type) return false;
  if (args.m < 1 || args.m > 16 || args.n < 1 || args.k < 1 || args.k > 32768) return false;
  if (IsGate(args.epilogue) && args.n % 2 != 0) return false;
  if (!Aligned(args.weights) || !Aligned(args.x) || !Aligned(args.norm_weight)) return false;
  if (args.x_stride % 8 != 0 || !SupportsExchange(args)) return false;
  if (args.m == 1) {
    return args.k % (fp8 ? 16 : 8) == 0 && args.n >= PlanRow(args, SmCount()).unit &&
           PlanRow(args, SmCount()).vectors != 0;
  }
  return args.prologue == GemvPrologue::kPlain && args.epilogue != GemvEpilogue::kPush &&
         args.k % (fp8 ? 64 : 32) == 0;
}

int GemvKeys(const GemvArgs& args) {
  return args.m == 1 ? PlanRow(args, SmCount()).blocks : PlanSkinny(args, SmCount()).blocks;
}

cudaError_t Gemv(const Launch& launch, const GemvArgs& args) {
  if (!GemvSupports(args)) return cudaErrorInvalidValue;
  const bool bf16 = args.type == Type::kBF16;
  if (args.weight_type == Type::kE4M3) {
    return bf16 ? LaunchAs<__nv_fp8_e4m3, __nv_bfloat16>(launch, args)
                : LaunchAs<__nv_fp8_e4m3, __half>(launch, args);
  }
  return bf16 ? LaunchAs<__nv_bfloat16, __nv_bfloat16>(launch, args)
              : LaunchAs<__half, __half>(launch, args);
}

}  // namespace lockstep::kernels
