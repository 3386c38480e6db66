// Memory that a GPU uses, owned; and CUDA's errors as ours.
#ifndef LOCKSTEP_WORKER_BACKEND_CUDA_CUDA_MEMORY_H_
#define LOCKSTEP_WORKER_BACKEND_CUDA_CUDA_MEMORY_H_

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lockstep::cuda {

// One line: what failed and CUDA's own words for it.
inline absl::Status ToStatus(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const std::string text = absl::StrCat(what, ": ", cudaGetErrorString(error));
  if (error == cudaErrorMemoryAllocation) return absl::ResourceExhaustedError(text);
  return absl::InternalError(text);
}

// Bytes that this process's Buffers hold on its device, as asked for. Any thread.
inline std::atomic<int64_t>& HeldDeviceBytes() {
  static std::atomic<int64_t> held = 0;
  return held;
}

// `count` elements on the current device, or pinned on the host and mapped into
// the device's addresses. Freed with the owner.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { Reset(); }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(device_, other.device_);
    std::swap(count_, other.count_);
    std::swap(pinned_, other.pinned_);
    return *this;
  }

  absl::Status Allocate(size_t count, const char* what) {
    Reset();
    void* data = nullptr;
    if (count == 0) return absl::OkStatus();
    absl::Status status =
        ToStatus(cudaMalloc(&data, count * sizeof(T)),
                 absl::StrCat("no GPU memory for ", what, " (", count * sizeof(T), " bytes)"));
    if (!status.ok()) {
      (void)cudaGetLastError();
      return status;
    }
    data_ = device_ = static_cast<T*>(data);
    count_ = count;
    HeldDeviceBytes() += static_cast<int64_t>(bytes());
    return absl::OkStatus();
  }

  absl::Status AllocateZeroed(size_t count, const char* what) {
    if (absl::Status status = Allocate(count, what); !status.ok() || count == 0) return status;
    return ToStatus(cudaMemset(data_, 0, bytes()), what);
  }

  absl::Status AllocatePinned(size_t count, const char* what) {
    Reset();
    void* data = nullptr;
    void* device = nullptr;
    if (count == 0) return absl::OkStatus();
    cudaError_t error = cudaHostAlloc(&data, count * sizeof(T), cudaHostAllocMapped);
    if (error == cudaSuccess) error = cudaHostGetDevicePointer(&device, data, 0);
    absl::Status status = ToStatus(error, absl::StrCat("no pinned memory for ", what));
    if (!status.ok()) return status;
    data_ = static_cast<T*>(data);
    device_ = static_cast<T*>(device);
    count_ = count;
    pinned_ = true;
    return absl::OkStatus();
  }

  void Reset() {
    if (data_ != nullptr && !pinned_) HeldDeviceBytes() -= static_cast<int64_t>(bytes());
    if (data_ != nullptr) (void)(pinned_ ? cudaFreeHost(data_) : cudaFree(data_));
    data_ = device_ = nullptr;
    count_ = 0;
    pinned_ = false;
  }

  T* get() const { return data_; }       // the host's address where pinned
  T* device() const { return device_; }  // the device's
  size_t count() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  T* data_ = nullptr;
  T* device_ = nullptr;
  size_t count_ = 0;
  bool pinned_ = false;
};

}  // namespace lockstep::cuda

#endif  // LOCKSTEP_WORKER_BACKEND_CUDA_CUDA_MEMORY_H_
