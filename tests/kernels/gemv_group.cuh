// A group of ranks for tests of the all-reduce that is folded into products
// (kernels/gemv.h): a region and a stream each, spread over the devices there are. On one
// device the ranks' grids run beside each other; Blocks keeps them small enough.
#ifndef LOCKSTEP_TESTS_KERNELS_GEMV_GROUP_CUH_
#define LOCKSTEP_TESTS_KERNELS_GEMV_GROUP_CUH_

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "kernels/gemv.h"
#include "tests/kernels/gemv_case.cuh"

namespace lockstep::kernels::testing {

// Before anything touches a device: each rank's stream needs a queue of its own.
inline const int kQueues = setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);

inline constexpr size_t kOffset = 512;  // of the exchange in a region

inline int Devices() {
  int devices = 0;
  EXPECT_CUDA(cudaGetDeviceCount(&devices));
  return devices;
}

// Ranks with a region and a stream each.
class Group {
 public:
  Group(int size, int width) : size_(size), width_(width), devices_(std::min(Devices(), size)) {
    EXPECT_CUDA(cudaHostAlloc(&fault_, sizeof(PeerFault), cudaHostAllocMapped));
    *fault_ = PeerFault{};
    for (int r = 0; r < size; ++r) {
      Use(r);
      EXPECT_CUDA(InitGemv());
      for (int d = 0; d < devices_; ++d) {
        if (d != r % devices_ && cudaDeviceEnablePeerAccess(d, 0) != cudaSuccess)
          cudaGetLastError();  // enabled already
      }
      const size_t bytes = GemvExchangeBytes(size, width);
      memory_.push_back(std::make_unique<Memory>(kOffset + bytes));
      peers_.base[r] = memory_.back()->get<std::byte>();
      EXPECT_CUDA(cudaMemset(peers_.base[r], 0, kOffset + bytes));
      streams_.push_back(nullptr);
      EXPECT_CUDA(cudaStreamCreateWithFlags(&streams_.back(), cudaStreamNonBlocking));
    }
    peers_.size = size;
    peers_.fault = fault_;
    for (int r = 0; r < size; ++r) {
      Use(r);
      const GemvExchange exchange = Exchange(r);
      EXPECT_CUDA(ClearGemvExchange(exchange, streams_[r]));
    }
    Synchronize();
  }
  ~Group() {
    for (int r = 0; r < size_; ++r) {
      Use(r);
      cudaStreamDestroy(streams_[r]);
      EXPECT_TRUE(memory_[r]->GuardsIntact());
      memory_[r].reset();
    }
    cudaFreeHost(fault_);
    cudaSetDevice(0);
  }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  void Use(int rank) const { EXPECT_CUDA(cudaSetDevice(rank % devices_)); }
  cudaStream_t stream(int rank) const { return streams_[rank]; }
  const PeerFault& fault() const { return *fault_; }
  bool device_each() const { return devices_ == size_; }
  GemvExchange Exchange(int rank) const {
    GemvExchange exchange;
    exchange.peers = peers_;
    exchange.peers.rank = rank;
    exchange.offset = kOffset;
    exchange.width = width_;
    return exchange;
  }
  void set_patience_ns(uint64_t ns) { peers_.patience_ns = ns; }
  // Blocks of a grid when `at_once` grids of each rank may run at a time.
  int Blocks(int at_once) const { return device_each() ? 0 : 132 * devices_ / size_ / at_once; }
  void Synchronize() const {
    for (int r = 0; r < size_; ++r) {
      Use(r);
      const cudaError_t error = cudaStreamSynchronize(streams_[r]);
      ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error) << "; exchange "
                                    << fault_->exchange << " missed rank " << fault_->rank;
    }
  }

 private:
  const int size_, width_, devices_;
  PeerFault* fault_ = nullptr;
  Peers peers_;
  std::vector<std::unique_ptr<Memory>> memory_;
  std::vector<cudaStream_t> streams_;
};

template <typename T>
std::unique_ptr<Memory> Upload(const std::vector<T>& values) {
  auto memory = std::make_unique<Memory>(values.size() * sizeof(T));
  memory->Write(values);
  return memory;
}

// One push and the reduction behind it, of a rank whose every input is `x`.
class OneRound {
 public:
  static constexpr int kWidth = 256;
  using T = __nv_bfloat16;

  OneRound(const Group& group, int rank, float x) : group_(group), rank_(rank) {
    group.Use(rank);
    push_.weights = Values(size_t{kWidth} * 64, 1.0f);
    push_.n = kWidth;
    push_.k = 64;
    push_.x = Values(64, x);
    push_.epilogue = GemvEpilogue::kPush;
    push_.max_blocks = group.Blocks(1);
    reduce_ = push_;
    reduce_.n = 64;
    reduce_.k = kWidth;
    reduce_.epilogue = GemvEpilogue::kStore;
    reduce_.prologue = GemvPrologue::kReduce;
    reduce_.norm_weight = Values(kWidth, 1.0f);
    reduce_.residual_in = Values(kWidth, 1.0f);
    reduce_.out = Values(64, 0.0f);
    reduce_.residual_out = Values(kWidth, 0.0f);
  }
  void Launch(uint32_t number, CollectiveClock* clock = nullptr) {
    group_.Use(rank_);
    GemvExchange exchange = group_.Exchange(rank_);
    exchange.peers.clock = clock;
    push_.exchange = reduce_.exchange = &exchange;
    push_.exchange_number = reduce_.exchange_number = number;
    EXPECT_CUDA(Gemv({group_.stream(rank_)}, push_));
    EXPECT_CUDA(Gemv({group_.stream(rank_)}, reduce_));
  }
  std::vector<T> Residual() const {
    group_.Use(rank_);
    return kept_.back()->Read<T>();
  }

 private:
  T* Values(size_t count, float v) {
    kept_.push_back(Upload(std::vector<T>(count, T(v))));
    return kept_.back()->get<T>();
  }
  const Group& group_;
  const int rank_;
  std::vector<std::unique_ptr<Memory>> kept_;
  GemvArgs push_, reduce_;
};

}  // namespace lockstep::kernels::testing

#endif  // LOCKSTEP_TESTS_KERNELS_GEMV_GROUP_CUH_
