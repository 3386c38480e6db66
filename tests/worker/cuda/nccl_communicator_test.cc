// NCCL through our own seam; two processes and two GPUs (it takes no two ranks on
// one). With fewer, what can be seen of one rank.
#include "worker/comm/cuda/nccl_communicator.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "tests/worker/cuda/rank_processes.h"

namespace lockstep {
namespace {

using kernels::Type;
using std::chrono::milliseconds;
using testing::CountDevices;
using testing::RankProcess;
using testing::RunRanks;

CommunicatorOptions Options(const RankProcess& p) {
  CommunicatorOptions options;
  options.id = "test/e1";
  options.rank = p.rank;
  options.size = p.size;
  return options;
}

absl::StatusOr<std::unique_ptr<NcclCommunicator>> Joined(const RankProcess& p) {
  auto nccl = NcclCommunicator::Create(Options(p), p.device);
  RETURN_IF_BAD(nccl.status());
  RETURN_IF_BAD((*nccl)->Join(*p.exchange));
  return nccl;
}

// As many ranks as there are GPUs, at most four.
int GroupSize() { return std::max(1, std::min(4, CountDevices())); }

// Integers that change with the round: sums are exact.
float Value(int rank, int round, size_t i) {
  return static_cast<float>((i * 7 + static_cast<size_t>(rank) * 13 + round * 5) % 31) - 15.0f;
}

TEST(NcclCommunicatorTest, SumsFromOneElementTo64MiB) {
  EXPECT_EQ(
      RunRanks(
          GroupSize(),
          [](const RankProcess& p) -> absl::Status {
            auto nccl = Joined(p);
            RETURN_IF_BAD(nccl.status());
            RETURN_UNLESS(absl::StartsWith((*nccl)->version(), "NCCL 2."));
            // Multicast: a crash while it is in use can disable a host's GPUs.
            const char* multicast = std::getenv("NCCL_NVLS_ENABLE");
            RETURN_UNLESS(multicast != nullptr && std::string(multicast) == "0");
            cudaStream_t stream = nullptr;
            RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
            int round = 0;
            for (const size_t count :
                 {size_t{1}, size_t{1000}, size_t{1} << 20, size_t{16} << 20, size_t{77}}) {
              ++round;
              std::vector<float> values(count);
              for (size_t i = 0; i < count; ++i) values[i] = Value(p.rank, round, i);
              void* device = nullptr;
              RETURN_IF_CUDA_ERROR(cudaMalloc(&device, count * 4));
              RETURN_IF_CUDA_ERROR(cudaMemcpy(device, values.data(), count * 4, cudaMemcpyDefault));
              RETURN_IF_BAD((*nccl)->AllReduceSum(Type::kF32, device, device, count, stream));
              RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream));
              RETURN_IF_BAD((*nccl)->Check());
              RETURN_IF_CUDA_ERROR(cudaMemcpy(values.data(), device, count * 4, cudaMemcpyDefault));
              for (size_t i = 0; i < count; ++i) {
                float sum = 0;
                for (int r = 0; r < p.size; ++r) sum += Value(r, round, i);
                RETURN_UNLESS(values[i] == sum);
              }
              RETURN_IF_CUDA_ERROR(cudaFree(device));
            }
            RETURN_UNLESS((*nccl)->enqueued() == 5);
            return absl::OkStatus();
          }),
      "");
}

TEST(NcclCommunicatorTest, GathersAndBroadcastsInACapturedGraph) {
  EXPECT_EQ(
      RunRanks(
          GroupSize(),
          [](const RankProcess& p) -> absl::Status {
            auto nccl = Joined(p);
            RETURN_IF_BAD(nccl.status());
            cudaStream_t stream = nullptr;
            RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
            uint32_t *mine = nullptr, *all = nullptr, *sum = nullptr;
            for (uint32_t** b : {&mine, &all, &sum}) {
              RETURN_IF_CUDA_ERROR(cudaMallocHost(reinterpret_cast<void**>(b), 4096));
            }
            RETURN_IF_CUDA_ERROR(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
            RETURN_IF_BAD((*nccl)->AllGather(mine, all, 64, stream));
            RETURN_IF_BAD((*nccl)->AllReduceSum(Type::kF32, mine, sum, 16, stream));
            RETURN_IF_BAD((*nccl)->Broadcast(mine, 64, p.size - 1, stream));
            cudaGraph_t graph = nullptr;
            RETURN_IF_CUDA_ERROR(cudaStreamEndCapture(stream, &graph));
            cudaGraphExec_t exec = nullptr;
            RETURN_IF_CUDA_ERROR(cudaGraphInstantiate(&exec, graph, 0));
            for (int round = 0; round < 2000; ++round) {
              auto* floats = reinterpret_cast<float*>(mine);
              for (int i = 0; i < 16; ++i) floats[i] = Value(p.rank, round, i);
              RETURN_IF_CUDA_ERROR(cudaGraphLaunch(exec, stream));
              RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream));
              for (int i = 0; i < 16; ++i) {
                float expected = 0;
                for (int r = 0; r < p.size; ++r) {
                  RETURN_UNLESS(reinterpret_cast<float*>(all)[r * 16 + i] == Value(r, round, i));
                  expected += Value(r, round, i);
                }
                RETURN_UNLESS(reinterpret_cast<float*>(sum)[i] == expected);
                RETURN_UNLESS(floats[i] == Value(p.size - 1, round, i));
              }
            }
            RETURN_IF_CUDA_ERROR(cudaGraphExecDestroy(exec));
            RETURN_IF_CUDA_ERROR(cudaGraphDestroy(graph));
            return absl::OkStatus();
          }),
      "");
}

TEST(NcclCommunicatorTest, AbortEndsAWaitForAPeer) {
  if (CountDevices() < 2) return;  // nobody to wait for
  EXPECT_EQ(
      RunRanks(2,
               [](const RankProcess& p) -> absl::Status {
                 auto nccl = Joined(p);
                 RETURN_IF_BAD(nccl.status());
                 if (p.rank == 1) return p.exchange->Await("over").status();
                 float* data = nullptr;
                 RETURN_IF_CUDA_ERROR(cudaMalloc(reinterpret_cast<void**>(&data), 4096));
                 cudaStream_t stream = nullptr;
                 RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
                 RETURN_IF_BAD((*nccl)->AllReduceSum(Type::kF32, data, data, 1024, stream));
                 RETURN_UNLESS(cudaStreamQuery(stream) == cudaErrorNotReady);
                 const auto start = std::chrono::steady_clock::now();
                 (*nccl)->Abort();
                 RETURN_UNLESS((*nccl)->Released(NcclCommunicator::kAbortBound));
                 cudaStreamSynchronize(stream);
                 RETURN_UNLESS(std::chrono::steady_clock::now() - start < milliseconds(3000));
                 RETURN_UNLESS(absl::IsAborted((*nccl)->Check()));
                 RETURN_UNLESS(
                     absl::IsAborted((*nccl)->AllReduceSum(Type::kF32, data, data, 1024, stream)));
                 return p.exchange->Publish("over", "");
               }),
      "");
}

// NCCL lets go of a communicator when its graphs are gone, which another thread has to see to.
TEST(NcclCommunicatorTest, AnAbortThatWaitsForAGraphHoldsUpNoCall) {
  EXPECT_EQ(
      RunRanks(GroupSize(),
               [](const RankProcess& p) -> absl::Status {
                 auto nccl = Joined(p);
                 RETURN_IF_BAD(nccl.status());
                 float* data = nullptr;
                 RETURN_IF_CUDA_ERROR(cudaMalloc(reinterpret_cast<void**>(&data), 4096));
                 cudaStream_t stream = nullptr;
                 RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
                 RETURN_IF_CUDA_ERROR(
                     cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
                 RETURN_IF_BAD((*nccl)->AllReduceSum(Type::kF32, data, data, 1024, stream));
                 cudaGraph_t graph = nullptr;
                 RETURN_IF_CUDA_ERROR(cudaStreamEndCapture(stream, &graph));
                 cudaGraphExec_t exec = nullptr;
                 RETURN_IF_CUDA_ERROR(cudaGraphInstantiate(&exec, graph, 0));
                 RETURN_IF_CUDA_ERROR(cudaGraphLaunch(exec, stream));
                 RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream));
                 (*nccl)->Abort();
                 RETURN_UNLESS(
                     absl::IsAborted((*nccl)->AllReduceSum(Type::kF32, data, data, 1024, stream)));
                 RETURN_UNLESS(absl::IsAborted((*nccl)->Check()));
                 RETURN_IF_CUDA_ERROR(cudaGraphExecDestroy(exec));
                 RETURN_IF_CUDA_ERROR(cudaGraphDestroy(graph));
                 RETURN_UNLESS((*nccl)->Released(NcclCommunicator::kAbortBound));
                 return absl::OkStatus();
               }),
      "");
}

TEST(NcclCommunicatorTest, AbortEndsAJoinThatNobodyAnswers) {
  EXPECT_EQ(RunRanks(1,
                     [](const RankProcess& p) -> absl::Status {
                       CommunicatorOptions options = Options(p);
                       options.size = 2;
                       auto nccl = NcclCommunicator::Create(options, p.device);
                       RETURN_IF_BAD(nccl.status());
                       absl::Status joined;
                       std::thread joining([&] { joined = (*nccl)->Join(*p.exchange); });
                       // The id is out: from here on it waits for rank 1.
                       const absl::Status published = p.exchange->Await("nccl/id").status();
                       (*nccl)->Abort();
                       joining.join();
                       RETURN_IF_BAD(published);
                       RETURN_UNLESS(absl::IsAborted(joined));
                       RETURN_UNLESS((*nccl)->Released(NcclCommunicator::kAbortBound));
                       return absl::OkStatus();
                     }),
            "");
}

TEST(NcclCommunicatorTest, RefusesUseBeforeJoining) {
  EXPECT_EQ(RunRanks(1,
                     [](const RankProcess& p) -> absl::Status {
                       auto nccl = NcclCommunicator::Create(Options(p), p.device);
                       RETURN_IF_BAD(nccl.status());
                       RETURN_UNLESS(
                           absl::IsFailedPrecondition((*nccl)->Broadcast(nullptr, 4, 0, nullptr)));
                       RETURN_UNLESS(absl::IsInvalidArgument(
                           (*nccl)->AllReduceSum(Type::kE4M3, nullptr, nullptr, 4, nullptr)));
                       return absl::OkStatus();
                     }),
            "");
}

}  // namespace
}  // namespace lockstep
