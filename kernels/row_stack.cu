#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>

#include "kernels/device_attributes.h"
#include "kernels/gemv_elements.cuh"
#include "kernels/row_stack.h"
#include "kernels/row_stack_plan.h"

namespace lockstep::kernels {
namespace {

using stack::Params;
using stack::ProductPlan;

constexpr int kMaxHidden = stack::kRowVectors * stack::kThreads * 8;

bool Aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
bool PowerOfTwo(int v) { return v > 0 && (v & (v - 1)) == 0; }

// `n` rows of `k` elements; false: K is too long.
bool PlanProduct(int n, int k, Type type, int unit, ProductPlan* q) {
  *q = {};
  q->rows = n;
  q->row_bytes = k * static_cast<int>(TypeBytes(type));
  q->unit = unit;
  const int vectors = (q->row_bytes + 511) / 512;
  const auto count = [&] { return (vectors + (1 << q->split_log2) - 1) >> q->split_log2; };
  // Tensor cores take rows of e4m3 by twos, of which a piece has room for half as much each.
  const int most = type == Type::kE4M3 ? 4 : 8;
  while (count() > most && 1 << q->split_log2 < stack::kWarps) ++q->split_log2;
  q->count = count();
  if (q->count > most) return false;
  q->parts = (vectors + q->count - 1) / q->count;
  q->capacity = q->count <= 4 ? 4 : 8;
  return true;
}

void Deal(int blocks, ProductPlan* q) {
  q->share = q->rows / q->unit / blocks;
  q->remainder = q->rows / q->unit % blocks;
}

// What does not depend on where things are; false: not supported.
bool Plan(const RowStackArgs& args, Params* p) {
  *p = {};
  if (args.type != Type::kBF16 && args.type != Type::kF16) return false;
  if (args.weight_type != args.type && args.weight_type != Type::kE4M3) return false;
  if (args.layers == nullptr || args.num_layers < 2 || args.num_layers > kMaxStackLayers ||
      args.num_layers % 2 != 0 || !IsGate(args.gate) || args.exchange == nullptr)
    return false;
  const KvLayer& kv = args.layers[0].kv;
  if (kv.kv_heads < 1 || args.heads < 1 || args.heads % kv.kv_heads != 0) return false;
  if (kv.type != args.type && kv.type != Type::kE4M3) return false;
  if ((kv.head_dim != 64 && kv.head_dim != 128) || kv.block_size < stack::kTile ||
      !PowerOfTwo(kv.block_size))
    return false;
  if (args.hidden < 8 || args.hidden > kMaxHidden || args.intermediate < 8 || args.vocab < 1)
    return false;
  const int multiple = args.weight_type == Type::kE4M3 ? 16 : 8;
  if (args.hidden % multiple != 0 || args.intermediate % multiple != 0) return false;
  p->num_layers = args.num_layers;
  p->hidden = args.hidden;
  p->heads = args.heads;
  p->kv_heads = kv.kv_heads;
  p->head_dim = kv.head_dim;
  p->group = args.heads / kv.kv_heads;
  p->intermediate = args.intermediate;
  if (p->group > stack::kMaxGroup) return false;
  while ((1 << p->block_shift) < kv.block_size) ++p->block_shift;
  p->eps = args.norm_eps;
  p->weight_offset = args.norm_plus_one ? 1.0f : 0.0f;
  p->gate = args.gate;

  const int width = args.heads * kv.head_dim;
  const Type type = args.weight_type;
  ProductPlan* q = p->products;
  if (!PlanProduct(width + 2 * kv.kv_heads * kv.head_dim, args.hidden, type, 2, &q[stack::kQkv]) ||
      !PlanProduct(args.hidden, width, type, 8, &q[stack::kOutput]) ||
      !PlanProduct(2 * args.intermediate, args.hidden, type, 4, &q[stack::kGateUp]) ||
      !PlanProduct(args.hidden, args.intermediate, type, 8, &q[stack::kDown]) ||
      !PlanProduct(args.vocab, args.hidden, args.type, 1, &q[stack::kHead]))
    return false;
  // Every block has a part of every product: see stack::ClearBehind.
  p->blocks = args.max_blocks > 0 ? std::min(args.max_blocks, SmCount()) : SmCount();
  for (const stack::Step step :
       {stack::kQkv, stack::kOutput, stack::kGateUp, stack::kDown, stack::kHead})
    p->blocks = std::min(p->blocks, q[step].rows / q[step].unit);
  p->seen = args.layers[0].window;
  p->max_shares = std::min(stack::kMaxShares, p->blocks / kv.kv_heads);
  if (p->max_shares < 1) return false;
  for (const stack::Step step :
       {stack::kQkv, stack::kOutput, stack::kGateUp, stack::kDown, stack::kHead})
    Deal(p->blocks, &q[step]);
  const int widest = std::max({args.hidden, width, args.intermediate});
  p->halves = (widest + 127) / 128 * 128 + 64;  // the other half of the banks
  p->sums_at = 2 * p->halves;
  const auto divide = [&](int sums) {
    p->sums = sums;
    p->x_bytes = (std::max(p->sums_at + stack::SumsBytes(sums),
                           stack::AttentionBytes(p->group, kv.head_dim)) +
                  127) /
                 128 * 128;
    p->depth = stack::kMaxDepth;
    while (p->depth > 1 && SharedBytes(*p) > stack::kMaxStackShared) --p->depth;
    return p->depth;
  };
  // Deeper rings are worth more than fewer chunks.
  const int deepest = divide(stack::kMostSums / 2);
  if (divide(stack::kMostSums) < deepest) divide(stack::kMostSums / 2);
  p->window = std::min(p->depth, stack::kWindow);
  return p->depth > 1;
}

// The words' parts of the workspace, from `base` on; returns their bytes.
size_t PlaceWords(const Params& p, std::byte* base, stack::Words* words) {
  const size_t width = size_t(p.heads) * p.head_dim;
  size_t at = 0;
  const auto take = [&](uint32_t*(&both)[2], size_t bytes) {
    for (uint32_t*& part : both) {
      part = reinterpret_cast<uint32_t*>(base + at);
      at += (bytes + 255) / 256 * 256;
    }
  };
  take(words->qkv, 2 * (width + size_t{2} * p.kv_heads * p.head_dim));
  take(words->heads, 2 * width);
  take(words->activated, 2 * size_t(p.intermediate));
  take(words->partials, 4 * width * p.max_shares);
  take(words->statistics, size_t{8} * p.heads * p.max_shares);
  return at;
}

stack::Layer ToLayer(const RowStackArgs& args, const StackLayer& from) {
  stack::Layer to = {};
  const auto set = [&](stack::Step step, const StackMatrix& matrix) {
    to.weights[step] = static_cast<const uint8_t*>(matrix.weights);
    to.scales[step] = args.weight_type == Type::kE4M3 ? matrix.scales : nullptr;
  };
  set(stack::kQkv, from.qkv);
  set(stack::kOutput, from.o);
  set(stack::kGateUp, from.gate_up);
  set(stack::kDown, from.down);
  to.norms[0] = from.attention_norm;
  to.norms[1] = from.mlp_norm;
  to.k = from.kv.k;
  to.v = from.kv.v;
  to.rotary = from.rotary;
  to.factors = FactorsOf(args.type, from.kv, from.scale);
  return to;
}

bool LayersAlike(const RowStackArgs& args) {
  for (int i = 0; i < args.num_layers; ++i) {
    const StackLayer& layer = args.layers[i];
    if (layer.window != args.layers[0].window) return false;
    for (const StackMatrix* matrix : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
      if (!Aligned(matrix->weights)) return false;
      if (args.weight_type == Type::kE4M3 && matrix->scales == nullptr) return false;
    }
    for (const void* at : {layer.attention_norm, layer.mlp_norm}) {
      if (at == nullptr || !Aligned(at)) return false;
    }
  }
  return Aligned(args.head) && args.final_norm != nullptr && Aligned(args.final_norm);
}

}  // namespace

bool RowStackSupports(const RowStackArgs& args) {
  Params p;
  return Plan(args, &p) && LayersAlike(args) && args.exchange->width == args.hidden &&
         args.exchange->peers.size >= 1 && args.exchange->peers.size <= kMaxPeers;
}

size_t RowStackBytes(const RowStackArgs& args) {
  Params p;
  stack::Words words;
  return Plan(args, &p) ? PlaceWords(p, nullptr, &words) : 0;
}

cudaError_t ClearRowStack(const RowStackArgs& args, cudaStream_t stream) {
  return cudaMemsetAsync(args.workspace, 0xff, RowStackBytes(args), stream);
}

cudaError_t InitRowStack() {
  for (cudaError_t (*init)() :
       {stack::InitStack<__nv_bfloat16, __nv_bfloat16>, stack::InitStack<__half, __half>,
        stack::InitStack<__nv_fp8_e4m3, __nv_bfloat16>, stack::InitStack<__nv_fp8_e4m3, __half>}) {
    const cudaError_t status = init();
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaError_t RowStack(const Launch& launch, const RowStackArgs& args) {
  Params p;
  if (!RowStackSupports(args) || !Plan(args, &p)) return cudaErrorInvalidValue;
  PlaceWords(p, static_cast<std::byte*>(args.workspace), &p.words);
  p.head = static_cast<const uint8_t*>(args.head);
  p.final_norm = args.final_norm;
  p.logits = args.logits;
  p.residual = args.residual;
  p.rows = args.rows;
  p.exchange = MakeExchangeWords(*args.exchange);
  for (int i = 0; i < args.num_layers; ++i) p.layers[i] = ToLayer(args, args.layers[i]);
  const bool bf16 = args.type == Type::kBF16;
  const auto run = args.weight_type == Type::kE4M3
                       ? bf16 ? stack::LaunchStack<__nv_fp8_e4m3, __nv_bfloat16>
                              : stack::LaunchStack<__nv_fp8_e4m3, __half>
                   : bf16 ? stack::LaunchStack<__nv_bfloat16, __nv_bfloat16>
                          : stack::LaunchStack<__half, __half>;
  return run(launch, args.layers[0].kv.type == Type::kE4M3, args.layers[0].kv.head_dim, p);
}

}  // namespace lockstep::kernels
