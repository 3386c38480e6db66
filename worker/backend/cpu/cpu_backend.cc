#include "worker/backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <new>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "worker/backend/cpu/gemm.h"
#include "worker/backend/cpu/head.h"
#include "worker/backend/cpu/kernels.h"
#include "worker/backend/cpu/kv_cache.h"
#include "worker/backend/cpu/layer_weights.h"
#include "worker/backend/cpu/rotary.h"
#include "worker/backend/cpu/slot_table.h"

namespace lockstep {
namespace {

using cpu::kLanes;
using cpu::NormWeights;
using cpu::SlotState;

// A rank's slices of K. A tp_size that does not divide them (3, say) sums each
// rank's share as one: right, but not bit for bit what other sizes give.
int64_t LocalSlices(int64_t slices, int64_t tp_size) {
  return slices % tp_size == 0 ? slices / tp_size : 1;
}

class CpuBackend final : public Backend {
 public:
  CpuBackend(const ModelConfig& config, const ShardPlan& plan, std::unique_ptr<Weights> weights,
             cpu::ModelWeights model, const BackendLimits& limits,
             std::unique_ptr<cpu::KvCache> cache, ThreadPool* pool);

  absl::Status Attach(Communicator* comm) override;
  void Admit(const NewSequence& sequence) override { slots_.Admit(sequence); }
  void Grow(Slot slot, absl::Span<const BlockId> blocks) override { slots_.Grow(slot, blocks); }
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
  bool Done() override { return !outputs_.empty(); }
  absl::StatusOr<StepOutput> Collect() override;
  bool Drain() override {
    outputs_.clear();
    return true;
  }

  int64_t max_logit_rows() const override { return head_.max_rows(); }
  int64_t weight_bytes() const override { return weights_->allocated_bytes(); }
  int64_t kv_bytes() const override { return cache_->bytes(); }
  std::optional<int64_t> activation_bytes() const override;
  std::optional<int64_t> runtime_bytes() const override { return 0; }
  std::string description() const override {
    return absl::StrCat("cpu, ", kernels_.name, ", ", pool_.size(),
                        pool_.size() == 1 ? " thread" : " threads");
  }

 private:
  void Norm(const NormWeights& norm, const float* x, float* out) const;
  void NormRow(const NormWeights* norm, int64_t row);
  void Gemm(const float* x, int64_t ldx, int64_t m, const WeightTensor& w, int64_t slices, float* y,
            int64_t ldy) {
    cpu::Gemm(kernels_, pool_, workspace_, x, ldx, m, w, slices, y, ldy);
  }
  int64_t num_rows() const { return static_cast<int64_t>(rows_.size()); }
  float* At(std::vector<float>& buffer, int64_t row, int64_t width) {
    return buffer.data() + row * width;
  }

  const ModelConfig config_;
  const ShardPlan plan_;
  const BackendLimits limits_;
  const cpu::Kernels& kernels_;
  ThreadPool& pool_;
  const std::unique_ptr<Weights> weights_;
  const cpu::ModelWeights model_;
  const std::unique_ptr<cpu::KvCache> cache_;
  const int64_t q_width_, kv_width_, qkv_width_, up_width_;
  const int64_t group_;  // query heads a KV head
  Communicator* comm_ = nullptr;
  cpu::SlotTable slots_;

  std::deque<StepOutput> outputs_;  // computed as they were submitted

  // Of the step.
  absl::Status status_;
  std::vector<BatchSpan> spans_;
  std::vector<cpu::StepRow> rows_;

  // Buffers of max_batched_tokens rows.
  std::vector<float> residual_, normed_, partial_;  // [rows, hidden]
  std::vector<float> embedded_;                     // [rows, embedding_dim], only with project_in
  std::vector<float> qkv_;                          // [rows, q + k + v]
  std::vector<float> heads_;                        // [rows, q]
  std::vector<float> up_;                           // [rows, gate + up]
  cpu::RotaryTable rope_, rope_local_;
  std::vector<std::vector<float>> scores_;  // per thread: [group, max_model_len]
  cpu::GemmWorkspace workspace_;
  cpu::Head head_;
};

CpuBackend::CpuBackend(const ModelConfig& config, const ShardPlan& plan,
                       std::unique_ptr<Weights> weights, cpu::ModelWeights model,
                       const BackendLimits& limits, std::unique_ptr<cpu::KvCache> cache,
                       ThreadPool* pool)
    : config_(config),
      plan_(plan),
      limits_(limits),
      kernels_(cpu::BestKernels()),
      pool_(*pool),
      weights_(std::move(weights)),
      model_(std::move(model)),
      cache_(std::move(cache)),
      q_width_(plan.local_heads * config.head_dim),
      kv_width_(plan.local_kv_heads * config.head_dim),
      qkv_width_(q_width_ + 2 * kv_width_),
      up_width_(plan.local_intermediate * (config.gated_mlp ? 2 : 1)),
      group_(plan.local_heads / plan.local_kv_heads),
      slots_(limits.max_num_seqs),
      rope_(config.rope, config.head_dim),
      rope_local_(config.rope_local, config.head_dim),
      scores_(pool->size()),
      workspace_(kernels_, pool->size()),
      head_(config_, plan_, model_, kernels_, pool_, workspace_, limits.max_batched_tokens) {
  const int64_t rows = limits.max_batched_tokens, hidden = config.hidden_size;
  for (std::vector<float>* buffer : {&residual_, &normed_, &partial_})
    buffer->resize(rows * hidden);
  if (model_.project_in.data != nullptr) embedded_.resize(rows * config.embedding_dim);
  qkv_.resize(rows * qkv_width_);
  heads_.resize(rows * q_width_);
  up_.resize(rows * up_width_);
  const int64_t seen = (limits.max_model_len + kLanes - 1) / kLanes * kLanes;
  for (std::vector<float>& scores : scores_) scores.resize(group_ * seen);
  workspace_.Reserve(rows, hidden, 1);
  workspace_.Reserve(rows, q_width_, LocalSlices(plan.attention_slices, plan.tp_size));
  workspace_.Reserve(rows, plan.local_intermediate, LocalSlices(plan.mlp_slices, plan.tp_size));
  workspace_.Reserve(rows, config.embedding_dim, 1);
  if (config.position == PositionKind::kRope) {
    rope_.Reserve(rows);
    if (!(config.rope_local == config.rope)) rope_local_.Reserve(rows);
  }
}

// All that is sized by then; what grows with use (tokens and counts of slots, scratch
// of sampling) is small beside it.
std::optional<int64_t> CpuBackend::activation_bytes() const {
  size_t floats = 0;
  for (const auto* buffer : {&residual_, &normed_, &partial_, &embedded_, &qkv_, &heads_, &up_}) {
    floats += buffer->size();
  }
  for (const std::vector<float>& scores : scores_) floats += scores.size();
  return static_cast<int64_t>(floats * sizeof(float)) + workspace_.bytes() + head_.bytes() +
         rope_.bytes() + rope_local_.bytes();
}

absl::Status CpuBackend::Attach(Communicator* comm) {
  comm_ = comm;
  outputs_.clear();
  slots_.Clear();
  return absl::OkStatus();
}

bool CpuBackend::Begin(absl::Span<const BatchSpan> spans, absl::Span<const LogitRow>) {
  status_ = absl::OkStatus();
  spans_.assign(spans.begin(), spans.end());
  rows_.clear();
  std::vector<int64_t> positions;
  for (const BatchSpan& span : spans) {
    SlotState& slot = slots_.At(span.slot);
    for (uint32_t i = 0; i < span.count; ++i) {
      rows_.push_back({&slot, int64_t{span.begin} + i});
      positions.push_back(int64_t{span.begin} + i);
    }
  }
  LOCKSTEP_CHECK(rows_.size() <= limits_.max_batched_tokens);
  head_.Begin(spans_, rows_);
  comm_->ResetStats();
  if (config_.position == PositionKind::kRope) {
    rope_.Prepare(positions, pool_);
    if (!(config_.rope_local == config_.rope)) rope_local_.Prepare(positions, pool_);
  }
  return false;
}

void CpuBackend::Norm(const NormWeights& norm, const float* x, float* out) const {
  const float eps = static_cast<float>(config_.norm_eps);
  if (config_.norm == NormKind::kRms) {
    kernels_.rms_norm(x, norm.weight, config_.norm_weight_plus_one ? 1.0f : 0.0f, eps,
                      config_.hidden_size, out);
  } else {
    kernels_.layer_norm(x, norm.weight, norm.bias, eps, config_.hidden_size, out);
  }
}

// normed = norm(residual), or a copy of it.
void CpuBackend::NormRow(const NormWeights* norm, int64_t row) {
  const int64_t hidden = config_.hidden_size;
  const float* residual = At(residual_, row, hidden);
  float* normed = At(normed_, row, hidden);
  if (norm != nullptr) {
    Norm(*norm, residual, normed);
  } else {
    std::memcpy(normed, residual, hidden * sizeof(float));
  }
}

void CpuBackend::Embed(const EmbedOp& op) {
  const int64_t width = config_.embedding_dim, hidden = config_.hidden_size;
  const bool projected = model_.project_in.data != nullptr;
  std::vector<float>& embedded = projected ? embedded_ : residual_;
  const int64_t row_bytes = width * DTypeBytes(model_.embedding.dtype);
  pool_.ParallelFor(num_rows(), [&](int64_t r, int) {
    float* out = At(embedded, r, width);
    const int64_t token = rows_[r].slot->tokens[rows_[r].position];
    const int64_t local = token - plan_.first_vocab;
    if (local < 0 || local >= plan_.local_vocab) {
      std::fill(out, out + width, 0.0f);
      return;
    }
    kernels_.widen(model_.embedding.data + local * row_bytes, model_.embedding.dtype, width, out);
    // As if zeros of other ranks were added: a negative zero must not tell tp sizes apart.
    for (int64_t i = 0; i < width; ++i) out[i] += 0.0f;
  });
  status_ = comm_->AllReduceSum(absl::MakeSpan(embedded.data(), num_rows() * width));
  if (!status_.ok()) return;
  const float scale = static_cast<float>(config_.embedding_scale);
  if (scale != 1.0f) {
    for (int64_t i = 0; i < num_rows() * width; ++i) embedded[i] *= scale;
  }
  if (projected) {
    Gemm(embedded.data(), width, num_rows(), model_.project_in, 1, residual_.data(), hidden);
  }
  const NormWeights* norm = model_.Find(op.norm);
  pool_.ParallelFor(num_rows(), [&](int64_t r, int) {
    if (model_.position.data != nullptr) {
      float* normed = At(normed_, r, hidden);  // free until the norm below
      const int64_t at = rows_[r].position + config_.position_offset;
      kernels_.widen(model_.position.data + at * hidden * DTypeBytes(model_.position.dtype),
                     model_.position.dtype, hidden, normed);
      float* residual = At(residual_, r, hidden);
      for (int64_t i = 0; i < hidden; ++i) residual[i] += normed[i];
    }
    NormRow(norm, r);
  });
}

void CpuBackend::Qkv(const QkvOp& op) {
  if (!status_.ok()) return;
  const cpu::LayerWeights& w = model_.layers[op.layer];
  Gemm(normed_.data(), config_.hidden_size, num_rows(), w.qkv.weight, 1, qkv_.data(), qkv_width_);

  const int64_t head_dim = config_.head_dim;
  const float eps = static_cast<float>(config_.norm_eps);
  const float offset = config_.norm_weight_plus_one ? 1.0f : 0.0f;
  const cpu::RotaryTable* rope = op.rope == RopeTable::kNone     ? nullptr
                                 : op.rope == RopeTable::kGlobal ? &rope_
                                                                 : &rope_local_;
  const DType kv_dtype = cache_->shape().dtype;
  pool_.ParallelFor(num_rows(), [&](int64_t r, int) {
    float* qkv = At(qkv_, r, qkv_width_);
    if (w.qkv.bias != nullptr) {
      for (int64_t i = 0; i < qkv_width_; ++i) qkv[i] += w.qkv.bias[i];
    }
    for (int64_t head = 0; head < plan_.local_heads + plan_.local_kv_heads; ++head) {
      float* x = qkv + head * head_dim;
      const float* norm = head < plan_.local_heads ? w.q_norm : w.k_norm;
      if (norm != nullptr) kernels_.rms_norm(x, norm, offset, eps, head_dim, x);
      if (rope != nullptr) kernels_.rope(x, rope->Cos(r), rope->Sin(r), head_dim / 2);
    }
    const int64_t position = rows_[r].position;
    const int64_t at = cache_->OffsetOf(rows_[r].slot->table[position / limits_.block_size],
                                        position % limits_.block_size);
    for (int64_t head = 0; head < plan_.local_kv_heads; ++head) {
      const float* k = qkv + q_width_ + head * head_dim;
      kernels_.narrow(k, head_dim, kv_dtype, cache_->K(op.layer, head) + at);
      kernels_.narrow(k + kv_width_, head_dim, kv_dtype, cache_->V(op.layer, head) + at);
    }
  });
}

void CpuBackend::Attention(const AttentionOp& op) {
  if (!status_.ok()) return;
  // A task is a row and a KV head, or part of its query heads while there are
  // fewer tasks than threads.
  int64_t parts = 1;
  while (num_rows() * plan_.local_kv_heads * parts < pool_.size() && group_ % (parts * 2) == 0) {
    parts *= 2;
  }
  const int64_t heads = group_ / parts;
  const int64_t tasks = plan_.local_kv_heads * parts;
  pool_.ParallelFor(num_rows() * tasks, [&](int64_t i, int thread) {
    const int64_t r = i / tasks, head = i % tasks * heads, kv_head = head / group_;
    const int64_t end = rows_[r].position + 1;
    kernels_.attention({.q = At(qkv_, r, qkv_width_) + head * config_.head_dim,
                        .heads = heads,
                        .head_dim = config_.head_dim,
                        .k = cache_->K(op.layer, kv_head),
                        .v = cache_->V(op.layer, kv_head),
                        .dtype = cache_->shape().dtype,
                        .table = rows_[r].slot->table.data(),
                        .block_size = limits_.block_size,
                        .block_stride = cache_->block_stride(),
                        .begin = op.window > 0 ? std::max<int64_t>(0, end - op.window) : 0,
                        .end = end,
                        .scale = op.scale,
                        .scores = scores_[thread].data(),
                        .out = At(heads_, r, q_width_) + head * config_.head_dim});
  });
}

void CpuBackend::AttentionOutput(int64_t layer) {
  if (!status_.ok()) return;
  Gemm(heads_.data(), q_width_, num_rows(), model_.layers[layer].o.weight,
       LocalSlices(plan_.attention_slices, plan_.tp_size), partial_.data(), config_.hidden_size);
}

void CpuBackend::ReduceResidualNorm(const ReduceOp& op) {
  if (!status_.ok()) return;
  const int64_t hidden = config_.hidden_size;
  status_ = comm_->AllReduceSum(absl::MakeSpan(partial_.data(), num_rows() * hidden));
  if (!status_.ok()) return;
  const cpu::LayerWeights& w = model_.layers[op.layer];
  const float* bias = op.source == ReduceOp::Source::kAttention ? w.o.bias : w.down.bias;
  const NormWeights* post = model_.Find(op.post);
  const NormWeights* next = model_.Find(op.next);
  pool_.ParallelFor(num_rows(), [&](int64_t r, int) {
    float* x = At(partial_, r, hidden);
    float* residual = At(residual_, r, hidden);
    if (bias != nullptr) {
      for (int64_t i = 0; i < hidden; ++i) x[i] += bias[i];
    }
    if (post != nullptr) Norm(*post, x, x);
    for (int64_t i = 0; i < hidden; ++i) residual[i] += x[i];
    NormRow(next, r);
    if (op.norm_is_residual) std::memcpy(residual, At(normed_, r, hidden), hidden * sizeof(float));
  });
}

void CpuBackend::GateUp(int64_t layer) {
  if (!status_.ok()) return;
  const cpu::LayerWeights& w = model_.layers[layer];
  Gemm(normed_.data(), config_.hidden_size, num_rows(), w.up.weight, 1, up_.data(), up_width_);
  pool_.ParallelFor(num_rows(), [&](int64_t r, int) {
    float* x = At(up_, r, up_width_);
    if (w.up.bias != nullptr) {
      for (int64_t i = 0; i < up_width_; ++i) x[i] += w.up.bias[i];
    }
    const float* up = config_.gated_mlp ? x + plan_.local_intermediate : nullptr;
    kernels_.activate(config_.activation, x, up, plan_.local_intermediate, x);
  });
}

void CpuBackend::Down(int64_t layer) {
  if (!status_.ok()) return;
  Gemm(up_.data(), up_width_, num_rows(), model_.layers[layer].down.weight,
       LocalSlices(plan_.mlp_slices, plan_.tp_size), partial_.data(), config_.hidden_size);
}

void CpuBackend::Logits(absl::Span<const LogitRow> rows) {
  if (status_.ok()) status_ = head_.Logits(rows, normed_.data(), comm_);
}

void CpuBackend::Sample(absl::Span<const LogitRow> rows) {
  if (status_.ok()) head_.Sample(rows);
}

absl::Status CpuBackend::Submit() {
  if (status_.ok()) status_ = head_.Publish(comm_);
  if (!status_.ok()) return status_;
  outputs_.push_back(head_.TakeOutput());
  outputs_.back().collectives = comm_->stats();
  return absl::OkStatus();
}

absl::StatusOr<StepOutput> CpuBackend::Collect() {
  LOCKSTEP_CHECK(!outputs_.empty());
  StepOutput output = std::move(outputs_.front());
  outputs_.pop_front();
  return output;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(const ModelConfig& config,
                                                        const ShardPlan& plan,
                                                        std::unique_ptr<Weights> weights,
                                                        const BackendLimits& limits, DType kv_dtype,
                                                        ThreadPool* pool) {
  if (limits.max_num_seqs == 0 || limits.max_batched_tokens == 0 || limits.max_model_len == 0 ||
      limits.block_size == 0) {
    return absl::InvalidArgumentError(
        "max_num_seqs, max_batched_tokens, max_model_len and block_size must be above 0");
  }
  if (config.position == PositionKind::kLearned &&
      limits.max_model_len > config.max_position_embeddings) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_model_len ", limits.max_model_len,
                     " is beyond the model's learned positions; at most ",
                     config.max_position_embeddings, " works"));
  }
  if (kv_dtype != DType::kFloat32 && kv_dtype != DType::kFloat16 && kv_dtype != DType::kBFloat16) {
    return absl::InvalidArgumentError(
        absl::StrCat("KV dtype ", std::string(DTypeName(kv_dtype)),
                     ": the cpu backend keeps float32, float16 or bfloat16"));
  }
  absl::StatusOr<cpu::ModelWeights> model = cpu::ResolveWeights(config, plan, *weights);
  if (!model.ok()) return model.status();
  absl::StatusOr<std::unique_ptr<cpu::KvCache>> cache =
      cpu::KvCache::Allocate({.layers = config.num_layers,
                              .blocks = limits.num_kv_blocks,
                              .block_size = limits.block_size,
                              .kv_heads = plan.local_kv_heads,
                              .head_dim = config.head_dim,
                              .dtype = kv_dtype});
  if (!cache.ok()) return cache.status();
  try {
    return std::make_unique<CpuBackend>(config, plan, std::move(weights), *std::move(model), limits,
                                        *std::move(cache), pool);
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for the buffers of ", limits.max_batched_tokens,
                     " tokens a step; a smaller --max-num-batched-tokens needs less"));
  }
}

}  // namespace lockstep
