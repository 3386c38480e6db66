// One decoded row where its shapes allow: all layers and the head are one kernel
// (kernels/row_stack.h), which runs where a step asks for logits.
#include "kernels/row_stack.h"
#include "worker/backend/cuda/backend_impl.h"

namespace lockstep::cuda {
namespace {

// Wider rows: kernels of their own, which request more at a time, are faster on 2 ranks with
// weights of 16 bits (70B, 8,192: 17.45 against 17.89 ms; FP8 10.30 against 9.99), but not on 4
// (9.79 against 9.39).
constexpr int kMaxStackHidden = 4'096;
constexpr int kMinRanksForWider = 4, kMinRanksForWiderFp8 = 2;

}  // namespace

kernels::RowStackArgs CudaBackend::StackArgs() {
  return {.type = type_,
          .weight_type = model_.layers[0].qkv.weight.type,
          .hidden = hidden_,
          .heads = static_cast<int>(plan_.local_heads),
          .intermediate = intermediate_,
          .vocab = static_cast<int>(model_.head.rows),
          .gate = GateEpilogue(config_),
          .norm_eps = static_cast<float>(config_.norm_eps),
          .norm_plus_one = config_.norm_weight_plus_one,
          .layers = stack_layers_.data(),
          .num_layers = static_cast<int>(stack_layers_.size()),
          .final_norm = model_.final_norm.weight,
          .head = model_.head.data,
          .rows = io_.rows(),
          .residual = buffers_.residual.get(),
          .logits = sampling_.logits(),
          .exchange = &exchange_region_,
          .workspace = stack_workspace_.get()};
}

// After PrepareExchange.
absl::Status CudaBackend::PrepareStack() {
  if (!use_row_stack_) return absl::OkStatus();
  stack_layers_.clear();
  for (size_t l = 0; l < model_.layers.size(); ++l) {
    const LayerWeights& w = model_.layers[l];
    const bool slides = config_.sliding_window > 0 && config_.sliding_layers[l];
    const bool local = slides && rope_local_.get() != nullptr;
    const auto matrix = [](const Linear& linear) {
      return kernels::StackMatrix{linear.weight.data, linear.weight.scales};
    };
    stack_layers_.push_back({.qkv = matrix(w.qkv),
                             .o = matrix(w.o),
                             .gate_up = matrix(w.up),
                             .down = matrix(w.down),
                             .attention_norm = w.input_norm.weight,
                             .mlp_norm = w.mlp_norm.weight,
                             .kv = Kv(static_cast<int64_t>(l)),
                             .rotary = local ? rope_local_.get() : rope_.get(),
                             .scale = static_cast<float>(config_.attention_scale),
                             .window = slides ? static_cast<int>(config_.sliding_window) : 0});
  }
  const LayerWeights& any = model_.layers[0];
  const int ranks_for_wider = Quantized(any.qkv) ? kMinRanksForWiderFp8 : kMinRanksForWider;
  const bool pays = hidden_ <= kMaxStackHidden || collectives_.size() >= ranks_for_wider;
  can_stack_ = can_fold_ && pays && any.qkv.bias == nullptr && any.q_norm == nullptr &&
               model_.head.type == type_ && kernels::RowStackSupports(StackArgs());
  if (!can_stack_) return absl::OkStatus();
  const size_t bytes = kernels::RowStackBytes(StackArgs());
  if (stack_workspace_.bytes() != bytes) {
    if (absl::Status s = stack_workspace_.Allocate(bytes, "a step's words"); !s.ok()) return s;
  }
  return ToStatus(kernels::ClearRowStack(StackArgs(), stream_), "a step's words");
}

}  // namespace lockstep::cuda
