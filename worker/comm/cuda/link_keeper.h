// Keeps the links between GPUs awake for a while after each step. Idle NVLinks go to
// sleep within milliseconds and take 4 ms to wake (H200): a request that comes after
// a short pause would wait for that in its first all-reduce.
//
// A thread of its own copies a few bytes from every peer now and then, on a stream of
// its own, while no step does as much; kAwake after the last step it rests.
#ifndef LOCKSTEP_WORKER_COMM_CUDA_LINK_KEEPER_H_
#define LOCKSTEP_WORKER_COMM_CUDA_LINK_KEEPER_H_

#include <cuda_runtime_api.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "absl/status/statusor.h"
#include "kernels/peers.h"

namespace lockstep {

class LinkKeeper {
 public:
  static constexpr std::chrono::microseconds kPeriod{500};
  static constexpr std::chrono::seconds kAwake{2};

  // `peers` stay mapped until this is gone.
  static absl::StatusOr<std::unique_ptr<LinkKeeper>> Create(const kernels::Peers& peers,
                                                            int device);
  ~LinkKeeper();
  LinkKeeper(const LinkKeeper&) = delete;
  LinkKeeper& operator=(const LinkKeeper&) = delete;

  // A step is enqueued. Cheap; any thread.
  void Touch();
  // Not a copy more. Any thread.
  void Stop();

 private:
  using Clock = std::chrono::steady_clock;

  LinkKeeper(const kernels::Peers& peers, int device) : peers_(peers), device_(device) {}
  void Run();
  bool Rested() const { return Clock::now() - touched_.load() > kAwake; }
  bool CopyFromPeers();

  const kernels::Peers peers_;
  const int device_;
  cudaStream_t stream_ = nullptr;
  std::byte* scratch_ = nullptr;
  std::atomic<Clock::time_point> touched_{Clock::time_point()};
  std::atomic<bool> resting_ = false;
  std::atomic<bool> stopped_ = false;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::thread thread_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_COMM_CUDA_LINK_KEEPER_H_
