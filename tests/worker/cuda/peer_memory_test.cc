// Ranks as processes that map each other's memory. With one GPU they share it
// and take turns; with more, the words travel over the link between them.
#include "worker/comm/cuda/peer_memory.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_replace.h"
#include "kernels/all_reduce.h"
#include "tests/kernels/exchange_rounds.h"
#include "tests/worker/cuda/rank_processes.h"

namespace lockstep {
namespace {

// A kernel that is loaded when first launched waits for the device, which may be
// waiting for a peer.
[[maybe_unused]] const bool kLoadedEagerly = setenv("CUDA_MODULE_LOADING", "EAGER", 1) == 0;

using kernels::ClearExchangeRegion;
using kernels::ExchangeRegionBytes;
using kernels::Launch;
using kernels::Type;
using kernels::testing::EnqueueRounds;
using kernels::testing::kRoundsLayout;
using kernels::testing::RoundsBuffers;
using kernels::testing::RoundsProgress;
using testing::CountDevices;
using testing::RankProcess;
using testing::RunRanks;

absl::StatusOr<std::unique_ptr<PeerMemory>> JoinRounds(const RankProcess& p,
                                                       AddressExchange& exchange) {
  return PeerMemory::Join(
      {.rank = p.rank,
       .size = p.size,
       .device = p.device,
       .bytes = ExchangeRegionBytes(kRoundsLayout, p.size) + 256},
      [&](std::byte* own, cudaStream_t stream) {
        return ClearExchangeRegion(kRoundsLayout, p.size, own, stream);
      },
      exchange);
}

absl::Status Allocate(RoundsBuffers* b) {
  for (void** buffer : {&b->in, &b->residual, &b->out}) {
    RETURN_IF_CUDA_ERROR(cudaMalloc(buffer, RoundsBuffers::kBytes));
  }
  RETURN_IF_CUDA_ERROR(cudaMalloc(&b->weight, RoundsBuffers::kWeightBytes));
  RETURN_IF_CUDA_ERROR(cudaMemset(b->weight, 0x3F, RoundsBuffers::kWeightBytes));
  void* progress = nullptr;
  RETURN_IF_CUDA_ERROR(cudaMalloc(&progress, sizeof(RoundsProgress)));
  RETURN_IF_CUDA_ERROR(cudaMemset(progress, 0, sizeof(RoundsProgress)));
  b->progress = static_cast<RoundsProgress*>(progress);
  RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize());  // other streams do not wait for the above
  return absl::OkStatus();
}

// Replays captured rounds until `replays` are done and says what was counted.
absl::StatusOr<RoundsProgress> Replay(const PeerMemory& memory, Type type, bool pdl, int threads,
                                      int replays) {
  RoundsBuffers buffers;
  RETURN_IF_BAD(Allocate(&buffers));
  cudaStream_t stream = nullptr;
  RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  RETURN_IF_CUDA_ERROR(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  int rounds = 0;
  RETURN_IF_CUDA_ERROR(EnqueueRounds(Launch{stream, pdl}, memory.peers(), kRoundsLayout, type,
                                     threads, buffers, &rounds));
  cudaGraph_t graph = nullptr;
  RETURN_IF_CUDA_ERROR(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t exec = nullptr;
  RETURN_IF_CUDA_ERROR(cudaGraphInstantiate(&exec, graph, 0));
  for (int i = 0; i < replays; ++i) RETURN_IF_CUDA_ERROR(cudaGraphLaunch(exec, stream));
  if (const cudaError_t error = cudaStreamSynchronize(stream); error != cudaSuccess) {
    return absl::InternalError(
        absl::StrCat(cudaGetErrorString(error), ": ", std::string(memory.Fault().message())));
  }
  RoundsProgress progress{};
  RETURN_IF_CUDA_ERROR(
      cudaMemcpy(&progress, buffers.progress, sizeof(progress), cudaMemcpyDeviceToHost));
  RETURN_IF_CUDA_ERROR(cudaGraphExecDestroy(exec));
  RETURN_IF_CUDA_ERROR(cudaGraphDestroy(graph));
  RETURN_IF_CUDA_ERROR(cudaStreamDestroy(stream));
  for (void* buffer : {buffers.in, buffers.residual, buffers.out, buffers.weight,
                       static_cast<void*>(buffers.progress)}) {
    RETURN_IF_CUDA_ERROR(cudaFree(buffer));
  }
  RETURN_UNLESS(progress.round == static_cast<unsigned long long>(rounds) * replays);
  return progress;
}

// Ranks of one GPU take turns of milliseconds: few rounds there.
int Replays(int size, int devices) {
  if (std::getenv("LOCKSTEP_SANITIZER_RUN") != nullptr) return 1;
  return devices >= size ? 400 : 3;
}

std::vector<int> Sizes(int devices) {
  std::vector<int> sizes = {2};
  for (const int size : {3, 4, 8}) {
    if (devices >= size) sizes.push_back(size);
  }
  return sizes;
}

TEST(PeerMemoryTest, CarriesExchangesBetweenProcesses) {
  const int devices = CountDevices();
  for (const int size : Sizes(devices)) {
    const int threads = 64 << 10;
    EXPECT_EQ(RunRanks(size,
                       [&](const RankProcess& p) -> absl::Status {
                         auto memory = JoinRounds(p, *p.exchange);
                         RETURN_IF_BAD(memory.status());
                         unsigned long long digests = 0;
                         for (const bool pdl : {false, true}) {
                           for (const Type type : {Type::kBF16, Type::kF32}) {
                             auto progress =
                                 Replay(**memory, type, pdl, threads, Replays(size, devices));
                             RETURN_IF_BAD(progress.status());
                             RETURN_UNLESS(progress->errors == 0);
                             digests = digests * 31 + progress->digest;
                           }
                         }
                         RETURN_IF_BAD((*memory)->Fault());
                         // The same bits on every rank.
                         RETURN_IF_BAD(p.exchange->Publish(absl::StrCat("digest/", p.rank),
                                                           absl::StrCat(digests)));
                         auto first = p.exchange->Await("digest/0");
                         RETURN_UNLESS(*first == absl::StrCat(digests));
                         return absl::OkStatus();
                       }),
              "")
        << size << " ranks on " << devices << " GPUs";
  }
}

// Passes keys on with a prefix: an epoch of its own.
class EpochExchange final : public AddressExchange {
 public:
  EpochExchange(AddressExchange* inner, std::string prefix)
      : inner_(inner), prefix_(std::move(prefix)) {}
  absl::Status Publish(const std::string& key, const std::string& value) override {
    return inner_->Publish(prefix_ + key, value);
  }
  absl::StatusOr<std::string> Await(const std::string& key) override {
    return inner_->Await(prefix_ + key);
  }
  void Cancel() override { inner_->Cancel(); }

 private:
  AddressExchange* const inner_;
  const std::string prefix_;
};

TEST(PeerMemoryTest, GivesBackTheRegionsOfEarlierEpochs) {
  EXPECT_EQ(RunRanks(2,
                     [&](const RankProcess& p) -> absl::Status {
                       size_t free_first = 0, free_last = 0, total = 0;
                       for (int epoch = 0; epoch < 12; ++epoch) {
                         EpochExchange exchange(p.exchange, absl::StrCat("e", epoch, "/"));
                         auto memory = PeerMemory::Join(
                             {.rank = p.rank, .size = 2, .device = p.device, .bytes = 64 << 20},
                             [&](std::byte* own, cudaStream_t stream) {
                               return cudaMemsetAsync(own, 0, 64, stream);
                             },
                             exchange);
                         RETURN_IF_BAD(memory.status());
                         if (epoch == 1) RETURN_IF_CUDA_ERROR(cudaMemGetInfo(&free_first, &total));
                       }
                       RETURN_IF_CUDA_ERROR(cudaMemGetInfo(&free_last, &total));
                       // One GPU of two ranks holds two of each; ten epochs would be 640 MiB.
                       RETURN_UNLESS(free_last + (256 << 20) > free_first);
                       return absl::OkStatus();
                     }),
            "");
}

// Rewrites what rank 1 offers.
class RewritingExchange final : public AddressExchange {
 public:
  explicit RewritingExchange(AddressExchange* inner, bool rewrite)
      : inner_(inner), rewrite_(rewrite) {}
  absl::Status Publish(const std::string& key, const std::string& value) override {
    return inner_->Publish(key, rewrite_ && absl::StrContains(key, "memory")
                                    ? absl::StrCat("another-", value)
                                    : value);
  }
  absl::StatusOr<std::string> Await(const std::string& key) override { return inner_->Await(key); }
  void Cancel() override { inner_->Cancel(); }

 private:
  AddressExchange* const inner_;
  const bool rewrite_;
};

TEST(PeerMemoryTest, AllRanksDoWithoutItWhenOneIsOnAnotherHost) {
  EXPECT_EQ(
      RunRanks(2,
               [&](const RankProcess& p) -> absl::Status {
                 RewritingExchange exchange(p.exchange, p.rank == 1);
                 auto memory = JoinRounds(p, exchange);
                 RETURN_UNLESS(absl::IsUnimplemented(memory.status()));
                 RETURN_UNLESS(absl::StrContains(memory.status().message(), "on another host"));
                 return absl::OkStatus();
               }),
      "");
}

TEST(PeerMemoryTest, AFailureOnOneRankIsKnownToAll) {
  EXPECT_EQ(RunRanks(2,
                     [&](const RankProcess& p) -> absl::Status {
                       auto memory = PeerMemory::Join(
                           {.rank = p.rank, .size = 2, .device = p.device, .bytes = 1 << 20},
                           [&](std::byte* own, cudaStream_t stream) {
                             return p.rank == 0 ? cudaErrorInvalidValue
                                                : cudaMemsetAsync(own, 0, 64, stream);
                           },
                           *p.exchange);
                       RETURN_UNLESS(p.rank == 0 ? absl::IsUnavailable(memory.status())
                                                 : absl::IsUnimplemented(memory.status()));
                       RETURN_UNLESS(absl::StrContains(memory.status().message(), "clearing"));
                       return absl::OkStatus();
                     }),
            "");
}

TEST(PeerMemoryTest, NamesTheRankThatAKernelMissed) {
  if (std::getenv("LOCKSTEP_SANITIZER_RUN") != nullptr) return;  // a trap is a report there
  EXPECT_EQ(
      RunRanks(2,
               [&](const RankProcess& p) -> absl::Status {
                 auto memory = JoinRounds(p, *p.exchange);
                 RETURN_IF_BAD(memory.status());
                 RETURN_IF_BAD((*memory)->Fault());
                 if (p.rank == 0) {
                   kernels::Peers peers = (*memory)->peers();
                   peers.patience_ns = 50'000'000;
                   void* words = nullptr;
                   RETURN_IF_CUDA_ERROR(cudaMalloc(&words, 4096));
                   RETURN_IF_CUDA_ERROR(SmallAllGather({}, peers, kRoundsLayout, words,
                                                       static_cast<std::byte*>(words) + 1024, 64));
                   RETURN_UNLESS(cudaDeviceSynchronize() != cudaSuccess);
                   const absl::Status fault = (*memory)->Fault();
                   RETURN_UNLESS(absl::IsUnavailable(fault));
                   RETURN_UNLESS(absl::StrContains(fault.message(), "rank 1 did not come"));
                   return p.exchange->Publish("over", "");
                 }
                 return p.exchange->Await("over").status();
               }),
      "");
}

TEST(PeerMemoryTest, AbortEndsEveryWaitAndKeepsTheContext) {
  EXPECT_EQ(
      RunRanks(2,
               [&](const RankProcess& p) -> absl::Status {
                 auto memory = JoinRounds(p, *p.exchange);
                 RETURN_IF_BAD(memory.status());
                 if (p.rank == 1) return p.exchange->Await("over").status();
                 RoundsBuffers buffers;
                 RETURN_IF_BAD(Allocate(&buffers));
                 cudaStream_t stream = nullptr;
                 RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
                 int rounds = 0;
                 for (int i = 0; i < 2; ++i) {
                   RETURN_IF_CUDA_ERROR(EnqueueRounds(Launch{stream, true}, (*memory)->peers(),
                                                      kRoundsLayout, Type::kBF16, 64 << 10, buffers,
                                                      &rounds));
                 }
                 RETURN_UNLESS(cudaStreamQuery(stream) == cudaErrorNotReady);
                 const auto start = std::chrono::steady_clock::now();
                 (*memory)->Abort();
                 RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream));
                 RETURN_UNLESS(std::chrono::steady_clock::now() - start < std::chrono::seconds(1));
                 RETURN_IF_BAD((*memory)->Fault());
                 RETURN_IF_CUDA_ERROR(cudaMemset(buffers.in, 0, 64));
                 RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize());
                 return p.exchange->Publish("over", "");
               }),
      "");
}

}  // namespace
}  // namespace lockstep
