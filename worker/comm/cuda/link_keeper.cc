#include "worker/comm/cuda/link_keeper.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

// Spread over all links of a pair.
constexpr size_t kCopyBytes = 64 << 10;

}  // namespace

absl::StatusOr<std::unique_ptr<LinkKeeper>> LinkKeeper::Create(const kernels::Peers& peers,
                                                               int device) {
  std::unique_ptr<LinkKeeper> keeper(new LinkKeeper(peers, device));
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaStreamCreateWithFlags(&keeper->stream_, cudaStreamNonBlocking);
  }
  if (error == cudaSuccess) {
    error = cudaMalloc(reinterpret_cast<void**>(&keeper->scratch_), kCopyBytes);
  }
  if (error != cudaSuccess) {
    return absl::InternalError(
        absl::StrCat("keeping the links of GPU ", device, " awake: ", cudaGetErrorString(error)));
  }
  keeper->thread_ = std::thread([k = keeper.get()] { k->Run(); });
  return keeper;
}

LinkKeeper::~LinkKeeper() {
  Stop();
  if (thread_.joinable()) thread_.join();
  if (stream_ != nullptr) {
    (void)cudaStreamSynchronize(stream_);
    (void)cudaStreamDestroy(stream_);
  }
  if (scratch_ != nullptr) (void)cudaFree(scratch_);
}

void LinkKeeper::Touch() {
  touched_.store(Clock::now());
  if (!resting_.load()) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  wake_.notify_one();
}

void LinkKeeper::Stop() {
  const std::lock_guard<std::mutex> lock(mutex_);
  stopped_ = true;
  wake_.notify_one();
}

void LinkKeeper::Run() {
  if (cudaSetDevice(device_) != cudaSuccess) return;
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stopped_) {
    // Set before Rested() looks at the clock, as Touch writes it before it looks here.
    resting_ = true;
    wake_.wait(lock, [this] { return stopped_ || !Rested(); });
    resting_ = false;
    while (!wake_.wait_for(lock, kPeriod, [this] { return stopped_.load(); }) && !Rested()) {
      if (Clock::now() - touched_.load() > kPeriod && !CopyFromPeers()) return;
    }
  }
}

// False: the device has failed, or a peer's memory is gone; a step will say so.
bool LinkKeeper::CopyFromPeers() {
  const cudaError_t before = cudaStreamQuery(stream_);
  if (before == cudaErrorNotReady) return true;
  cudaError_t error = before;
  for (int rank = 0; rank < peers_.size && error == cudaSuccess; ++rank) {
    if (rank == peers_.rank) continue;
    error = cudaMemcpyAsync(scratch_, peers_.base[rank], kCopyBytes, cudaMemcpyDeviceToDevice,
                            stream_);
  }
  return error == cudaSuccess;
}

}  // namespace lockstep
