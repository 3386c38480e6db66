#include "kernels/gemv.h"
#include "worker/backend/cuda/backend_impl.h"
#include "worker/comm/cuda/device_communicator.h"

namespace lockstep::cuda {

using kernels::GemvArgs;
using kernels::GemvEpilogue;
using kernels::Type;

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

}  // namespace lockstep::cuda
