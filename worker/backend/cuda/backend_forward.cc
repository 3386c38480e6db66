#include "kernels/activation.h"
#include "kernels/attention_prefill.h"
#include "kernels/embed.h"
#include "kernels/qkv_finish.h"
#include "worker/backend/cuda/backend_impl.h"

namespace lockstep::cuda {
namespace {

using kernels::GemvEpilogue;
using kernels::Launch;

// Rows times KV heads from which attention waits for a product that would let it begin.
// Blocks that begin among the product's run on multiprocessors divided for it, with
// little L1, and so do those after them (8B, 64 rows of e4m3: 6.52 ms a step, not 5.96).
constexpr int64_t kMinApartPairs = 128;

// By measurement: meeting a scale an element (see Matmul) costs the activation of long rows as much
// as there is to gain, unless much of the scaling kernel's last tile of rows were for nothing.
constexpr int kScaledTile = 128;
constexpr int kMaxUnscaledGateUp = 1'024;
constexpr int kMaxScaledUpWidth = 16'384;
bool LeavesGateUpUnscaled(int rows, int width) {
  if (rows <= kScaledTile / 2) return true;
  if (rows <= kScaledTile || rows > kMaxUnscaledGateUp) return false;
  return width <= kMaxScaledUpWidth || (rows - 1) % kScaledTile < kScaledTile * 3 / 4;
}

kernels::Activation ToKernel(Activation activation) {
  switch (activation) {
    case Activation::kSilu:
      return kernels::Activation::kSilu;
    case Activation::kGeluTanh:
      return kernels::Activation::kGeluTanh;
    case Activation::kGelu:
      return kernels::Activation::kGelu;
    case Activation::kRelu:
      return kernels::Activation::kRelu;
  }
  return kernels::Activation::kSilu;
}

}  // namespace

// The gate's activation in the product's own epilogue; kStore: it has none.
GemvEpilogue GateEpilogue(const ModelConfig& config) {
  if (!config.gated_mlp || config.mlp_bias) return GemvEpilogue::kStore;
  if (config.activation == Activation::kSilu) return GemvEpilogue::kSiluGate;
  if (config.activation == Activation::kGeluTanh) return GemvEpilogue::kGeluGate;
  return GemvEpilogue::kStore;
}

kernels::KvLayer CudaBackend::Kv(int64_t layer) const {
  const size_t half = kv_.bytes() / 2 / config_.num_layers;
  std::byte* k = kv_.get() + 2 * layer * half;
  const KvScales scales = kv_scales_.empty() ? KvScales() : kv_scales_[layer];
  return {.k = k,
          .v = k + half,
          .type = kv_type_,
          .kv_heads = static_cast<int>(plan_.local_kv_heads),
          .block_size = static_cast<int>(limits_.block_size),
          .head_dim = static_cast<int>(config_.head_dim),
          .k_scale = scales.k,
          .v_scale = scales.v};
}

void CudaBackend::Embed(const EmbedOp& op) {
  if (!status_.ok()) return;
  const int width = static_cast<int>(config_.embedding_dim);
  const bool projected = model_.project_in.data != nullptr;
  void* embedded = projected ? buffers_.embedded.get() : buffers_.partial.get();
  // Kernels may begin early, and a chain of small ones far too early: all wait, here,
  // for what PrepareStep writes, so that no later one has to.
  Check(kernels::EmbedRows({.stream = stream_, .pdl = false},
                           {.type = type_,
                            .table = model_.embedding.data,
                            .first_vocab = static_cast<int>(plan_.first_vocab),
                            .local_vocab = static_cast<int>(plan_.local_vocab),
                            .dim = width,
                            .tokens = slots_.tokens(),
                            .tokens_stride = slots_.tokens_stride(),
                            .rows = io_.rows(),
                            .num_rows = rows_,
                            .out = embedded}),
        "looking up tokens");
  if (collectives_.size() > 1 && status_.ok()) {
    bool fused = false;
    status_ = collectives_.AllReduce(
        launch(), {.type = type_, .rows = rows_, .hidden = width, .in = embedded, .out = embedded},
        &fused);
  }
  if (projected) {
    Matmul(embedded, width, {model_.project_in, nullptr}, rows_, buffers_.partial.get(), hidden_);
  }
  Check(
      kernels::AfterEmbed(launch(), {.type = type_,
                                     .num_rows = rows_,
                                     .hidden = hidden_,
                                     .rows = io_.rows(),
                                     .x = buffers_.partial.get(),
                                     .scale = static_cast<float>(config_.embedding_scale),
                                     .position_table = model_.position.data,
                                     .position_offset = static_cast<int>(config_.position_offset),
                                     .norm = model_.Find(op.norm),
                                     .residual = buffers_.residual.get(),
                                     .normed = Normed(),
                                     .quantized = TakesQuantized(Normed(), model_.layers[0].qkv)}),
      "the embedding's norm");
}

void CudaBackend::RunQkv(const QkvOp& op) {
  const LayerWeights& w = model_.layers[op.layer];
  Matmul(Normed(), hidden_, w.qkv, part_.rows, Rows(buffers_.qkv, qkv_width_), qkv_width_,
         GemvEpilogue::kStore, &qkv_left_);
  const float2* rotary = op.rope == RopeTable::kNone ? nullptr
                         : op.rope == RopeTable::kLocal && rope_local_.get() != nullptr
                             ? rope_local_.get()
                             : rope_.get();
  fresh_ = false;
  if (part_.spans == 0 && w.qkv.bias == nullptr && w.q_norm == nullptr) {
    fresh_rotary_ = rotary;
    kernels::DecodeAttentionArgs args = DecodeArgs(op.layer);
    fresh_ = kernels::DecodeAttentionTakesFresh(args);
    if (fresh_) return;
  }
  Check(kernels::QkvFinish(launch(), {.type = type_,
                                      .num_rows = part_.rows,
                                      .rows = io_.rows(part_.first),
                                      .heads = static_cast<int>(plan_.local_heads),
                                      .qkv = Rows(buffers_.qkv, qkv_width_),
                                      .qkv_stride = qkv_width_,
                                      .scales = qkv_left_.scales,
                                      .bias = w.qkv.bias,
                                      .q_norm = w.q_norm,
                                      .k_norm = w.k_norm,
                                      .norm_eps = static_cast<float>(config_.norm_eps),
                                      .norm_plus_one = config_.norm_weight_plus_one,
                                      .rotary = rotary,
                                      .kv = Kv(op.layer)}),
        "rotary embedding");
}

// As if rotary embedding and the cache write were the kernel's.
kernels::DecodeAttentionArgs CudaBackend::DecodeArgs(int64_t layer) const {
  kernels::DecodeAttentionArgs args;
  args.type = type_;
  args.num_rows = part_.decode_rows;
  args.rows = io_.rows();
  args.kv = Kv(layer);
  args.heads = static_cast<int>(plan_.local_heads);
  args.q = buffers_.qkv.get();
  if (narrowed_) {
    args.rows.slot = io_.arrays().logit_slot;
    args.rows.position = io_.arrays().logit_position;
    args.q = buffers_.up.get();
  }
  args.q_stride = qkv_width_;
  args.out = buffers_.heads.get();
  args.out_stride = q_width_;
  args.max_context = max_context_;
  args.workspace = attention_workspace_.get();
  // What a replayed step reads of the context was written by the steps before, and
  // its slots and tables before Embed began.
  args.history_ready = capturing_;
  const size_t element = kernels::TypeBytes(type_);
  args.fresh_k = buffers_.qkv.get() + q_width_ * element;
  args.fresh_v = buffers_.qkv.get() + (q_width_ + kv_width_) * element;
  args.rotary = fresh_rotary_;
  args.scales = qkv_left_.scales;
  return args;
}

void CudaBackend::PlanAttention() {
  kernels::DecodeAttentionArgs args = DecodeArgs(0);
  deals_attention_ = kernels::DecodeAttentionDeals(args);
  if (!deals_attention_) return;
  for (const bool slides : {false, true}) {
    args.window = slides ? static_cast<int>(config_.sliding_window) : 0;
    if (slides && args.window == 0) continue;
    Check(kernels::PlanDecodeAttention({.stream = stream_, .pdl = false}, args,
                                       attention_plans_[slides].get()),
          "planning attention");
  }
}

void CudaBackend::RunAttention(const AttentionOp& op) {
  if (part_.decode_rows > 0) {
    kernels::DecodeAttentionArgs args = DecodeArgs(op.layer);
    args.scale = op.scale;
    args.window = static_cast<int>(op.window);
    if (deals_attention_) args.plan = attention_plans_[args.window > 0].get();
    if (!fresh_) {
      args.fresh_k = args.fresh_v = nullptr;
      args.rotary = nullptr;
      args.scales = {};
    }
    Launch own = launch();
    const LayerWeights& w = model_.layers[op.layer];
    if (part_.decode_rows * plan_.local_kv_heads >= kMinApartPairs &&
        TakesCluster(w.qkv, part_.rows))
      own.pdl = false;
    Check(kernels::DecodeAttention(own, args), "attention of single rows");
  }
  if (part_.spans > 0) {
    kernels::PrefillAttentionArgs args;
    args.type = type_;
    args.kv = Kv(op.layer);
    args.heads = static_cast<int>(plan_.local_heads);
    args.max_count = part_.max_count;
    args.block_table = io_.arrays().block_table;
    args.table_stride = io_.arrays().table_stride;
    args.q = buffers_.qkv.get();
    args.q_stride = qkv_width_;
    args.out = buffers_.heads.get();
    args.out_stride = q_width_;
    args.scale = op.scale;
    args.window = static_cast<int>(op.window);
    for (int first = part_.first_span, end = first + part_.spans; first < end;) {
      args.spans = io_.arrays().spans + first;
      args.num_spans = WidenedSpans(first, end, &args.scratch);
      first += args.num_spans;
      Check(kernels::PrefillAttention(launch(), args), "attention of spans");
    }
  }
}

void CudaBackend::RunAttentionOutput(int64_t layer) {
  if (folded_) return Push(buffers_.heads.get(), model_.layers[layer].o);
  MatmulPartial(Rows(buffers_.heads, q_width_), q_width_, model_.layers[layer].o);
}

void CudaBackend::ReduceResidualNorm(const ReduceOp& op) {
  if (!status_.ok() || NothingLeft()) return;
  if (halved_) return RunHalves(op);
  if (folded_) {
    pending_norm_ = model_.Find(op.next);
    reduce_pending_ = true;
    if (collectives_.size() > 1) collectives_.Count(hidden_ * kernels::TypeBytes(type_));
    return;
  }
  Reduce(launch(), op);
}

Linear CudaBackend::ReaderOf(const ReduceOp& op) const {
  if (op.source == ReduceOp::Source::kAttention) return model_.layers[op.layer].up;
  if (op.layer + 1 < config_.num_layers) return model_.layers[op.layer + 1].qkv;
  return {model_.head, nullptr};
}

const void* CudaBackend::BiasOf(const ReduceOp& op) const {
  const LayerWeights& w = model_.layers[op.layer];
  return op.source == ReduceOp::Source::kAttention ? w.o.bias : w.down.bias;
}

void CudaBackend::Reduce(const Launch& launch, const ReduceOp& op) {
  const kernels::NormSpec post = model_.Find(op.post), next = model_.Find(op.next);
  std::byte* const partial = Rows(buffers_.partial, hidden_);
  std::byte* const residual = Rows(buffers_.residual, hidden_);
  std::byte* const normed = Normed();
  if (collectives_.size() > 1) {
    kernels::AllReduceArgs args = {
        .type = type_, .rows = part_.rows, .hidden = hidden_, .in = partial, .out = partial};
    args.pushed = push_.size > 0;
    const bool fusable = post.kind == kernels::NormKind::kNone &&
                         next.kind == kernels::NormKind::kRms && next.weight != nullptr &&
                         !op.norm_is_residual;
    if (fusable) {
      args.out = normed;
      args.bias = BiasOf(op);
      args.residual = args.residual_out = residual;
      args.norm_weight = next.weight;
      args.eps = next.eps;
      args.plus_one = next.plus_one;
    }
    if (fusable && deals_residual_) {
      const kernels::QuantizedRows quantized = TakesQuantized(normed, ReaderOf(op));
      status_ =
          collectives_.ReduceRows(launch, {.type = type_,
                                           .rows = part_.rows,
                                           .hidden = hidden_,
                                           .in = partial,
                                           .bias = args.bias,
                                           .residual = residual,
                                           .norm_weight = next.weight,
                                           .eps = next.eps,
                                           .plus_one = next.plus_one,
                                           .normed = quantized.values == nullptr ? normed : nullptr,
                                           .quantized = quantized,
                                           .slots = io_.arrays().slot + part_.first});
      return;
    }
    bool fused = false;
    status_ = halved_ ? collectives_.AllReduceAside(launch, args)
                      : collectives_.AllReduce(launch, args, &fused);
    if (!status_.ok()) return;
    if (fused && fusable) return;  // else it is only the sum
  }
  // There is one buffer of quantised rows, the products' on their own stream.
  AddAndNorm(launch, op, normed,
             halved_ ? kernels::QuantizedRows() : TakesQuantized(normed, ReaderOf(op)));
}

void CudaBackend::AddAndNorm(const Launch& launch, const ReduceOp& op, std::byte* normed,
                             const kernels::QuantizedRows& quantized) {
  std::byte* const residual = Rows(buffers_.residual, hidden_);
  Check(kernels::ReduceTail(launch, {.type = type_,
                                     .num_rows = part_.rows,
                                     .hidden = hidden_,
                                     .slot = io_.arrays().slot + part_.first,
                                     .x = Rows(buffers_.partial, hidden_),
                                     .x_parts = partial_left_.parts,
                                     .x_scales = partial_left_.scales,
                                     .bias = BiasOf(op),
                                     .post = model_.Find(op.post),
                                     .residual_in = residual,
                                     .residual_out = residual,
                                     .next = model_.Find(op.next),
                                     .norm_is_residual = op.norm_is_residual,
                                     .normed = normed,
                                     .quantized = quantized}),
        "residual and norm");
}

void CudaBackend::RunGateUp(int64_t layer) {
  const Linear& up = model_.layers[layer].up;
  const bool gated = config_.gated_mlp;
  const std::byte* const normed = Normed();
  std::byte* const activated = Rows(buffers_.activated, intermediate_);
  const GemvEpilogue epilogue = GateEpilogue(config_);
  // Else e4m3 is left to the activation's own kernel, which quantises what it makes.
  if (epilogue != GemvEpilogue::kStore && TakesCluster(up, part_.rows) &&
      (!Quantized(up) || QuantizesAsStaged(up, part_.rows)))
    return Matmul(normed, hidden_, up, part_.rows, activated, intermediate_, epilogue);
  if (epilogue != GemvEpilogue::kStore &&
      Gemv(normed, hidden_, up, part_.rows, activated, intermediate_, epilogue)) {
    return;
  }
  std::byte* const out = Rows(buffers_.up, up_width_);
  LeftToReader left;
  Matmul(normed, hidden_, up, part_.rows, out, up_width_, GemvEpilogue::kStore,
         LeavesGateUpUnscaled(part_.rows, up_width_) ? &left : nullptr);
  Check(kernels::Activate(
            launch(),
            {.type = type_,
             .activation = ToKernel(config_.activation),
             .layout = gated ? kernels::GateLayout::kInterleaved : kernels::GateLayout::kNone,
             .num_rows = part_.rows,
             .width = intermediate_,
             .slot = nullptr,
             .in = out,
             .in_stride = up_width_,
             .in_scales = left.scales,
             .bias = up.bias,
             .out = activated,
             .out_stride = intermediate_,
             .quantized = intermediate_ % 16 == 0 && intermediate_ <= 32'768
                              ? TakesQuantized(activated, model_.layers[layer].down)
                              : kernels::QuantizedRows()}),
        "activation");
}

void CudaBackend::RunDown(int64_t layer) {
  if (folded_) return Push(buffers_.activated.get(), model_.layers[layer].down);
  MatmulPartial(Rows(buffers_.activated, intermediate_), intermediate_, model_.layers[layer].down);
}

void CudaBackend::Logits(absl::Span<const LogitRow> rows) {
  if (halved_) JoinHalves();
  if (!status_.ok()) return;
  if (stacked_) {
    Check(kernels::RowStack(launch(), StackArgs()), "the layers of a row");
    return;
  }
  const int count = capturing_ ? rows_ : static_cast<int>(rows.size());
  const void* hidden = Normed();
  if (!capturing_ && !narrowed_) {
    Check(kernels::GatherRows(launch(), {.type = type_,
                                         .in = hidden,
                                         .index = io_.arrays().logit_row + sampled_rows_,
                                         .num_rows = count,
                                         .width = hidden_,
                                         .out = buffers_.chosen.get()}),
          "gathering rows");
    hidden = buffers_.chosen.get();
  }
  int width = hidden_;
  if (model_.project_out.data != nullptr) {
    width = static_cast<int>(config_.embedding_dim);
    Matmul(hidden, hidden_, {model_.project_out, nullptr}, count, buffers_.projected.get(), width);
    hidden = buffers_.projected.get();
  }
  Matmul(hidden, width, {model_.head, nullptr}, count, sampling_.logits(),
         sampling_.logits_stride(), GemvEpilogue::kLogits);
}

void CudaBackend::Sample(absl::Span<const LogitRow> rows) {
  if (!status_.ok()) return;
  const int count = capturing_ ? rows_ : static_cast<int>(rows.size());
  kernels::SampleArgs args;
  slots_.Describe(&args);
  const kernels::StepArrays& arrays = io_.arrays();
  args.needs = needs_;
  args.rows = count;
  args.begin_ns = io_.io().sampling_begin_ns;
  args.collectives = io_.io().collectives;
  args.slot = arrays.logit_slot + sampled_rows_;
  args.position = arrays.logit_position + sampled_rows_;
  args.scores = capturing_ ? nullptr : arrays.logit_scores + sampled_rows_;
  status_ = sampling_.Run(launch(), args, sampled_rows_, &collectives_);
  sampled_rows_ += count;
}

}  // namespace lockstep::cuda
