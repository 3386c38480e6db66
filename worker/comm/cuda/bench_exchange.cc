// Times the own exchanges beside NCCL's, one process a GPU, in CUDA graphs:
//   bench_exchange [ranks]
// A line a message size (bfloat16), microseconds an exchange as rank 0 sees it,
// of exchanges back to back. "fused": rows of 4,096 with residual and norm, "f, n"
// with n blocks a row.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <optional>
#include <vector>

#include "absl/strings/numbers.h"
#include "kernels/all_reduce.h"
#include "tests/worker/cuda/rank_processes.h"
#include "worker/comm/cuda/nccl_communicator.h"
#include "worker/comm/cuda/peer_memory.h"

namespace lockstep {
namespace {

using kernels::AllReduceArgs;
using kernels::AllReducePath;
using kernels::ExchangeLayout;
using kernels::Launch;
using kernels::Type;
using testing::RankProcess;

constexpr size_t kLargest = 64 << 20;
constexpr ExchangeLayout kLayout{.one_shot_bytes = 8 << 20, .two_shot_bytes = 8 << 20};

constexpr int kHidden = 4096;
struct Column {
  const char* name;
  AllReducePath path;  // kNone: NCCL
  bool fused = false;  // rows of kHidden with residual and norm
  int blocks_per_row = 0;
  size_t largest = kLargest;
};
constexpr Column kColumns[] = {
    {"1-shot", AllReducePath::kOneShot, false, 0, 8 << 20},
    {"2-shot", AllReducePath::kTwoShot},
    {"1 fused", AllReducePath::kOneShot, true, 0, 8 << 20},
    {"1 f, 1", AllReducePath::kOneShot, true, 1, 1 << 20},
    {"1 f, 2", AllReducePath::kOneShot, true, 2, 1 << 20},
    {"1 f, 8", AllReducePath::kOneShot, true, 8, 1 << 20},
    {"2 fused", AllReducePath::kTwoShot, true},
    {"NCCL", AllReducePath::kNone},
};

// Exchanges of a graph: about a millisecond's.
int PerGraph(size_t bytes) { return bytes <= (1 << 20) ? 40 : 6; }

// Microseconds of one. The first replay brings the ranks together, the rest follow
// without a gap.
absl::StatusOr<double> Time(cudaStream_t stream, int per_graph,
                            const std::function<absl::Status()>& enqueue) {
  constexpr int kReplays = 8;
  RETURN_IF_CUDA_ERROR(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < per_graph; ++i) RETURN_IF_BAD(enqueue());
  cudaGraph_t graph = nullptr;
  RETURN_IF_CUDA_ERROR(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t exec = nullptr;
  RETURN_IF_CUDA_ERROR(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin = nullptr, end = nullptr;
  RETURN_IF_CUDA_ERROR(cudaEventCreate(&begin));
  RETURN_IF_CUDA_ERROR(cudaEventCreate(&end));
  float best = 0;
  for (int i = 0; i < 3; ++i) {
    RETURN_IF_CUDA_ERROR(cudaGraphLaunch(exec, stream));
    RETURN_IF_CUDA_ERROR(cudaEventRecord(begin, stream));
    for (int r = 0; r < kReplays; ++r) RETURN_IF_CUDA_ERROR(cudaGraphLaunch(exec, stream));
    RETURN_IF_CUDA_ERROR(cudaEventRecord(end, stream));
    RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream));
    float ms = 0;
    RETURN_IF_CUDA_ERROR(cudaEventElapsedTime(&ms, begin, end));
    if (i == 0 || ms < best) best = ms;
  }
  RETURN_IF_CUDA_ERROR(cudaGraphExecDestroy(exec));
  RETURN_IF_CUDA_ERROR(cudaGraphDestroy(graph));
  return best * 1000.0 / (per_graph * kReplays);
}

absl::Status Bench(const RankProcess& p) {
  absl::StatusOr<std::unique_ptr<PeerMemory>> peers = PeerMemory::Join(
      {.rank = p.rank,
       .size = p.size,
       .device = p.device,
       .bytes = ExchangeRegionBytes(kLayout, p.size)},
      [&](std::byte* own, cudaStream_t stream) {
        return ClearExchangeRegion(kLayout, p.size, own, stream);
      },
      *p.exchange);
  RETURN_IF_BAD(peers.status());
  RETURN_IF_CUDA_ERROR(kernels::InitAllReduce());
  CommunicatorOptions options;
  options.id = "bench";
  options.rank = p.rank;
  options.size = p.size;
  absl::StatusOr<std::unique_ptr<NcclCommunicator>> nccl =
      NcclCommunicator::Create(options, p.device);
  if (nccl.ok()) {
    RETURN_IF_BAD((*nccl)->Join(*p.exchange));
  } else if (p.rank == 0) {
    std::printf("without NCCL: %s\n", std::string(nccl.status().message()).c_str());
  }
  cudaStream_t stream = nullptr;
  RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  void *in = nullptr, *out = nullptr, *residual = nullptr, *weight = nullptr;
  for (void** buffer : {&in, &out, &residual, &weight}) {
    RETURN_IF_CUDA_ERROR(cudaMalloc(buffer, kLargest));
    RETURN_IF_CUDA_ERROR(cudaMemset(*buffer, 0, kLargest));
  }
  RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize());
  const Launch launch{stream, true};

  // Microseconds, or nothing where the column says nothing.
  const auto reduce = [&](size_t bytes, const Column& c) -> absl::StatusOr<std::optional<double>> {
    AllReduceArgs args;
    args.type = Type::kBF16;
    args.hidden = c.fused ? kHidden : static_cast<int>(bytes / 2);
    args.rows = c.fused ? static_cast<int>(bytes / (2 * kHidden)) : 1;
    args.in = in;
    args.out = out;
    args.blocks_per_row = c.blocks_per_row;
    if (c.fused) {
      args.residual = args.residual_out = residual;
      args.norm_weight = weight;
    }
    if (args.rows == 0 || bytes > c.largest) return std::nullopt;
    absl::StatusOr<double> us = Time(stream, PerGraph(bytes), [&]() -> absl::Status {
      if (c.path == AllReducePath::kNone) {
        return (*nccl)->AllReduceSum(Type::kBF16, in, out, bytes / 2, stream);
      }
      return testing::Cuda(AllReduce(launch, (*peers)->peers(), kLayout, c.path, args),
                           "all-reduce");
    });
    if (!us.ok()) {
      return absl::InternalError(absl::StrCat(std::string(us.status().message()), "; ",
                                              std::string((*peers)->Fault().message())));
    }
    return *us;
  };
  const bool print = p.rank == 0;
  if (print) {
    std::printf("%d ranks, %s; us an exchange\n%9s", p.size,
                nccl.ok() ? (*nccl)->version().c_str() : "no NCCL", "bytes");
    for (const Column& c : kColumns) std::printf(" %8s", c.name);
    std::printf("\n");
  }
  for (size_t bytes = 1024; bytes <= kLargest; bytes *= 2) {
    if (print) std::printf("%9zu", bytes);
    for (const Column& c : kColumns) {
      std::optional<double> us;
      if (c.path != AllReducePath::kNone || nccl.ok()) {
        auto timed = reduce(bytes, c);
        RETURN_IF_BAD(timed.status());
        us = *timed;
      }
      if (!print) continue;
      if (us) {
        std::printf(" %8.2f", *us);
      } else {
        std::printf(" %8s", "-");
      }
    }
    if (print) std::printf("\n");
  }
  for (const size_t bytes : {8, 64, 2048, 16384, 65536}) {
    auto timed = Time(stream, PerGraph(bytes), [&] {
      return testing::Cuda(SmallAllGather(launch, (*peers)->peers(), kLayout, in, out, bytes),
                           "all-gather");
    });
    RETURN_IF_BAD(timed.status());
    if (p.rank == 0) std::printf("small all-gather of %5zu bytes a rank: %.2f us\n", bytes, *timed);
  }
  std::fflush(stdout);
  // Nobody lets go of memory that another still writes.
  RETURN_IF_BAD(p.exchange->Publish(absl::StrCat("done/", p.rank), ""));
  for (int r = 0; r < p.size; ++r)
    RETURN_IF_BAD(p.exchange->Await(absl::StrCat("done/", r)).status());
  return absl::OkStatus();
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  int ranks = lockstep::testing::CountDevices();
  if (argc > 1 && !absl::SimpleAtoi(argv[1], &ranks)) ranks = 0;
  if (ranks < 1 || ranks > lockstep::kernels::kMaxPeers) {
    std::fprintf(stderr, "bench_exchange: needs GPUs, or a number of ranks up to 8\n");
    return 2;
  }
  const std::string failures = lockstep::testing::RunRanks(ranks, lockstep::Bench);
  std::fprintf(stderr, "%s", failures.c_str());
  return failures.empty() ? 0 : 1;
}
