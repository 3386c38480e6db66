#include "worker/comm/cuda/nccl_communicator.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"

namespace lockstep {
namespace {

using Clock = std::chrono::steady_clock;

constexpr char kIdKey[] = "nccl/id";
constexpr std::chrono::milliseconds kLeastJoinBound{60'000};
constexpr std::chrono::milliseconds kEnqueueBound{30'000};
// What enqueueing takes; a sleep is longer than it.
constexpr std::chrono::microseconds kSpin{500};

std::optional<ncclDataType_t> DataType(kernels::Type type) {
  switch (type) {
    case kernels::Type::kF32:
      return ncclFloat32;
    case kernels::Type::kF16:
      return ncclFloat16;
    case kernels::Type::kBF16:
      return ncclBfloat16;
    case kernels::Type::kE4M3:
      break;
  }
  return std::nullopt;
}

}  // namespace

// calls guards `comm` and every NCCL call but the abort's own work; calls are
// short, except where NCCL hangs, and then Released says so.
struct NcclCommunicator::State {
  std::mutex calls;
  ncclComm_t comm = nullptr;
  std::atomic<bool> aborted{false};

  std::mutex mutex;  // guards `released`
  std::condition_variable changed;
  bool released = false;
};

absl::StatusOr<std::unique_ptr<NcclCommunicator>> NcclCommunicator::Create(
    const CommunicatorOptions& options, int device) {
  LOCKSTEP_CHECK(options.size >= 1 && options.rank >= 0 && options.rank < options.size);
  absl::StatusOr<const NcclLibrary*> nccl = NcclLibrary::Open();
  if (!nccl.ok()) return nccl.status();
  return std::unique_ptr<NcclCommunicator>(new NcclCommunicator(options, device, *nccl));
}

NcclCommunicator::NcclCommunicator(const CommunicatorOptions& options, int device,
                                   const NcclLibrary* nccl)
    : options_(options), device_(device), nccl_(nccl), state_(std::make_shared<State>()) {}

NcclCommunicator::~NcclCommunicator() {
  Abort();
  Released(kAbortBound);
}

absl::Status NcclCommunicator::Error(const char* what, ncclResult_t result) const {
  const std::string message = absl::StrCat(what, " of ", options_.id, ", rank ", options_.rank);
  if (state_->aborted) return absl::AbortedError(absl::StrCat(message, ": aborted"));
  // NCCL's text may end in line breaks or have several lines.
  std::string detail = nccl_->GetLastError(nullptr);
  detail = detail.substr(0, detail.find('\n'));
  return absl::UnavailableError(absl::StrCat(message, ": ", nccl_->GetErrorString(result),
                                             detail.empty() ? "" : "; ", detail));
}

absl::Status NcclCommunicator::Settle(const char* what, ncclResult_t result,
                                      Clock::time_point deadline) {
  auto pause = std::chrono::microseconds(5);
  const Clock::time_point spin_until = Clock::now() + kSpin;
  while (result == ncclInProgress) {
    if (state_->aborted) return Error(what, result);
    if (Clock::now() > deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat(what, " of ", options_.id, ", rank ", options_.rank,
                       ": NCCL did not finish in time; did every rank come?"));
    }
    if (Clock::now() > spin_until) {
      std::this_thread::sleep_for(pause);
      pause = std::min<std::chrono::microseconds>(2 * pause, std::chrono::milliseconds(2));
    }
    const ncclResult_t asked = nccl_->CommGetAsyncError(state_->comm, &result);
    if (asked != ncclSuccess) result = asked;
  }
  return result == ncclSuccess ? absl::OkStatus() : Error(what, result);
}

absl::Status NcclCommunicator::Join(AddressExchange& exchange) {
  static constexpr char kWhat[] = "joining NCCL";
  ncclUniqueId id = {};
  if (options_.rank == 0) {
    const ncclResult_t result = nccl_->GetUniqueId(&id);
    if (result != ncclSuccess) return Error(kWhat, result);
    absl::Status published =
        exchange.Publish(kIdKey, std::string(id.internal, sizeof(id.internal)));
    if (!published.ok()) return published;
  } else {
    absl::StatusOr<std::string> text = exchange.Await(kIdKey);
    if (!text.ok()) return text.status();
    if (text->size() != sizeof(id.internal)) {
      return absl::FailedPreconditionError(
          absl::StrCat(kWhat, " of ", options_.id, ": rank 0's id has ", text->size(),
                       " bytes, not ", sizeof(id.internal), ": is it the same build?"));
    }
    std::memcpy(id.internal, text->data(), text->size());
  }
  if (const cudaError_t error = cudaSetDevice(device_); error != cudaSuccess) {
    return absl::UnavailableError(
        absl::StrCat(kWhat, ", device ", device_, ": ", cudaGetErrorString(error)));
  }
  const Clock::time_point deadline =
      Clock::now() + std::max(kLeastJoinBound, std::chrono::milliseconds(options_.max_skew_ms));
  const std::lock_guard<std::mutex> lock(state_->calls);
  LOCKSTEP_CHECK(state_->comm == nullptr);
  if (state_->aborted) return Error(kWhat, ncclSuccess);
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  config.maxCTAs = kMaxBlocks;
  const ncclResult_t result =
      nccl_->CommInitRankConfig(&state_->comm, options_.size, id, options_.rank, &config);
  return Settle(kWhat, result, deadline);
}

// Not locked: it is aborted. Whoever aborts holds the lock until NCCL has let go, which it may do
// only once this thread has given up its step.
std::unique_lock<std::mutex> NcclCommunicator::LockCalls() {
  std::unique_lock<std::mutex> lock(state_->calls, std::try_to_lock);
  while (!lock.owns_lock() && !state_->aborted) {
    std::this_thread::sleep_for(std::chrono::microseconds(5));
    (void)lock.try_lock();
  }
  return lock;
}

template <typename Call>
absl::Status NcclCommunicator::Enqueue(const char* what, Call call) {
  const std::unique_lock<std::mutex> lock = LockCalls();
  if (!lock.owns_lock() || state_->aborted) return Error(what, ncclSuccess);
  if (state_->comm == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat(what, " of ", options_.id, ": not joined"));
  }
  ++enqueued_;
  return Settle(what, call(state_->comm), Clock::now() + kEnqueueBound);
}

absl::Status NcclCommunicator::AllReduceSum(kernels::Type type, const void* in, void* out,
                                            size_t count, cudaStream_t stream) {
  const std::optional<ncclDataType_t> data_type = DataType(type);
  if (!data_type) return absl::InvalidArgumentError("all-reduce: no sums in 8-bit types");
  return Enqueue("all-reduce", [&](ncclComm_t comm) {
    return nccl_->AllReduce(in, out, count, *data_type, ncclSum, comm, stream);
  });
}

absl::Status NcclCommunicator::AllGather(const void* in, void* out, size_t bytes,
                                         cudaStream_t stream) {
  return Enqueue("all-gather", [&](ncclComm_t comm) {
    return nccl_->AllGather(in, out, bytes, ncclUint8, comm, stream);
  });
}

absl::Status NcclCommunicator::Broadcast(void* data, size_t bytes, int root, cudaStream_t stream) {
  return Enqueue("broadcast", [&](ncclComm_t comm) {
    return nccl_->Broadcast(data, data, bytes, ncclUint8, root, comm, stream);
  });
}

absl::Status NcclCommunicator::Check() {
  static constexpr char kWhat[] = "a collective";
  const std::unique_lock<std::mutex> lock = LockCalls();
  if (!lock.owns_lock() || state_->aborted) return Error(kWhat, ncclSuccess);
  if (state_->comm == nullptr) return absl::OkStatus();
  ncclResult_t result = ncclSuccess;
  const ncclResult_t asked = nccl_->CommGetAsyncError(state_->comm, &result);
  if (asked != ncclSuccess) result = asked;
  return result == ncclSuccess || result == ncclInProgress ? absl::OkStatus()
                                                           : Error(kWhat, result);
}

void NcclCommunicator::Abort() {
  if (state_->aborted.exchange(true)) return;
  // A thread of its own, which outlives this object where NCCL hangs.
  std::thread([state = state_, nccl = nccl_] {
    {
      const std::lock_guard<std::mutex> lock(state->calls);
      if (state->comm != nullptr) nccl->CommAbort(std::exchange(state->comm, nullptr));
    }
    const std::lock_guard<std::mutex> lock(state->mutex);
    state->released = true;
    state->changed.notify_all();
  }).detach();
}

bool NcclCommunicator::Released(std::chrono::milliseconds bound) {
  std::unique_lock<std::mutex> lock(state_->mutex);
  return state_->changed.wait_for(lock, bound, [&] { return state_->released; });
}

}  // namespace lockstep
