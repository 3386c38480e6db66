#include "kernels/attention_plain.h"
#include "kernels/attention_prefill.h"
#include "kernels/attention_prefill_launch.h"
#include "kernels/attention_prefill_wgmma.h"
#include "kernels/attention_prefill_widen.h"
#include "kernels/device.cuh"
#include "kernels/vector.cuh"

namespace lockstep::kernels {
namespace {

using prefill::Kernel;
using prefill::Params;

int RoundedDim(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

bool TakesTensorCores(const PrefillAttentionArgs& a) {
  return (a.type == Type::kBF16 || a.type == Type::kF16) &&
         (a.kv.type == a.type || a.kv.type == Type::kE4M3) && a.kv.head_dim % 8 == 0 &&
         a.kv.head_dim <= 256 && a.kv.block_size > 0 && a.q_stride % 8 == 0 &&
         a.out_stride % 8 == 0 && Aligned16(a.q) && Aligned16(a.out) && Aligned16(a.kv.k) &&
         Aligned16(a.kv.v);
}

Params ParamsOf(const PrefillAttentionArgs& args) {
  Params p = {};
  p.spans = args.spans;
  p.block_table = args.block_table;
  p.table_stride = args.table_stride;
  p.k = args.kv.k;
  p.v = args.kv.v;
  p.kv_heads = args.kv.kv_heads;
  p.block_size = args.kv.block_size;
  p.head_dim = args.kv.head_dim;
  p.group = args.heads / args.kv.kv_heads;
  p.q = args.q;
  p.out = args.out;
  p.q_stride = args.q_stride;
  p.out_stride = args.out_stride;
  p.factors = FactorsOf(args.type, args.kv, args.scale);
  p.window = args.window;
  return p;
}

// The same over the scratch.
PrefillAttentionArgs Widened(const PrefillAttentionArgs& args) {
  PrefillAttentionArgs wide = args;
  wide.kv.type = args.type;
  wide.kv.k = args.scratch.k;
  wide.kv.v = args.scratch.v;
  wide.block_table = args.scratch.block_table;
  return wide;
}

cudaError_t LaunchWidened(const Launch& launch, const PrefillAttentionArgs& args) {
  if (cudaError_t error = prefill::LaunchWiden(launch, args); error != cudaSuccess) return error;
  const PrefillAttentionArgs wide = Widened(args);
  Params p = ParamsOf(wide);
  p.factors.score *= args.kv.k_scale;
  p.factors.v = args.kv.v_scale;
  // Not early: the table is read through a cache that is empty when a kernel begins.
  Launch after = launch;
  after.pdl = false;
  return prefill::LaunchWgmma(after, wide, p);
}

}  // namespace

bool PrefillAttentionWidens(const PrefillAttentionArgs& args) {
  const PrefillAttentionArgs wide = Widened(args);
  return args.kv.type == Type::kE4M3 && Aligned16(args.kv.k) && Aligned16(args.kv.v) &&
         TakesTensorCores(wide) && prefill::WgmmaTakes(wide);
}

cudaError_t InitPrefillAttention() {
  const Type pairs[][2] = {{Type::kBF16, Type::kBF16},
                           {Type::kF16, Type::kF16},
                           {Type::kBF16, Type::kE4M3},
                           {Type::kF16, Type::kE4M3}};
  for (const auto& pair : pairs) {
    for (int dim : {64, 128, 256}) {
      const cudaError_t status = cudaFuncSetAttribute(
          prefill::FindMma(pair[0], pair[1], dim), cudaFuncAttributeMaxDynamicSharedMemorySize,
          static_cast<int>(prefill::MmaSharedBytes(dim)));
      if (status != cudaSuccess) return status;
    }
  }
  const cudaError_t status = prefill::InitWgmma();
  return status != cudaSuccess ? status : InitPlainAttention();
}

cudaError_t PrefillAttention(const Launch& launch, const PrefillAttentionArgs& args) {
  if (args.num_spans == 0 || args.max_count == 0) return cudaSuccess;
  if (args.kv.kv_heads < 1 || args.heads < args.kv.kv_heads || args.heads % args.kv.kv_heads != 0) {
    return cudaErrorInvalidValue;
  }
  if (!TakesTensorCores(args)) {
    return PlainAttention(launch, {.type = args.type,
                                   .kv = args.kv,
                                   .heads = args.heads,
                                   .rows = {nullptr, nullptr, args.block_table, args.table_stride},
                                   .spans = args.spans,
                                   .num_spans = args.num_spans,
                                   .max_count = args.max_count,
                                   .q = args.q,
                                   .q_stride = args.q_stride,
                                   .out = args.out,
                                   .out_stride = args.out_stride,
                                   .scale = args.scale,
                                   .window = args.window});
  }
  if (args.scratch.k != nullptr && PrefillAttentionWidens(args)) return LaunchWidened(launch, args);
  const Params p = ParamsOf(args);
  if (prefill::WgmmaTakes(args)) return prefill::LaunchWgmma(launch, args, p);
  const int rows = args.max_count * p.group;
  const int dim = RoundedDim(args.kv.head_dim);
  const dim3 grid((rows + prefill::kMmaRows - 1) / prefill::kMmaRows, args.kv.kv_heads,
                  args.num_spans);
  return LaunchKernel(launch, prefill::FindMma(args.type, args.kv.type, dim), grid,
                      prefill::kMmaThreads, prefill::MmaSharedBytes(dim), 1, p);
}

}  // namespace lockstep::kernels
