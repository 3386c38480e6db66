// The class behind MakeCudaBackend, for the files that implement it:
//
//   cuda_backend.cc    what it owns: memory, stream, epochs
//   backend_steps.cc   a step's begin and end: inputs, graphs, results
//   backend_forward.cc the operations of the forward pass
//   backend_products.cc which kernels its matrix products go by
//   backend_fold.cc    one decoded row, whose all-reduces are part of its products
//   backend_stack.cc   one decoded row, whose layers are one kernel
//   backend_halves.cc  a long step, whose all-reduces go on behind its products
//   backend_last_layer.cc what is left of a step with prompts once their keys are written
//   backend_widen.cc   keys and values of one byte, for prompts
//
// Not thread-safe; see worker/backend/backend.h.
#ifndef LOCKSTEP_WORKER_BACKEND_CUDA_BACKEND_IMPL_H_
#define LOCKSTEP_WORKER_BACKEND_CUDA_BACKEND_IMPL_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/attention_decode.h"
#include "kernels/attention_prefill.h"
#include "kernels/embed.h"
#include "kernels/gemv.h"
#include "kernels/norm.h"
#include "kernels/row_stack.h"
#include "kernels/sample.h"
#include "kernels/skinny_cluster.h"
#include "worker/backend/cuda/activations.h"
#include "worker/backend/cuda/collectives.h"
#include "worker/backend/cuda/cuda_backend.h"
#include "worker/backend/cuda/lt_matmul.h"
#include "worker/backend/cuda/model_weights.h"
#include "worker/backend/cuda/sampling.h"
#include "worker/backend/cuda/slots.h"
#include "worker/backend/cuda/step_graphs.h"
#include "worker/backend/cuda/step_io.h"

namespace lockstep::cuda {

// A product of so few rows streams its weights; see kernels/gemv.h.
inline constexpr int kMaxSkinnyRows = 16;
// Of a step whose kernels are brief; see kernels::Launch.
inline constexpr int kMaxBriefRows = 256;

class CudaBackend final : public Backend {
 public:
  CudaBackend(const ModelConfig& config, const ShardPlan& plan,
              std::unique_ptr<DeviceWeights> weights, ModelWeights model,
              const CudaBackendOptions& options);
  ~CudaBackend() override;
  absl::Status Init();
  std::optional<int64_t> MeasureRuntime() const;
  absl::Status PrepareExchange();

  absl::Status Attach(Communicator* comm) override;
  bool BeginRecording(std::vector<LogitRow>* rows) override;
  absl::Status EndRecording() override;
  void Admit(const NewSequence& sequence) override {
    if (status_.ok()) status_ = slots_.Admit(stream_, sequence, &io_);
  }
  void Grow(Slot slot, absl::Span<const BlockId> blocks) override {
    if (status_.ok()) status_ = slots_.Grow(stream_, slot, blocks, &io_);
  }
  void Release(Slot slot) override { slots_.Release(slot); }

  bool Begin(absl::Span<const BatchSpan> spans, absl::Span<const LogitRow> rows) override;
  void Embed(const EmbedOp& op) override;
  void Qkv(const QkvOp& op) override {
    if (op.layer == config_.num_layers - 1) BeginLastLayer();
    Enqueue([this, op] { RunQkv(op); });
  }
  void Attention(const AttentionOp& op) override {
    if (op.layer == config_.num_layers - 1) Narrow();
    Enqueue([this, op] { RunAttention(op); });
  }
  void AttentionOutput(int64_t layer) override {
    Enqueue([this, layer] { RunAttentionOutput(layer); });
  }
  void GateUp(int64_t layer) override {
    Enqueue([this, layer] { RunGateUp(layer); });
  }
  void Down(int64_t layer) override {
    Enqueue([this, layer] { RunDown(layer); });
  }
  void ReduceResidualNorm(const ReduceOp& op) override;
  void Logits(absl::Span<const LogitRow> rows) override;
  void Sample(absl::Span<const LogitRow> rows) override;
  absl::Status Submit() override;
  bool Done() override;
  absl::StatusOr<StepOutput> Collect() override;
  bool Drain() override;

  int64_t max_logit_rows() const override { return max_logit_rows_; }
  int64_t weight_bytes() const override { return weights_->allocated_bytes(); }
  int64_t shared_bytes() const override { return static_cast<int64_t>(shared_rows_.bytes); }
  int64_t kv_bytes() const override { return static_cast<int64_t>(kv_.bytes()); }
  std::optional<int64_t> activation_bytes() const override { return activation_bytes_; }
  std::optional<int64_t> runtime_bytes() const override { return runtime_bytes_; }
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
  // Rows of the step that are worked on at a time: all of them, or a half.
  struct Part {
    int first = 0, rows = 0;
    int decode_rows = 0;  // the first of them, one of each span
    int first_span = 0, spans = 0;
    int max_count = 0;  // of a span
  };

  void RunQkv(const QkvOp& op);
  void RunAttention(const AttentionOp& op);
  void RunAttentionOutput(int64_t layer);
  void RunGateUp(int64_t layer);
  void RunDown(int64_t layer);
  // A row-parallel product of `width` columns, into buffers_.partial.
  void MatmulPartial(const void* x, int width, const Linear& linear);
  void Reduce(const kernels::Launch& launch, const ReduceOp& op);
  // What follows a sum over the ranks that lies in buffers_.partial.
  void AddAndNorm(const kernels::Launch& launch, const ReduceOp& op, std::byte* normed,
                  const kernels::QuantizedRows& quantized);
  const void* BiasOf(const ReduceOp& op) const;
  // The product that takes what Reduce makes.
  Linear ReaderOf(const ReduceOp& op) const;
  // Where such a product of `linear` pushes its sums; of size 0: it stores them.
  kernels::ExchangePush PushOfPartial(const Linear& linear) const;
  void Enqueue(std::function<void()> operation) {
    if (!status_.ok() || stacked_ || NothingLeft()) return;
    if (halved_) return stage_.push_back(std::move(operation));
    operation();
  }

  void SetParts(int cut, int decode_rows);
  // Of backend_halves.cc.
  kernels::QuantizedRows SharedQuantized() const;
  absl::Status PrepareHalves();
  bool MayHalve(int rows, int decode_rows) const;
  static int CutOf(int rows);  // of the first half
  // For a half's products, beside the other half's sum; 0: all.
  int ProductsMultiprocessors() const;
  void RunHalves(const ReduceOp& op);
  void ReduceByRows(const ReduceOp& op);
  // Of backend_last_layer.cc.
  bool MayNarrow(absl::Span<const LogitRow> rows) const;
  void BeginLastLayer();
  void Narrow();
  kernels::HeldRows HeldResidual() const;
  bool NothingLeft() const { return narrowed_ && part_.rows == 0; }
  // For a step of so many rows that is not halved.
  bool MayDealResidual(int rows) const;
  void JoinHalves();

  // Whether a step of one row may fold its all-reduces into the products around
  // them: then every matrix of the layers goes by Gemv.
  bool CanFold() const;
  void Push(const void* x, const Linear& linear);
  absl::Status PrepareStack();
  kernels::RowStackArgs StackArgs();
  // The step becomes one of `key`, which covers it.
  void RoundUpTo(const StepGraphs::Key& key);
  // A step of key_, from here on and to its end.
  void BeginCapture();
  absl::Status EndCapture();
  void Publish();
  bool IsDecode(absl::Span<const BatchSpan> spans, absl::Span<const LogitRow> rows) const;
  void Check(cudaError_t error, const char* what) {
    if (status_.ok() && error != cudaSuccess) status_ = ToStatus(error, what);
  }
  // out = epilogue(x . weights), by the kernels for few rows; false, and nothing
  // done, where they do not take it.
  bool Gemv(const void* x, int64_t x_stride, const Linear& linear, int m, void* out,
            int64_t out_stride, kernels::GemvEpilogue epilogue);
  // What a product of one row does to its input, when the sum before it is still
  // on its way (see folded_).
  void TakeReduce(kernels::GemvArgs* args);
  // What a product may leave undone, for whoever reads it to see to.
  struct LeftToReader {
    kernels::ProductScales scales;
    float* room = nullptr;   // for parts; null: they are not to be left
    float* parts = nullptr;  // what there is instead of `out`, or null
  };
  // out = x . weights in the serving dtype, or the logits in fp32, by what is best. left: null:
  // nothing is left to the reader.
  void Matmul(const void* x, int64_t x_stride, const Linear& linear, int m, void* out,
              int64_t out_stride, kernels::GemvEpilogue epilogue = kernels::GemvEpilogue::kStore,
              LeftToReader* left = nullptr);
  bool Quantized(const Linear& linear) const { return linear.weight.type == kernels::Type::kE4M3; }
  // Whether the kernels that share K among the blocks of a cluster are to take such a
  // product: they stream the weights of several rows faster, and want e4m3 for e4m3.
  bool TakesCluster(const Linear& linear, int m) const;
  // Whether those quantise such a product's 16-bit input themselves.
  bool QuantizesAsStaged(const Linear& linear, int m) const;
  // Of such a product, but for x and where it goes.
  kernels::SkinnyClusterArgs ClusterArgs(const Linear& linear, int m, const float* x_scales) const;
  // For a kernel that may write what it makes, the input of `next`, as e4m3 too: where, if the
  // product takes it so.
  kernels::QuantizedRows TakesQuantized(const void* made, const Linear& next);
  kernels::Launch launch() const {
    // A GPU whose next kernels have begun already, to wait there, gives no other rank its turn.
    const bool pdl = !halved_ && !collectives_.shares_gpu();
    return {.stream = stream_, .pdl = pdl, .brief = part_.rows <= kMaxBriefRows};
  }
  // Where the part's rows of [rows][width] begin.
  std::byte* Rows(const Buffer<std::byte>& buffer, int width) const {
    return buffer.get() + size_t(part_.first) * width * kernels::TypeBytes(type_);
  }
  std::byte* Normed() const {
    if (!by_rows_) return Rows(buffers_.normed, hidden_);
    return collectives_.shared(shared_rows_.normed) +
           size_t(part_.first) * hidden_ * kernels::TypeBytes(type_);
  }
  kernels::KvLayer Kv(int64_t layer) const;
  absl::Status AllocateWidened();
  // Of span `s` of the step's arrays: blocks of its context.
  int SpanBlocks(int s) const;
  // A launch's spans from `first` on: how many, below `end`, and the room for them.
  int WidenedSpans(int first, int end, kernels::PrefillScratch* scratch) const;
  kernels::DecodeAttentionArgs DecodeArgs(int64_t layer) const;
  // Behind PrepareStep.
  void PlanAttention();

  const ModelConfig config_;
  const ShardPlan plan_;
  const BackendLimits limits_;
  const kernels::Type type_, kv_type_;
  const std::vector<KvScales> kv_scales_;  // of kE4M3, one a layer; empty: 1
  const bool wants_graphs_, use_row_stack_;
  const int hidden_, q_width_, kv_width_, qkv_width_, up_width_, intermediate_;
  const std::unique_ptr<DeviceWeights> weights_;
  const ModelWeights model_;
  const int64_t max_logit_rows_;
  const int64_t free_bytes_before_;
  int64_t activation_bytes_ = 0;
  std::optional<int64_t> runtime_bytes_;
  std::string description_;
  cudaStream_t stream_ = nullptr;
  cudaStream_t exchange_stream_ = nullptr;          // of halves' all-reduces
  cudaEvent_t produced_[2] = {}, reduced_[2] = {};  // of halves
  int multiprocessors_ = 0;
  SharedRows shared_rows_;
  std::unique_ptr<LtMatmul> lt_;
  Buffer<std::byte> own_exchange_;  // with one rank, what is pushed stays here
  kernels::GemvExchange exchange_region_;
  bool can_fold_ = false;
  // See backend_stack.cc.
  bool can_stack_ = false;
  std::vector<kernels::StackLayer> stack_layers_;
  Buffer<std::byte> stack_workspace_;
  Collectives collectives_;
  Slots slots_;
  StepIo io_;
  Activations buffers_;
  Sampling sampling_;
  bool use_graphs_ = false;  // of the epoch
  StepGraphs graphs_;
  std::vector<StepGraphs::Key> to_record_;
  Buffer<std::byte> kv_;
  Buffer<float2> rope_, rope_local_;
  Buffer<std::byte> attention_workspace_;
  Buffer<std::byte> attention_plans_[2];  // of layers that see all, and of those that slide
  // Of an e4m3 cache, for spans that fit: wide_blocks_ of k and of v in 16 bits.
  Buffer<std::byte> wide_kv_;
  Buffer<int32_t> wide_table_;
  int wide_blocks_ = 0;  // 0: none

  // Of the step.
  absl::Status status_;
  std::vector<BatchSpan> spans_;
  std::vector<LogitRow> logit_rows_;
  int rows_ = 0;                // padding included
  Part part_;                   // that is worked on
  int max_context_ = 0;         // of a decoded row
  std::vector<int> span_ends_;  // of the spans that are no decoded rows: begin + count
  int sampled_rows_ = 0;        // logit rows enqueued so far
  bool capturing_ = false;
  // See backend_halves.cc. stage_: what was called since the last reduction.
  bool halved_ = false;
  Part halves_[2];
  std::vector<std::function<void()>> stage_;
  // See backend_last_layer.cc. narrowed_: the step is of the rows whose logits are asked for.
  bool narrows_ = false, narrowed_ = false;
  // Each rank has its share of the residual's rows (kernels/row_reduce.h), in all of a step.
  bool deals_residual_ = false;
  bool by_rows_ = false;     // the halves' sums, by Collectives::SumOwnRows
  bool dealt_e4m3_ = false;  // and what is left of them is e4m3
  // Where the last row-parallel product's sums went; of size 0: into buffers_.partial.
  kernels::ExchangePush push_;
  const void* quantized_from_ = nullptr;  // what quantized_ is the e4m3 of
  kernels::QuantizedRows quantized_;
  // One decoded row: a row-parallel product pushes its sums to every rank, and the
  // product after it polls for them, adds the residual and norms them as it waits
  // for its weights. No kernel and no launch of its own is left of the all-reduce.
  bool folded_ = false;
  bool stacked_ = false;  // of those, a step whose layers are one kernel
  bool reduce_pending_ = false;
  kernels::NormSpec pending_norm_;
  uint32_t exchange_ = 0;
  void* residual_ = nullptr;              // the current one of two, while folded
  const float2* fresh_rotary_ = nullptr;  // what attention is left to do of Qkv
  bool fresh_ = false;
  bool deals_attention_ = false;          // by attention_plans_
  LeftToReader qkv_left_, partial_left_;  // by buffers_.qkv and .partial
  const StepGraphs::Graph* replay_ = nullptr;
  StepGraphs::Key key_;
  kernels::SampleNeeds needs_;
  std::deque<InFlight> in_flight_;
  uint64_t last_end_ns_ = 0;  // of the step collected last, on the device's clock
};

// The gate's activation in the product's own epilogue; kStore: it has none.
kernels::GemvEpilogue GateEpilogue(const ModelConfig& config);

}  // namespace lockstep::cuda

#endif  // LOCKSTEP_WORKER_BACKEND_CUDA_BACKEND_IMPL_H_
