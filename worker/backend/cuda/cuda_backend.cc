#include "worker/backend/cuda/cuda_backend.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "kernels/activation.h"
#include "kernels/attention_decode.h"
#include "kernels/attention_prefill.h"
#include "kernels/embed.h"
#include "kernels/gemv.h"
#include "kernels/norm.h"
#include "kernels/qkv_finish.h"
#include "kernels/quantize.h"
#include "kernels/sample.h"
#include "worker/backend/cpu/rotary.h"
#include "worker/backend/cuda/activations.h"
#include "worker/backend/cuda/collectives.h"
#include "worker/backend/cuda/lt_matmul.h"
#include "worker/backend/cuda/model_weights.h"
#include "worker/backend/cuda/sampling.h"
#include "worker/backend/cuda/slots.h"
#include "worker/backend/cuda/step_graphs.h"
#include "worker/backend/cuda/step_io.h"
#include "worker/comm/cuda/device_communicator.h"

namespace lockstep::cuda {
namespace {

using kernels::GemvArgs;
using kernels::GemvEpilogue;
using kernels::Launch;
using kernels::Type;

// A product of so few rows streams its weights; see kernels/gemv.h.
constexpr int kMaxSkinnyRows = 16;
// Several rows of more than this leave the skinny kernel's ring too short, and
// cuBLASLt streams faster (K 14,336 at 16 rows: 3.4 against 2.0 TB/s).
constexpr int64_t kMaxSkinnyK = 8'192;
// A longer pause between two steps is a server without work.
constexpr uint64_t kIdleWithoutWorkNs = 20'000'000;

class CudaBackend final : public Backend {
 public:
  CudaBackend(const ModelConfig& config, const ShardPlan& plan,
              std::unique_ptr<DeviceWeights> weights, ModelWeights model,
              const CudaBackendOptions& options);
  ~CudaBackend() override;
  absl::Status Init();
  absl::Status PrepareExchange();

  absl::Status Attach(Communicator* comm) override;
  void Admit(const NewSequence& sequence) override {
    if (status_.ok()) status_ = slots_.Admit(stream_, sequence, &io_);
  }
  void Grow(Slot slot, absl::Span<const BlockId> blocks) override {
    if (status_.ok()) status_ = slots_.Grow(stream_, slot, blocks, &io_);
  }
  void Release(Slot slot) override { slots_.Release(slot); }

  bool Begin(absl::Span<const BatchSpan> spans, absl::Span<const LogitRow> rows) override;
  void Embed(const EmbedOp& op) override;
  void Qkv(const QkvOp& op) override;
  void Attention(const AttentionOp& op) override;
  void AttentionOutput(int64_t layer) override;
  void ReduceResidualNorm(const ReduceOp& op) override;
  void GateUp(int64_t layer) override;
  void Down(int64_t layer) override;
  void Logits(absl::Span<const LogitRow> rows) override;
  void Sample(absl::Span<const LogitRow> rows) override;
  absl::Status Submit() override;
  bool Done() override;
  absl::StatusOr<StepOutput> Collect() override;
  bool Drain() override;

  int64_t max_logit_rows() const override { return max_logit_rows_; }
  int64_t weight_bytes() const override { return weights_->allocated_bytes(); }
  int64_t kv_bytes() const override { return static_cast<int64_t>(kv_.bytes()); }
  std::string description() const override { return description_; }

 private:
  // A step from Submit to Collect.
  struct InFlight {
    uint64_t number = 0;
    std::vector<LogitRow> rows;
    std::vector<Slot> slots;          // of rows
    std::vector<uint32_t> positions;  // of rows
    CollectiveStats collectives;
  };

  // Whether a step of one row may fold its all-reduces into the products around
  // them: then every matrix of the layers goes by Gemv.
  bool CanFold() const;
  void Push(const void* x, const Linear& linear);
  bool IsDecode(absl::Span<const BatchSpan> spans, absl::Span<const LogitRow> rows) const;
  void Check(cudaError_t error, const char* what) {
    if (status_.ok() && error != cudaSuccess) status_ = ToStatus(error, what);
  }
  // out = epilogue(x . weights), by the kernels for few rows; false, and nothing
  // done, where they do not take it.
  bool Gemv(const void* x, int64_t x_stride, const Linear& linear, int m, void* out,
            int64_t out_stride, GemvEpilogue epilogue);
  // What a product of one row does to its input, when the sum before it is still
  // on its way (see folded_).
  void TakeReduce(GemvArgs* args);
  // out = x . weights in the serving dtype, or the logits in fp32, by what is best.
  void Matmul(const void* x, int64_t x_stride, const Linear& linear, int m, void* out,
              int64_t out_stride, GemvEpilogue epilogue = GemvEpilogue::kStore);
  bool Quantized(const Linear& linear) const { return linear.weight.type == Type::kE4M3; }
  // For a kernel that may write what it makes as e4m3 too: where, if the products
  // of this step take it so.
  kernels::QuantizedRows TakesQuantized(const void* made) {
    if (rows_ <= kMaxSkinnyRows || !Quantized(model_.layers[0].qkv)) return {};
    quantized_from_ = made;
    return {.values = buffers_.quantized.get(), .scales = buffers_.quantized_scales.get()};
  }
  Launch launch() const { return {.stream = stream_, .pdl = true}; }
  kernels::KvLayer Kv(int64_t layer) const;
  kernels::DecodeAttentionArgs DecodeArgs(int64_t layer) const;

  const ModelConfig config_;
  const ShardPlan plan_;
  const BackendLimits limits_;
  const Type type_;
  const bool use_graphs_;
  const int hidden_, q_width_, kv_width_, qkv_width_, up_width_, intermediate_;
  const std::unique_ptr<DeviceWeights> weights_;
  const ModelWeights model_;
  const int64_t max_logit_rows_;
  std::string description_;
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<LtMatmul> lt_;
  Buffer<std::byte> own_exchange_;  // with one rank, what is pushed stays here
  kernels::GemvExchange exchange_region_;
  bool can_fold_ = false;
  Collectives collectives_;
  Slots slots_;
  StepIo io_;
  Activations buffers_;
  Sampling sampling_;
  StepGraphs graphs_;
  Buffer<std::byte> kv_;
  Buffer<float2> rope_, rope_local_;
  Buffer<std::byte> attention_workspace_;

  // Of the step.
  absl::Status status_;
  std::vector<BatchSpan> spans_;
  std::vector<LogitRow> logit_rows_;
  int rows_ = 0;         // of every product, padding included
  int decode_rows_ = 0;  // the first rows, one of each span
  int prefill_spans_ = 0;
  int max_count_ = 0;     // of a prefill span
  int max_context_ = 0;   // of a decoded row
  int sampled_rows_ = 0;  // logit rows enqueued so far
  bool capturing_ = false;
  const void* quantized_from_ = nullptr;  // what buffers_.quantized is the e4m3 of
  // One decoded row: a row-parallel product pushes its sums to every rank, and the
  // product after it polls for them, adds the residual and norms them as it waits
  // for its weights. No kernel and no launch of its own is left of the all-reduce.
  bool folded_ = false;
  bool reduce_pending_ = false;
  kernels::NormSpec pending_norm_;
  uint32_t exchange_ = 0;
  void* residual_ = nullptr;              // the current one of two, while folded
  const float2* fresh_rotary_ = nullptr;  // what attention is left to do of Qkv
  bool fresh_ = false;
  const StepGraphs::Graph* replay_ = nullptr;
  StepGraphs::Key key_;
  kernels::SampleNeeds needs_;
  std::deque<InFlight> in_flight_;
  uint64_t last_end_ns_ = 0;  // of the step collected last, on the device's clock
};

// The gate's activation in the product's own epilogue; kStore: it has none.
GemvEpilogue GateEpilogue(const ModelConfig& config) {
  if (!config.gated_mlp || config.mlp_bias) return GemvEpilogue::kStore;
  if (config.activation == Activation::kSilu) return GemvEpilogue::kSiluGate;
  if (config.activation == Activation::kGeluTanh) return GemvEpilogue::kGeluGate;
  return GemvEpilogue::kStore;
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

// One row a position: cosine and sine of each frequency, the angle rounded to a
// float first, as the models' own code does.
absl::Status MakeRotary(const RopeConfig& rope, int64_t head_dim, int64_t positions,
                        Buffer<float2>* table) {
  const std::vector<float> frequencies = cpu::RotaryFrequencies(rope, head_dim);
  std::vector<float2> values;
  values.reserve(positions * frequencies.size());
  for (int64_t p = 0; p < positions; ++p) {
    for (const float frequency : frequencies) {
      const double angle = static_cast<float>(p) * frequency;
      values.push_back({static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))});
    }
  }
  if (absl::Status s = table->Allocate(values.size(), "rotary table"); !s.ok()) return s;
  return ToStatus(cudaMemcpy(table->get(), values.data(), table->bytes(), cudaMemcpyHostToDevice),
                  "uploading the rotary table");
}

CudaBackend::CudaBackend(const ModelConfig& config, const ShardPlan& plan,
                         std::unique_ptr<DeviceWeights> weights, ModelWeights model,
                         const CudaBackendOptions& options)
    : config_(config),
      plan_(plan),
      limits_(options.limits),
      type_(ToType(options.dtype)),
      use_graphs_(options.graphs),
      hidden_(static_cast<int>(config.hidden_size)),
      q_width_(static_cast<int>(plan.local_heads * config.head_dim)),
      kv_width_(static_cast<int>(plan.local_kv_heads * config.head_dim)),
      qkv_width_(q_width_ + 2 * kv_width_),
      up_width_(static_cast<int>(plan.local_intermediate * (config.gated_mlp ? 2 : 1))),
      intermediate_(static_cast<int>(plan.local_intermediate)),
      weights_(std::move(weights)),
      model_(std::move(model)),
      max_logit_rows_(std::min<int64_t>(kMaxLogitRows, options.limits.max_num_seqs)) {}

CudaBackend::~CudaBackend() {
  if (stream_ == nullptr) return;
  (void)cudaStreamSynchronize(stream_);
  graphs_.Clear();
  (void)cudaStreamDestroy(stream_);
}

absl::Status CudaBackend::Init() {
  absl::StatusOr<std::unique_ptr<LtMatmul>> lt = LtMatmul::Create();
  if (!lt.ok()) return lt.status();
  lt_ = *std::move(lt);
  absl::Status status =
      ToStatus(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream");
  if (status.ok()) status = io_.Allocate(limits_, max_logit_rows_);
  if (status.ok()) status = slots_.Allocate(limits_, config_, plan_);
  if (status.ok()) {
    status = buffers_.Allocate(config_, plan_, type_, limits_, max_logit_rows_,
                               Quantized(model_.layers[0].qkv));
  }
  if (status.ok())
    status = sampling_.Allocate(config_, plan_, max_logit_rows_, io_.io().capacity.logit_rows);
  const size_t kv = 2 * static_cast<size_t>(config_.num_layers) * limits_.num_kv_blocks *
                    limits_.block_size * kv_width_ * kernels::TypeBytes(type_);
  if (status.ok()) status = kv_.AllocateZeroed(kv, "the KV cache");
  if (status.ok()) {
    status = attention_workspace_.AllocateZeroed(
        kernels::DecodeAttentionWorkspaceBytes(
            static_cast<int>(plan_.local_heads), static_cast<int>(plan_.local_kv_heads),
            static_cast<int>(config_.head_dim), static_cast<int>(limits_.max_num_seqs),
            static_cast<int>(limits_.max_model_len)),
        "attention");
  }
  if (config_.position == PositionKind::kRope) {
    if (status.ok())
      status = MakeRotary(config_.rope, config_.head_dim, limits_.max_model_len, &rope_);
    if (status.ok() && !(config_.rope_local == config_.rope)) {
      status =
          MakeRotary(config_.rope_local, config_.head_dim, limits_.max_model_len, &rope_local_);
    }
  }
  if (!status.ok()) return status;
  int device = 0;
  cudaDeviceProp properties = {};
  (void)cudaGetDevice(&device);
  status = ToStatus(cudaGetDeviceProperties(&properties, device), "asking for the GPU's name");
  description_ = absl::StrCat("cuda, ", properties.name, ", ", lt_->version());
  return status;
}

absl::Status CudaBackend::Attach(Communicator* comm) {
  in_flight_.clear();
  last_end_ns_ = 0;
  graphs_.Clear();  // they hold the last epoch's peers
  status_ = collectives_.Attach(comm, hidden_, io_.io().collectives);
  if (status_.ok()) status_ = PrepareExchange();
  graphs_.SetLimits(static_cast<int>(max_logit_rows_), static_cast<int>(limits_.max_model_len));
  if (status_.ok()) status_ = io_.Reset(stream_);
  if (status_.ok()) status_ = slots_.Reset(stream_);
  if (status_.ok()) status_ = sampling_.Reset(stream_);
  if (status_.ok()) status_ = ToStatus(cudaStreamSynchronize(stream_), "an epoch's buffers");
  return status_;
}

absl::Status CudaBackend::PrepareExchange() {
  can_fold_ = false;
  if (collectives_.size() == 1) {
    absl::Status status =
        own_exchange_.Allocate(kernels::GemvExchangeBytes(1, hidden_), "a step's sums");
    if (!status.ok()) return status;
    exchange_region_ = {};
    exchange_region_.peers.base[0] = own_exchange_.get();
    exchange_region_.width = hidden_;
    status = ToStatus(kernels::ClearGemvExchange(exchange_region_, stream_), "a step's sums");
    if (!status.ok()) return status;
  } else if (collectives_.gemv_exchange() != nullptr) {
    exchange_region_ = *collectives_.gemv_exchange();
  } else {
    return absl::OkStatus();
  }
  can_fold_ = CanFold();
  return absl::OkStatus();
}

bool CudaBackend::CanFold() const {
  // The slots of the exchange go round by four; a step uses two a layer.
  if (type_ == Type::kF32 || config_.num_layers % 2 != 0 || !config_.norm_before ||
      config_.sandwich_norms || config_.norm != NormKind::kRms || !config_.norm_affine ||
      !config_.final_norm || hidden_ > DeviceCommunicator::kMaxGemvWidth || config_.mlp_bias ||
      config_.attention_output_bias || model_.project_out.data != nullptr) {
    return false;
  }
  GemvArgs args;
  args.type = type_;
  args.exchange = &exchange_region_;
  const auto takes = [&](const Linear& linear, kernels::GemvPrologue prologue,
                         GemvEpilogue epilogue) {
    args.weights = linear.weight.data;
    args.weight_type = linear.weight.type;
    args.scales = linear.weight.scales;
    args.n = static_cast<int>(linear.weight.rows);
    args.k = static_cast<int>(linear.weight.cols);
    args.prologue = prologue;
    args.epilogue = epilogue;
    args.x = buffers_.heads.get();
    args.out = buffers_.qkv.get();
    args.norm_weight = model_.final_norm.weight;
    args.residual_in = buffers_.residual.get();
    args.residual_out = buffers_.partial.get();
    return kernels::GemvSupports(args);
  };
  using kernels::GemvPrologue;
  const LayerWeights& w = model_.layers[0];
  return config_.gated_mlp && GateEpilogue(config_) != GemvEpilogue::kStore &&
         takes(w.qkv, GemvPrologue::kReduce, GemvEpilogue::kStore) &&
         takes(w.o, GemvPrologue::kPlain, GemvEpilogue::kPush) &&
         takes(w.up, GemvPrologue::kReduce, GateEpilogue(config_)) &&
         takes(w.down, GemvPrologue::kPlain, GemvEpilogue::kPush) &&
         takes({model_.head, nullptr}, GemvPrologue::kReduce, GemvEpilogue::kLogits);
}

void CudaBackend::TakeReduce(GemvArgs* args) {
  if (!reduce_pending_) return;
  void* other =
      residual_ == buffers_.residual.get() ? buffers_.partial.get() : buffers_.residual.get();
  args->prologue = kernels::GemvPrologue::kReduce;
  args->x = nullptr;
  args->norm_weight = pending_norm_.weight;
  args->norm_eps = pending_norm_.eps;
  args->norm_plus_one = pending_norm_.plus_one;
  args->residual_in = residual_;
  args->residual_out = other;
  args->exchange = &exchange_region_;
  args->exchange_number = exchange_++;
  residual_ = other;
  reduce_pending_ = false;
}

void CudaBackend::Push(const void* x, const Linear& linear) {
  const DeviceTensor& w = linear.weight;
  Check(kernels::Gemv(launch(), {.weights = w.data,
                                 .weight_type = w.type,
                                 .scales = w.scales,
                                 .n = static_cast<int>(w.rows),
                                 .k = static_cast<int>(w.cols),
                                 .type = type_,
                                 .m = 1,
                                 .x = x,
                                 .epilogue = GemvEpilogue::kPush,
                                 .exchange = &exchange_region_,
                                 .exchange_number = exchange_}),
        "a product that is pushed");
}

kernels::KvLayer CudaBackend::Kv(int64_t layer) const {
  const size_t half = kv_.bytes() / 2 / config_.num_layers;
  std::byte* k = kv_.get() + 2 * layer * half;
  return {.k = k,
          .v = k + half,
          .type = type_,
          .kv_heads = static_cast<int>(plan_.local_kv_heads),
          .block_size = static_cast<int>(limits_.block_size),
          .head_dim = static_cast<int>(config_.head_dim)};
}

bool CudaBackend::IsDecode(absl::Span<const BatchSpan> spans,
                           absl::Span<const LogitRow> rows) const {
  if (spans.size() != rows.size() || spans.size() > static_cast<size_t>(max_logit_rows_)) {
    return false;
  }
  for (size_t i = 0; i < spans.size(); ++i) {
    if (spans[i].count != 1 || rows[i].row != i || !rows[i].samples) return false;
  }
  return true;
}

bool CudaBackend::Begin(absl::Span<const BatchSpan> spans, absl::Span<const LogitRow> rows) {
  if (!status_.ok()) return true;
  collectives_.ResetStats();
  spans_.assign(spans.begin(), spans.end());
  logit_rows_.assign(rows.begin(), rows.end());
  rows_ = decode_rows_ = prefill_spans_ = max_count_ = max_context_ = sampled_rows_ = 0;
  for (const BatchSpan& span : spans) {
    rows_ += static_cast<int>(span.count);
    if (prefill_spans_ == 0 && span.count == 1) {
      ++decode_rows_;
      max_context_ = std::max(max_context_, static_cast<int>(span.begin + 1));
    } else {
      ++prefill_spans_;
      max_count_ = std::max(max_count_, static_cast<int>(span.count));
    }
  }
  LOCKSTEP_CHECK(rows_ <= static_cast<int>(limits_.max_batched_tokens));
  needs_ = {};
  for (const LogitRow& row : rows) {
    const Slots::State& slot = slots_.At(spans[row.span].slot);
    needs_ = needs_ | (row.samples ? slot.needs : kernels::NeedsOf(slot.params, true));
  }
  io_.Write(spans, rows);

  replay_ = nullptr;
  capturing_ = folded_ = false;
  quantized_from_ = nullptr;
  if (use_graphs_ && rows_ > 0 && IsDecode(spans, rows)) {
    key_ = graphs_.KeyFor(rows_, max_context_, needs_);
    rows_ = decode_rows_ = key_.rows;
    max_context_ = key_.max_context;
    needs_ = key_.needs;
    replay_ = graphs_.Find(key_);
    if (replay_ != nullptr) return true;
    capturing_ = true;
    folded_ = can_fold_ && rows_ == 1;
    reduce_pending_ = false;
    exchange_ = 0;
    residual_ = buffers_.residual.get();
    Check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capturing a step");
  }
  const int logit_rows = capturing_ ? rows_ : static_cast<int>(rows.size());
  Check(kernels::PrepareStep({.stream = stream_, .pdl = false}, io_.io(), io_.arrays(), rows_,
                             logit_rows),
        "preparing a step");
  return false;
}

bool CudaBackend::Gemv(const void* x, int64_t x_stride, const Linear& linear, int m, void* out,
                       int64_t out_stride, GemvEpilogue epilogue) {
  const DeviceTensor& w = linear.weight;
  GemvArgs args = {.weights = w.data,
                   .weight_type = w.type,
                   .scales = w.scales,
                   .n = static_cast<int>(w.rows),
                   .k = static_cast<int>(w.cols),
                   .type = type_,
                   .m = m,
                   .x = x,
                   .x_stride = x_stride,
                   .epilogue = epilogue,
                   .out = out,
                   .out_stride = out_stride};
  TakeReduce(&args);
  if (m > kMaxSkinnyRows || (m > 1 && w.cols > kMaxSkinnyK)) return false;
  if (!kernels::GemvSupports(args)) return false;
  Check(kernels::Gemv(launch(), args), "a product of few rows");
  return true;
}

void CudaBackend::Matmul(const void* x, int64_t x_stride, const Linear& linear, int m, void* out,
                         int64_t out_stride, GemvEpilogue epilogue) {
  if (Gemv(x, x_stride, linear, m, out, out_stride, epilogue)) return;
  const DeviceTensor& w = linear.weight;
  MatmulArgs args = {.m = m,
                     .n = static_cast<int>(w.rows),
                     .k = static_cast<int>(w.cols),
                     .type = w.type,
                     .out_type = epilogue == GemvEpilogue::kLogits ? Type::kF32 : type_,
                     .x = x,
                     .x_stride = x_stride,
                     .weights = w.data,
                     .out = out,
                     .out_stride = out_stride,
                     .x_scales = nullptr,
                     .weight_scales = w.scales};
  if (Quantized(linear)) {
    if (x != quantized_from_) {
      Check(kernels::QuantizeRows(launch(), {.type = type_,
                                             .num_rows = m,
                                             .width = args.k,
                                             .slot = nullptr,
                                             .in = x,
                                             .in_stride = x_stride,
                                             .out = buffers_.quantized.get(),
                                             .out_stride = args.k,
                                             .scales = buffers_.quantized_scales.get()}),
            "quantising activations");
    }
    quantized_from_ = nullptr;  // one copy, for one product
    args.x = buffers_.quantized.get();
    args.x_stride = args.k;
    args.x_scales = buffers_.quantized_scales.get();
  }
  if (status_.ok()) status_ = lt_->Run(stream_, args);
}

void CudaBackend::Embed(const EmbedOp& op) {
  if (!status_.ok()) return;
  const int width = static_cast<int>(config_.embedding_dim);
  const bool projected = model_.project_in.data != nullptr;
  void* embedded = projected ? buffers_.embedded.get() : buffers_.partial.get();
  Check(kernels::EmbedRows(launch(), {.type = type_,
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
  Check(kernels::AfterEmbed(launch(), {.type = type_,
                                       .num_rows = rows_,
                                       .hidden = hidden_,
                                       .rows = io_.rows(),
                                       .x = buffers_.partial.get(),
                                       .scale = static_cast<float>(config_.embedding_scale),
                                       .position_table = model_.position.data,
                                       .position_offset = static_cast<int>(config_.position_offset),
                                       .norm = model_.Find(op.norm),
                                       .residual = buffers_.residual.get(),
                                       .normed = buffers_.normed.get(),
                                       .quantized = TakesQuantized(buffers_.normed.get())}),
        "the embedding's norm");
}

void CudaBackend::Qkv(const QkvOp& op) {
  if (!status_.ok()) return;
  const LayerWeights& w = model_.layers[op.layer];
  Matmul(buffers_.normed.get(), hidden_, w.qkv, rows_, buffers_.qkv.get(), qkv_width_);
  const float2* rotary = op.rope == RopeTable::kNone ? nullptr
                         : op.rope == RopeTable::kLocal && rope_local_.get() != nullptr
                             ? rope_local_.get()
                             : rope_.get();
  fresh_ = false;
  if (prefill_spans_ == 0 && w.qkv.bias == nullptr && w.q_norm == nullptr) {
    fresh_rotary_ = rotary;
    kernels::DecodeAttentionArgs args = DecodeArgs(op.layer);
    fresh_ = kernels::DecodeAttentionTakesFresh(args);
    if (fresh_) return;
  }
  Check(kernels::QkvFinish(launch(), {.type = type_,
                                      .num_rows = rows_,
                                      .rows = io_.rows(),
                                      .heads = static_cast<int>(plan_.local_heads),
                                      .qkv = buffers_.qkv.get(),
                                      .qkv_stride = qkv_width_,
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
  args.num_rows = decode_rows_;
  args.rows = io_.rows();
  args.kv = Kv(layer);
  args.heads = static_cast<int>(plan_.local_heads);
  args.q = buffers_.qkv.get();
  args.q_stride = qkv_width_;
  args.out = buffers_.heads.get();
  args.out_stride = q_width_;
  args.max_context = max_context_;
  args.workspace = attention_workspace_.get();
  // What a replayed step reads of the context was written by the steps before; its
  // slots and tables, half a layer and more ago.
  args.history_ready = capturing_ && layer > 0;
  const size_t element = kernels::TypeBytes(type_);
  args.fresh_k = buffers_.qkv.get() + q_width_ * element;
  args.fresh_v = buffers_.qkv.get() + (q_width_ + kv_width_) * element;
  args.rotary = fresh_rotary_;
  return args;
}

void CudaBackend::Attention(const AttentionOp& op) {
  if (!status_.ok()) return;
  if (decode_rows_ > 0) {
    kernels::DecodeAttentionArgs args = DecodeArgs(op.layer);
    args.scale = op.scale;
    args.window = static_cast<int>(op.window);
    if (!fresh_) args.fresh_k = args.fresh_v = nullptr;
    if (!fresh_) args.rotary = nullptr;
    Check(kernels::DecodeAttention(launch(), args), "attention of single rows");
  }
  if (prefill_spans_ > 0) {
    kernels::PrefillAttentionArgs args;
    args.type = type_;
    args.kv = Kv(op.layer);
    args.heads = static_cast<int>(plan_.local_heads);
    args.spans = io_.arrays().spans;
    args.num_spans = prefill_spans_;
    args.max_count = max_count_;
    args.block_table = io_.arrays().block_table;
    args.table_stride = io_.arrays().table_stride;
    args.q = buffers_.qkv.get();
    args.q_stride = qkv_width_;
    args.out = buffers_.heads.get();
    args.out_stride = q_width_;
    args.scale = op.scale;
    args.window = static_cast<int>(op.window);
    Check(kernels::PrefillAttention(launch(), args), "attention of spans");
  }
}

void CudaBackend::AttentionOutput(int64_t layer) {
  if (!status_.ok()) return;
  if (folded_) return Push(buffers_.heads.get(), model_.layers[layer].o);
  Matmul(buffers_.heads.get(), q_width_, model_.layers[layer].o, rows_, buffers_.partial.get(),
         hidden_);
}

void CudaBackend::ReduceResidualNorm(const ReduceOp& op) {
  if (!status_.ok()) return;
  const LayerWeights& w = model_.layers[op.layer];
  const void* bias = op.source == ReduceOp::Source::kAttention ? w.o.bias : w.down.bias;
  const kernels::NormSpec post = model_.Find(op.post), next = model_.Find(op.next);
  if (folded_) {
    pending_norm_ = next;
    reduce_pending_ = true;
    if (collectives_.size() > 1) collectives_.Count(hidden_ * kernels::TypeBytes(type_));
    return;
  }
  bool summed = collectives_.size() == 1;
  if (!summed) {
    kernels::AllReduceArgs args = {.type = type_,
                                   .rows = rows_,
                                   .hidden = hidden_,
                                   .in = buffers_.partial.get(),
                                   .out = buffers_.partial.get()};
    const bool fusable = post.kind == kernels::NormKind::kNone &&
                         next.kind == kernels::NormKind::kRms && next.weight != nullptr &&
                         !op.norm_is_residual;
    if (fusable) {
      args.out = buffers_.normed.get();
      args.bias = bias;
      args.residual = args.residual_out = buffers_.residual.get();
      args.norm_weight = next.weight;
      args.eps = next.eps;
      args.plus_one = next.plus_one;
    }
    bool fused = false;
    status_ = collectives_.AllReduce(launch(), args, &fused);
    if (fused || !status_.ok()) return;
  }
  Check(kernels::ReduceTail(launch(), {.type = type_,
                                       .num_rows = rows_,
                                       .hidden = hidden_,
                                       .slot = io_.arrays().slot,
                                       .x = buffers_.partial.get(),
                                       .bias = bias,
                                       .post = post,
                                       .residual_in = buffers_.residual.get(),
                                       .residual_out = buffers_.residual.get(),
                                       .next = next,
                                       .norm_is_residual = op.norm_is_residual,
                                       .normed = buffers_.normed.get(),
                                       .quantized = TakesQuantized(buffers_.normed.get())}),
        "residual and norm");
}

void CudaBackend::GateUp(int64_t layer) {
  if (!status_.ok()) return;
  const Linear& up = model_.layers[layer].up;
  const bool gated = config_.gated_mlp;
  const GemvEpilogue epilogue = GateEpilogue(config_);
  if (epilogue != GemvEpilogue::kStore && Gemv(buffers_.normed.get(), hidden_, up, rows_,
                                               buffers_.activated.get(), intermediate_, epilogue)) {
    return;
  }
  Matmul(buffers_.normed.get(), hidden_, up, rows_, buffers_.up.get(), up_width_);
  Check(kernels::Activate(launch(), {.type = type_,
                                     .activation = ToKernel(config_.activation),
                                     .layout = gated ? kernels::GateLayout::kInterleaved
                                                     : kernels::GateLayout::kNone,
                                     .num_rows = rows_,
                                     .width = intermediate_,
                                     .slot = nullptr,
                                     .in = buffers_.up.get(),
                                     .in_stride = up_width_,
                                     .bias = up.bias,
                                     .out = buffers_.activated.get(),
                                     .out_stride = intermediate_,
                                     .quantized = intermediate_ % 16 == 0 && intermediate_ <= 32'768
                                                      ? TakesQuantized(buffers_.activated.get())
                                                      : kernels::QuantizedRows()}),
        "activation");
}

void CudaBackend::Down(int64_t layer) {
  if (!status_.ok()) return;
  if (folded_) return Push(buffers_.activated.get(), model_.layers[layer].down);
  Matmul(buffers_.activated.get(), intermediate_, model_.layers[layer].down, rows_,
         buffers_.partial.get(), hidden_);
}

void CudaBackend::Logits(absl::Span<const LogitRow> rows) {
  if (!status_.ok()) return;
  const int count = capturing_ ? rows_ : static_cast<int>(rows.size());
  const void* hidden = buffers_.normed.get();
  if (!capturing_) {
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
  args.slot = arrays.logit_slot + sampled_rows_;
  args.position = arrays.logit_position + sampled_rows_;
  args.scores = capturing_ ? nullptr : arrays.logit_scores + sampled_rows_;
  status_ = sampling_.Run(launch(), args, sampled_rows_, &collectives_);
  sampled_rows_ += count;
}

absl::Status CudaBackend::Submit() {
  if (!status_.ok()) {
    if (capturing_) {
      cudaGraph_t graph = nullptr;
      (void)cudaStreamEndCapture(stream_, &graph);
      if (graph != nullptr) (void)cudaGraphDestroy(graph);
    }
    return status_;
  }
  if (replay_ == nullptr) {
    Check(kernels::PublishStep(launch(), io_.io(), sampled_rows_, sampling_.results(),
                               needs_.score ? sampling_.logprobs() : nullptr),
          "publishing a step");
    if (capturing_ && status_.ok()) {
      absl::StatusOr<const StepGraphs::Graph*> graph =
          graphs_.EndCapture(stream_, key_, collectives_.stats());
      if (!graph.ok()) return status_ = graph.status();
      replay_ = *graph;
    }
  }
  if (replay_ != nullptr) Check(cudaGraphLaunch(replay_->exec, stream_), "launching a step");
  if (!status_.ok()) return status_;
  InFlight& step = in_flight_.emplace_back();
  step.number = io_.Submitted();
  step.collectives = replay_ != nullptr ? replay_->collectives : collectives_.stats();
  for (const LogitRow& row : logit_rows_) {
    const BatchSpan& span = spans_[row.span];
    step.slots.push_back(span.slot);
  }
  uint32_t first_row = 0;
  size_t next = 0;
  for (size_t s = 0; s < spans_.size(); ++s) {
    for (; next < logit_rows_.size() && logit_rows_[next].span == s; ++next) {
      step.positions.push_back(spans_[s].begin + logit_rows_[next].row - first_row);
    }
    first_row += spans_[s].count;
  }
  step.rows = std::move(logit_rows_);
  return absl::OkStatus();
}

bool CudaBackend::Done() {
  if (in_flight_.empty()) return false;
  if (io_.IsDone(in_flight_.front().number)) return true;
  // A failure never writes the number: look now and then.
  thread_local uint32_t polls = 0;
  if (++polls % 4096 != 0) return false;
  const cudaError_t error = cudaStreamQuery(stream_);
  if (error == cudaErrorNotReady) return false;
  return true;  // Collect says what happened
}

absl::StatusOr<StepOutput> CudaBackend::Collect() {
  LOCKSTEP_CHECK(!in_flight_.empty());
  const InFlight step = std::move(in_flight_.front());
  in_flight_.pop_front();
  if (!io_.IsDone(step.number)) {
    Check(cudaStreamSynchronize(stream_), "a step on the GPU");
    if (status_.ok() && !io_.IsDone(step.number)) {
      status_ = absl::InternalError("a step ended without its result");
    }
    if (!status_.ok()) return status_ = collectives_.Explain(status_);
  }
  StepOutput output;
  output.collectives = step.collectives;
  const kernels::StepStamp& stamp = io_.stamp(step.number);
  output.device_ns = stamp.end_ns - stamp.begin_ns;
  if (stamp.sampling_begin_ns != 0) output.sampling_ns = stamp.end_ns - stamp.sampling_begin_ns;
  output.collectives.wait_ns = stamp.collectives.wait_ns;
  output.collectives.transfer_ns = stamp.collectives.transfer_ns;
  const uint64_t gap = stamp.begin_ns - last_end_ns_;
  if (last_end_ns_ != 0 && gap < kIdleWithoutWorkNs) output.device_idle_ns = gap;
  last_end_ns_ = stamp.end_ns;
  if (plan_.rank != 0) return output;
  const kernels::SampledRow* results = io_.results(step.number);
  const kernels::RowLogprobs* logprobs = io_.logprobs(step.number);
  for (size_t i = 0; i < step.rows.size(); ++i) {
    AppendResult(step.rows[i], step.slots[i], step.positions[i], results[i], logprobs[i], &output);
  }
  return output;
}

bool CudaBackend::Drain() {
  in_flight_.clear();
  return cudaStreamSynchronize(stream_) == cudaSuccess;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeCudaBackend(const ModelConfig& config,
                                                         const ShardPlan& plan,
                                                         std::unique_ptr<DeviceWeights> weights,
                                                         const CudaBackendOptions& options) {
  absl::StatusOr<ModelWeights> model = ResolveWeights(config, plan, *weights);
  if (!model.ok()) return model.status();
  auto backend =
      std::make_unique<CudaBackend>(config, plan, std::move(weights), *std::move(model), options);
  if (absl::Status status = backend->Init(); !status.ok()) return status;
  return backend;
}

absl::Status InitKernels() {
  absl::Status status = ToStatus(kernels::InitGemv(), "loading the matrix kernels");
  if (status.ok()) status = ToStatus(kernels::InitAllReduce(), "loading the all-reduce kernels");
  if (status.ok()) {
    status = ToStatus(kernels::InitDecodeAttention(), "loading the attention kernels");
  }
  if (status.ok()) {
    status = ToStatus(kernels::InitPrefillAttention(), "loading the attention kernels");
  }
  return status;
}

}  // namespace lockstep::cuda
