#include "worker/comm/cuda/device_communicator.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/log.h"
#include "kernels/gemv.h"
#include "kernels/row_exchange.h"

namespace lockstep {
namespace {

// Of the current device.
std::optional<uint64_t> FreeBytes() {
  size_t free_bytes = 0, total_bytes = 0;
  if (cudaMemGetInfo(&free_bytes, &total_bytes) != cudaSuccess) return std::nullopt;
  return free_bytes;
}

}  // namespace

DeviceCommunicator::DeviceCommunicator(const CommunicatorOptions& options, int device)
    : options_(options), device_(device), layout_(kernels::DefaultExchangeLayout(options.size)) {
  gemv_offset_ = kernels::AlignedInRegion(layout_.offset +
                                          kernels::ExchangeRegionBytes(layout_, options.size));
  shared_offset_ = kernels::AlignedInRegion(
      gemv_offset_ + kernels::GemvExchangeBytes(options.size, kMaxGemvWidth));
}

DeviceCommunicator::~DeviceCommunicator() = default;

void DeviceCommunicator::Abort() {
  const std::lock_guard<std::mutex> lock(mutex_);
  aborted_ = true;
  if (nccl_ != nullptr) nccl_->Abort();
  if (peers_ != nullptr) peers_->Abort();
}

bool DeviceCommunicator::aborted() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return aborted_;
}

absl::Status DeviceCommunicator::Join(AddressExchange& exchange) {
  buffer_bytes_.reset();
  if (options_.size == 1) {
    buffer_bytes_ = 0;
    return absl::OkStatus();
  }
  if (cudaError_t error = cudaSetDevice(device_); error != cudaSuccess) {
    return absl::InternalError(absl::StrCat("GPU ", device_, ": ", cudaGetErrorString(error)));
  }
  const size_t gemv_bytes = kernels::GemvExchangeBytes(options_.size, kMaxGemvWidth);
  const PeerMemory::Options options = {.rank = options_.rank,
                                       .size = options_.size,
                                       .device = device_,
                                       .bytes = shared_offset_ + options_.shared_bytes};
  const auto clear = [&](std::byte* own, cudaStream_t stream) {
    cudaError_t error = kernels::ClearExchangeRegion(layout_, options_.size, own, stream);
    // All ones: nothing has arrived (kernels/gemv.h).
    if (error == cudaSuccess) {
      error = cudaMemsetAsync(own + gemv_offset_, 0xff, gemv_bytes, stream);
    }
    if (error == cudaSuccess && options_.shared_bytes > 0) {
      error = cudaMemsetAsync(own + shared_offset_, 0xff, options_.shared_bytes, stream);
    }
    if (error != cudaSuccess || options_.shared_bytes == 0) return error;
    return kernels::ClearRowExchange(own + shared_offset_, stream);
  };
  absl::StatusOr<std::unique_ptr<PeerMemory>> peers =
      options_.nccl_only ? absl::UnimplementedError("as this worker was told (--inject)")
                         : PeerMemory::Join(options, clear, exchange);
  if (peers.ok()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (aborted_) return absl::AbortedError("the communicator was aborted");
    peers_ = *std::move(peers);
    buffer_bytes_ = options.bytes;
    return absl::OkStatus();
  }
  if (!absl::IsUnimplemented(peers.status())) return peers.status();
  LogInfo(absl::StrCat("NCCL carries every collective: ", std::string(peers.status().message())));
  return JoinNccl(exchange);
}

absl::Status DeviceCommunicator::JoinNccl(AddressExchange& exchange) {
  absl::StatusOr<std::unique_ptr<NcclCommunicator>> nccl =
      NcclCommunicator::Create(options_, device_);
  if (!nccl.ok()) return nccl.status();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (aborted_) return absl::AbortedError("the communicator was aborted");
    nccl_ = *std::move(nccl);
  }
  // What an earlier epoch's region was is free again.
  const std::optional<uint64_t> before = FreeBytes();
  if (absl::Status joined = nccl_->Join(exchange); !joined.ok()) return joined;
  const std::optional<uint64_t> after = FreeBytes();
  if (before && after && *after <= *before) buffer_bytes_ = *before - *after;
  return absl::OkStatus();
}

std::string DeviceCollectiveLibrary() {
  const absl::StatusOr<const NcclLibrary*> nccl = NcclLibrary::Open();
  return nccl.ok() ? (*nccl)->version : std::string(nccl.status().message());
}

}  // namespace lockstep
