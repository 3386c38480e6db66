#include "worker/backend/cuda/cuda_backend.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/all_reduce.h"
#include "kernels/attention_decode.h"
#include "kernels/attention_prefill.h"
#include "kernels/gemv.h"
#include "kernels/skinny_cluster.h"
#include "worker/backend/cpu/rotary.h"
#include "worker/backend/cuda/backend_impl.h"

namespace lockstep::cuda {
namespace {

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

}  // namespace

CudaBackend::CudaBackend(const ModelConfig& config, const ShardPlan& plan,
                         std::unique_ptr<DeviceWeights> weights, ModelWeights model,
                         const CudaBackendOptions& options)
    : config_(config),
      plan_(plan),
      limits_(options.limits),
      type_(ToType(options.dtype)),
      kv_type_(ToType(options.kv_dtype)),
      kv_scales_(options.kv_scales),
      wants_graphs_(options.graphs),
      use_row_stack_(options.row_stack),
      hidden_(static_cast<int>(config.hidden_size)),
      q_width_(static_cast<int>(plan.local_heads * config.head_dim)),
      kv_width_(static_cast<int>(plan.local_kv_heads * config.head_dim)),
      qkv_width_(q_width_ + 2 * kv_width_),
      up_width_(static_cast<int>(plan.local_intermediate * (config.gated_mlp ? 2 : 1))),
      intermediate_(static_cast<int>(plan.local_intermediate)),
      weights_(std::move(weights)),
      model_(std::move(model)),
      max_logit_rows_(std::min<int64_t>(kMaxLogitRows, options.limits.max_num_seqs)),
      free_bytes_before_(options.free_bytes_before) {}

CudaBackend::~CudaBackend() {
  if (stream_ == nullptr) return;
  if (exchange_stream_ != nullptr) (void)cudaStreamSynchronize(exchange_stream_);
  (void)cudaStreamSynchronize(stream_);
  graphs_.Clear();
  for (cudaEvent_t event : {produced_[0], produced_[1], reduced_[0], reduced_[1]}) {
    if (event != nullptr) (void)cudaEventDestroy(event);
  }
  if (exchange_stream_ != nullptr) (void)cudaStreamDestroy(exchange_stream_);
  (void)cudaStreamDestroy(stream_);
}

absl::Status CudaBackend::Init() {
  const int64_t held_before = HeldDeviceBytes();
  absl::StatusOr<std::unique_ptr<LtMatmul>> lt = LtMatmul::Create();
  if (!lt.ok()) return lt.status();
  lt_ = *std::move(lt);
  absl::Status status =
      ToStatus(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream");
  if (status.ok()) status = PrepareHalves();
  if (status.ok()) status = io_.Allocate(limits_, max_logit_rows_);
  if (status.ok()) status = slots_.Allocate(limits_, config_, plan_);
  if (status.ok()) {
    status = buffers_.Allocate(config_, plan_, type_, limits_, max_logit_rows_,
                               Quantized(model_.layers[0].qkv));
  }
  if (status.ok())
    status = sampling_.Allocate(plan_, max_logit_rows_, io_.io().capacity.logit_rows);
  const size_t kv = 2 * static_cast<size_t>(config_.num_layers) * limits_.num_kv_blocks *
                    limits_.block_size * kv_width_ * kernels::TypeBytes(kv_type_);
  if (status.ok()) status = kv_.AllocateZeroed(kv, "the KV cache");
  if (status.ok()) status = AllocateWidened();
  if (status.ok()) {
    status = attention_workspace_.AllocateZeroed(
        kernels::DecodeAttentionWorkspaceBytes(
            static_cast<int>(plan_.local_heads), static_cast<int>(plan_.local_kv_heads),
            static_cast<int>(config_.head_dim), static_cast<int>(limits_.max_num_seqs),
            static_cast<int>(limits_.max_model_len)),
        "attention");
  }
  for (Buffer<std::byte>& plan : attention_plans_) {
    if (status.ok()) status = plan.Allocate(kernels::DecodeAttentionPlanBytes(), "attention");
  }
  if (config_.position == PositionKind::kRope) {
    if (status.ok())
      status = MakeRotary(config_.rope, config_.head_dim, limits_.max_model_len, &rope_);
    if (status.ok() && !(config_.rope_local == config_.rope)) {
      status =
          MakeRotary(config_.rope_local, config_.head_dim, limits_.max_model_len, &rope_local_);
    }
  }
  // What was cleared was so on the default stream, which `stream_` does not wait for.
  if (status.ok()) status = ToStatus(cudaDeviceSynchronize(), "clearing buffers");
  if (!status.ok()) return status;
  activation_bytes_ = HeldDeviceBytes() - held_before - kv_bytes();
  runtime_bytes_ = MeasureRuntime();
  int device = 0;
  cudaDeviceProp properties = {};
  (void)cudaGetDevice(&device);
  status = ToStatus(cudaGetDeviceProperties(&properties, device), "asking for the GPU's name");
  description_ = absl::StrCat("cuda, ", properties.name, ", ", lt_->version());
  return status;
}

// What the device has lost since before this process, beside its Buffers: the context,
// kernels, libraries, and what the allocator rounds up. Others who took or gave back memory
// meanwhile are in it; no answer where that is plain to see.
std::optional<int64_t> CudaBackend::MeasureRuntime() const {
  size_t free_bytes = 0, total_bytes = 0;
  if (free_bytes_before_ == 0 || cudaMemGetInfo(&free_bytes, &total_bytes) != cudaSuccess) {
    return std::nullopt;
  }
  const int64_t lost = free_bytes_before_ - static_cast<int64_t>(free_bytes) - HeldDeviceBytes();
  if (lost <= 0) return std::nullopt;
  return lost;
}

absl::Status CudaBackend::Attach(Communicator* comm) {
  in_flight_.clear();
  last_end_ns_ = 0;
  graphs_.Clear();  // of an epoch that was not drained
  status_ = collectives_.Attach(comm, hidden_, shared_rows_, io_.io().collectives);
  if (status_.ok()) status_ = PrepareExchange();
  if (status_.ok()) status_ = PrepareStack();
  graphs_.SetLimits(static_cast<int>(max_logit_rows_), static_cast<int>(limits_.max_model_len));
  use_graphs_ = wants_graphs_ && !collectives_.may_skip();
  to_record_ = use_graphs_ ? graphs_.Usual() : std::vector<StepGraphs::Key>();
  if (status_.ok()) status_ = io_.Reset(stream_);
  if (status_.ok()) status_ = slots_.Reset(stream_);
  if (status_.ok()) status_ = sampling_.Reset(stream_);
  // Some were cleared on the default one.
  for (cudaStream_t stream : {stream_, cudaStream_t{}}) {
    if (status_.ok()) status_ = ToStatus(cudaStreamSynchronize(stream), "an epoch's buffers");
  }
  return status_;
}

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
  if (status.ok()) status = ToStatus(kernels::InitSkinnyCluster(), "loading the matrix kernels");
  if (status.ok()) status = ToStatus(kernels::InitRowStack(), "loading the kernel of a row");
  if (status.ok()) status = ToStatus(kernels::InitAllReduce(), "loading the all-reduce kernels");
  if (status.ok()) status = ToStatus(kernels::InitRowExchange(), "loading the all-reduce kernels");
  if (status.ok()) status = ToStatus(kernels::InitRowReduce(), "loading the all-reduce kernels");
  if (status.ok()) {
    status = ToStatus(kernels::InitDecodeAttention(), "loading the attention kernels");
  }
  if (status.ok()) {
    status = ToStatus(kernels::InitPrefillAttention(), "loading the attention kernels");
  }
  return status;
}

}  // namespace lockstep::cuda
