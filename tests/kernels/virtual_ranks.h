// A group of ranks in one process, for tests of kernels that exchange: a region
// and a stream each, spread over the devices there are. On one device the grids
// of all ranks run beside each other; BlocksAtOnce keeps them small enough.
#ifndef LOCKSTEP_TESTS_KERNELS_VIRTUAL_RANKS_H_
#define LOCKSTEP_TESTS_KERNELS_VIRTUAL_RANKS_H_

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/all_reduce.h"
#include "tests/kernels/sanitizer_run.h"

namespace lockstep::kernels::testing {

#define ASSERT_CUDA(expression)                                                                  \
  do {                                                                                           \
    const cudaError_t cuda_error = (expression);                                                 \
    ASSERT_EQ(cuda_error, cudaSuccess) << #expression << ": " << cudaGetErrorString(cuda_error); \
  } while (false)

// Before anything touches a device: each rank's stream needs a queue of its own.
inline const int kQueues = setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);

// Device memory with 256 guard bytes on either side.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    EXPECT_EQ(cudaMalloc(&base_, bytes + 2 * kGuard), cudaSuccess);
    EXPECT_EQ(cudaMemset(base_, kPoison, bytes + 2 * kGuard), cudaSuccess);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);  // other streams do not wait for it
  }
  Guarded(Guarded&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)), bytes_(other.bytes_) {}
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { cudaFree(base_); }

  void* get() const { return base_ + kGuard; }
  size_t bytes() const { return bytes_; }
  template <typename T>
  void Set(const std::vector<T>& values) {
    ASSERT_LE(values.size() * sizeof(T), bytes_);
    ASSERT_CUDA(
        cudaMemcpy(get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    ASSERT_CUDA(cudaDeviceSynchronize());
  }
  template <typename T>
  std::vector<T> Get() const {
    std::vector<T> values(bytes_ / sizeof(T));
    EXPECT_EQ(cudaMemcpy(values.data(), get(), values.size() * sizeof(T), cudaMemcpyDeviceToHost),
              cudaSuccess);
    return values;
  }
  bool GuardsIntact() const {
    std::vector<unsigned char> all(bytes_ + 2 * kGuard);
    EXPECT_EQ(cudaMemcpy(all.data(), base_, all.size(), cudaMemcpyDeviceToHost), cudaSuccess);
    for (size_t i = 0; i < kGuard; ++i) {
      if (all[i] != kPoison || all[kGuard + bytes_ + i] != kPoison) return false;
    }
    return true;
  }

  static constexpr unsigned char kPoison = 0xA5;

 private:
  static constexpr size_t kGuard = 256;
  std::byte* base_ = nullptr;
  size_t bytes_;
};

class VirtualRanks {
 public:
  VirtualRanks(int size, const ExchangeLayout& layout) : size_(size), layout_(layout) {
    EXPECT_EQ(cudaGetDeviceCount(&devices_), cudaSuccess);
    devices_ = std::min(devices_, size);
    EXPECT_EQ(cudaHostAlloc(&fault_, sizeof(PeerFault), cudaHostAllocMapped), cudaSuccess);
    if (fault_ == nullptr) std::abort();  // an earlier test has lost the context
    *fault_ = PeerFault{};
    for (int r = 0; r < size; ++r) {
      Use(r);
      for (int d = 0; d < devices_; ++d) {
        // Once for a process: memcheck reports a second time.
        static bool enabled[kMaxPeers][kMaxPeers] = {};
        bool& done = enabled[r % devices_][d];
        if (d == r % devices_ || done) continue;
        EXPECT_EQ(cudaDeviceEnablePeerAccess(d, 0), cudaSuccess);
        done = true;
      }
      EXPECT_EQ(InitAllReduce(), cudaSuccess);
      EXPECT_EQ(cudaMalloc(&peers_.base[r], layout.offset + ExchangeRegionBytes(layout, size)),
                cudaSuccess);
      cudaStream_t stream = nullptr;
      EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
      streams_.push_back(stream);
      EXPECT_EQ(ClearExchangeRegion(layout, size, peers_.base[r], stream), cudaSuccess);
    }
    Synchronize();
    peers_.size = size;
    peers_.fault = fault_;
    cudaDeviceProp properties;
    EXPECT_EQ(cudaGetDeviceProperties(&properties, 0), cudaSuccess);
    // Of the most register-hungry kernel 512 fit; the rest is for what comes next in a stream.
    threads_at_once_ = properties.multiProcessorCount * 384 / ((size + devices_ - 1) / devices_);
  }
  ~VirtualRanks() {
    for (int r = 0; r < size_; ++r) {
      Use(r);
      cudaStreamDestroy(streams_[r]);
      cudaFree(peers_.base[r]);
    }
    cudaFreeHost(fault_);
    cudaSetDevice(0);
  }
  VirtualRanks(const VirtualRanks&) = delete;
  VirtualRanks& operator=(const VirtualRanks&) = delete;

  int size() const { return size_; }
  const ExchangeLayout& layout() const { return layout_; }
  Peers peers(int rank) const {
    Peers peers = peers_;
    peers.rank = rank;
    return peers;
  }
  Launch launch(int rank, bool pdl = false) const { return {streams_[rank], pdl}; }
  const PeerFault& fault() const { return *fault_; }
  void set_patience_ns(uint64_t ns) { peers_.patience_ns = ns; }
  // The device of a rank becomes the current one.
  void Use(int rank) const { EXPECT_EQ(cudaSetDevice(rank % devices_), cudaSuccess); }
  // What a rank's grid may have so that all run at once.
  int BlocksAtOnce(int threads_per_block) const { return threads_at_once_ / threads_per_block; }
  void Synchronize() const {
    for (int r = 0; r < size_; ++r) {
      Use(r);
      const cudaError_t error = cudaStreamSynchronize(streams_[r]);
      ASSERT_EQ(error, cudaSuccess)
          << cudaGetErrorString(error) << "; waiting: code " << static_cast<int>(fault_->code)
          << ", exchange " << fault_->exchange << ", for rank " << fault_->rank << ", block "
          << fault_->block;
    }
  }
  // Of the devices too: a fill or a copy is on a stream that the ranks' do not wait for.
  void SynchronizeDevices() const {
    for (int r = 0; r < size_; ++r) {
      Use(r);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    }
  }
  // Of a process made for it, in which rank 0 waits for one that never comes: says how that
  // ended, and ends it. The trap has taken the context.
  [[noreturn]] void ReportFault() const {
    Use(0);
    const bool failed = cudaStreamSynchronize(launch(0).stream) != cudaSuccess;
    std::fprintf(stderr, "failed %d code %d exchange %u rank %u\n", failed,
                 static_cast<int>(fault_->code), fault_->exchange, fault_->rank);
    std::fflush(stderr);
    std::_Exit(0);
  }

 private:
  const int size_;
  const ExchangeLayout layout_;
  int devices_ = 1;
  int threads_at_once_ = 0;
  PeerFault* fault_ = nullptr;
  Peers peers_;
  std::vector<cudaStream_t> streams_;
};

}  // namespace lockstep::kernels::testing

#endif  // LOCKSTEP_TESTS_KERNELS_VIRTUAL_RANKS_H_
