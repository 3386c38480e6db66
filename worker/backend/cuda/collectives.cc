#include "worker/backend/cuda/collectives.h"

#include "absl/strings/str_cat.h"
#include "worker/backend/cuda/cuda_memory.h"
#include "worker/comm/cuda/device_communicator.h"

namespace lockstep::cuda {
namespace {

// A mark takes 2 us, a message of so much 90 and more.
constexpr size_t kLeastMarkedBytes = 8 << 20;

}  // namespace

absl::Status Collectives::Attach(Communicator* comm, int hidden, const SharedRows& shared,
                                 kernels::CollectiveClock* clock) {
  size_ = comm->size();
  comm_ = comm->device();
  clock_ = clock;
  gemv_exchange_ = {};
  row_exchange_ = {};
  row_reduce_ = {};
  row_exchange_number_ = 1;
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
    if (shared.bytes > 0 && comm_->shared_bytes() == shared.bytes) {
      row_exchange_ = {
          .peers = peers_, .offset = comm_->shared_offset(), .inbox_bytes = shared.inbox_bytes};
      absl::Status status = row_reduce_count_.AllocateZeroed(1, "a count of all-reduces");
      if (!status.ok()) return status;
      row_reduce_ = {.peers = peers_,
                     .offset = comm_->shared_offset() + shared.reduce,
                     .max_rows = shared.reduce_rows,
                     .row_bytes = shared.row_bytes,
                     .counter = row_reduce_count_.get()};
    }
  }
  return absl::OkStatus();
}

bool Collectives::has_peers() const { return comm_ != nullptr && comm_->peers() != nullptr; }

bool Collectives::shares_gpu() const { return comm_ != nullptr && comm_->shares_gpu(); }

bool Collectives::given_up() const { return comm_ != nullptr && comm_->aborted(); }

bool Collectives::may_skip() const { return comm_ != nullptr && comm_->MaySkip(); }

absl::Status Collectives::AllReduce(const kernels::Launch& launch,
                                    const kernels::AllReduceArgs& args, bool* fused) {
  *fused = false;
  if (comm_->Skips()) return absl::OkStatus();
  Count(static_cast<size_t>(args.rows) * args.hidden * kernels::TypeBytes(args.type));
  if (!has_peers()) return SumByNccl(launch, args, kernels::TransferMark::kEnd);
  kernels::AllReducePath path = kernels::ChooseAllReduce(args, comm_->layout(), size_);
  *fused = path != kernels::AllReducePath::kNone;
  kernels::AllReduceArgs sum = args;
  if (!*fused) {
    sum = {.type = args.type,
           .rows = args.rows,
           .hidden = args.hidden,
           .in = args.in,
           .out = const_cast<void*>(args.in)};
    path = kernels::ChooseAllReduce(sum, comm_->layout(), size_);
  }
  return ToStatus(kernels::AllReduce(launch, peers_, comm_->layout(), path, sum), "all-reduce");
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

kernels::RowShare Collectives::OwnRows(int rows) const {
  return kernels::ShareOf(rows, row_exchange_.peers.rank, size_);
}

std::byte* Collectives::shared(size_t offset) const {
  return peers_.base[peers_.rank] + row_exchange_.offset + offset;
}

absl::Status Collectives::SumOwnRows(cudaStream_t stream, kernels::Type type, int rows, int hidden,
                                     void* data) {
  leaves_out_ = comm_->Skips();
  if (leaves_out_) return absl::OkStatus();
  Count(static_cast<size_t>(rows) * hidden * kernels::TypeBytes(type));
  absl::Status status =
      ToStatus(kernels::MarkTransfer(stream, clock_, kernels::TransferMark::kBegin), "all-reduce");
  if (!status.ok()) return status;
  return ToStatus(kernels::SumRows(stream, row_exchange_,
                                   {.type = type,
                                    .rows = rows,
                                    .hidden = hidden,
                                    .data = data,
                                    .number = row_exchange_number_}),
                  "all-reduce");
}

absl::Status Collectives::GatherRows(cudaStream_t stream,
                                     absl::Span<const kernels::GatheredRows> arrays, int rows) {
  if (leaves_out_) return absl::OkStatus();
  absl::Status status =
      ToStatus(kernels::GatherRows(stream, row_exchange_, arrays.data(),
                                   static_cast<int>(arrays.size()), rows, row_exchange_number_),
               "all-reduce");
  row_exchange_number_ += 2;
  if (!status.ok()) return status;
  return ToStatus(kernels::MarkTransfer(stream, clock_, kernels::TransferMark::kEndAside),
                  "all-reduce");
}

absl::Status Collectives::ReduceRows(const kernels::Launch& launch,
                                     const kernels::RowReduceArgs& args) {
  if (comm_->Skips()) return absl::OkStatus();
  Count(static_cast<size_t>(args.rows) * args.hidden * kernels::TypeBytes(args.type));
  return ToStatus(kernels::ReduceRows(launch, row_reduce_, args), "all-reduce");
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
  if (has_peers()) {
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
