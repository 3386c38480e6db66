#include "worker/backend/cuda/collectives.h"

#include "absl/strings/str_cat.h"
#include "worker/backend/cuda/cuda_memory.h"
#include "worker/comm/cuda/device_communicator.h"

namespace lockstep::cuda {
namespace {

// A mark takes 2 us, a message of so much 90 and more.
constexpr size_t kLeastMarkedBytes = 8 << 20;

}  // namespace

absl::Status Collectives::Attach(Communicator* comm, int hidden, kernels::CollectiveClock* clock) {
  size_ = comm->size();
  comm_ = comm->device();
  clock_ = clock;
  gemv_exchange_ = {};
  if (size_ == 1) return absl::OkStatus();
  if (comm_ == nullptr) {
    return absl::InvalidArgumentError("the cuda backend needs a communicator of device memory");
  }
  if (has_peers()) {
    peers_ = *comm_->peers();
    peers_.clock = clock;
    gemv_exchange_.peers = peers_;
    gemv_exchange_.offset = comm_->gemv_offset();
    gemv_exchange_.width = hidden;
  }
  return absl::OkStatus();
}

bool Collectives::has_peers() const { return comm_ != nullptr && comm_->peers() != nullptr; }

bool Collectives::may_skip() const { return comm_ != nullptr && comm_->MaySkip(); }

absl::Status Collectives::AllReduce(const kernels::Launch& launch,
                                    const kernels::AllReduceArgs& args, bool* fused) {
  *fused = false;
  if (comm_->Skips()) return absl::OkStatus();
  Count(static_cast<size_t>(args.rows) * args.hidden * kernels::TypeBytes(args.type));
  if (has_peers()) {
    const kernels::AllReducePath path = kernels::ChooseAllReduce(args, comm_->layout(), size_);
    if (path != kernels::AllReducePath::kNone) {
      *fused = true;
      return ToStatus(kernels::AllReduce(launch, peers_, comm_->layout(), path, args),
                      "all-reduce");
    }
  }
  return SumByNccl(launch, args, kernels::TransferMark::kEnd);
}

kernels::ExchangePush Collectives::push_for(const kernels::AllReduceArgs& next) const {
  if (!has_peers() || may_skip() ||
      kernels::ChooseAllReduce(next, comm_->layout(), size_) == kernels::AllReducePath::kNone)
    return {};
  return kernels::OneShotPush(peers_, comm_->layout());
}

absl::Status Collectives::AllReduceAside(const kernels::Launch& launch,
                                         const kernels::AllReduceArgs& args) {
  if (comm_->Skips()) return absl::OkStatus();
  Count(static_cast<size_t>(args.rows) * args.hidden * kernels::TypeBytes(args.type));
  return SumByNccl(launch, args, kernels::TransferMark::kEndAside);
}

absl::Status Collectives::SumByNccl(const kernels::Launch& launch,
                                    const kernels::AllReduceArgs& args, kernels::TransferMark end) {
  const size_t count = static_cast<size_t>(args.rows) * args.hidden;
  const bool marked = count * kernels::TypeBytes(args.type) >= kLeastMarkedBytes;
  const auto mark = [&](kernels::TransferMark which) {
    if (!marked) return absl::OkStatus();
    return ToStatus(kernels::MarkTransfer(launch.stream, clock_, which), "all-reduce");
  };
  absl::Status status = mark(kernels::TransferMark::kBegin);
  if (status.ok()) {
    status = comm_->nccl()->AllReduceSum(args.type, args.in, const_cast<void*>(args.in), count,
                                         launch.stream);
  }
  if (status.ok()) status = mark(end);
  return status;
}

absl::Status Collectives::AllGather(const kernels::Launch& launch, const void* send, void* gathered,
                                    size_t bytes) {
  Count(bytes);
  if (has_peers() && bytes <= comm_->layout().gather_bytes) {
    return ToStatus(kernels::SmallAllGather(launch, peers_, comm_->layout(), send, gathered, bytes),
                    "all-gather");
  }
  return comm_->nccl()->AllGather(send, gathered, bytes, launch.stream);
}

absl::Status Collectives::Explain(const absl::Status& failure) const {
  if (comm_ == nullptr) return failure;
  const absl::Status fault = comm_->Fault();
  return fault.ok() ? failure : fault;
}

void Collectives::Count(size_t bytes) {
  ++stats_.count;
  stats_.bytes_sent += bytes;
}

}  // namespace lockstep::cuda
