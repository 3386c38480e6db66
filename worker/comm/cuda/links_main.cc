// lockstep-links: how this host's GPUs reach each other, measured, and from which
// message on NCCL is faster than the own all-reduce; what `lockstep doctor
// --links` shows. One process drives all devices, so it tells what the hardware
// does, not whether processes may share memory.
//
// Exit code 0: every pair is in reach; 1: some are not; 2: no GPU, or a CUDA error.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "kernels/all_reduce.h"
#include "worker/comm/cuda/nccl_communicator.h"
#include "worker/comm/memory_exchange.h"

namespace lockstep {
namespace {

using kernels::AllReduceArgs;
using kernels::ExchangeLayout;
using kernels::Peers;

constexpr size_t kCopyBytes = 256 << 20;
constexpr size_t kExchangeBytes[] = {8 << 10, 64 << 10, 256 << 10, 1 << 20, 8 << 20, 64 << 20};
constexpr int kExchanges = 200;

// The first failing call ends the program.
void Check(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "lockstep-links: %s\n", std::string(status.message()).c_str());
  std::exit(2);
}
void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "lockstep-links: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

struct Device {
  int index = 0;
  cudaStream_t stream = nullptr;
  std::byte* region = nullptr;
  void* data = nullptr;
};

bool Reaches(int from, int to) {
  int can = 0;
  return cudaDeviceCanAccessPeer(&can, from, to) == cudaSuccess && can != 0;
}

// Without it a copy between two devices goes by way of the host.
void EnableReach(const std::vector<Device>& devices) {
  for (const Device& from : devices) {
    Check(cudaSetDevice(from.index), "device");
    for (const Device& to : devices) {
      if (from.index == to.index || !Reaches(from.index, to.index)) continue;
      Check(cudaDeviceEnablePeerAccess(to.index, 0), "peer access");
    }
  }
}

// GB/s of a copy over the link, the best of three.
double CopyRate(const Device& from, const Device& to) {
  Check(cudaSetDevice(from.index), "device");
  double best = 0;
  for (int i = 0; i < 3; ++i) {
    Check(cudaStreamSynchronize(from.stream), "copy");
    const auto start = std::chrono::steady_clock::now();
    Check(cudaMemcpyPeerAsync(to.data, to.index, from.data, from.index, kCopyBytes, from.stream),
          "copy");
    Check(cudaStreamSynchronize(from.stream), "copy");
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::max(best, kCopyBytes / took.count() / 1e9);
  }
  return best;
}

void PrintDevices(const std::vector<Device>& devices) {
  for (const Device& d : devices) {
    cudaDeviceProp properties;
    Check(cudaGetDeviceProperties(&properties, d.index), "device properties");
    char bus[32] = {};
    Check(cudaDeviceGetPCIBusId(bus, sizeof(bus), d.index), "device address");
    std::printf("GPU %d  %s, %.0f GiB, %s\n", d.index, properties.name,
                static_cast<double>(properties.totalGlobalMem) / (1 << 30), bus);
  }
}

// A row and a column a GPU. False: some pair is out of reach.
bool PrintPairs(const std::vector<Device>& devices) {
  bool all = true;
  std::printf("GB/s     ");
  for (const Device& to : devices) std::printf("   to %d", to.index);
  for (const Device& from : devices) {
    std::printf("\n  from %d ", from.index);
    for (const Device& to : devices) {
      if (from.index == to.index) {
        std::printf("      -");
      } else if (!Reaches(from.index, to.index)) {
        std::printf("   none");
        all = false;
      } else {
        std::printf("  %5.0f", CopyRate(from, to));
      }
    }
  }
  std::printf("\n");
  return all;
}

// What one device enqueues, and what it stands for when it fails.
using EnqueueOn = std::function<absl::Status(const Device& device)>;

// Microseconds of one exchange in a captured chain of `count`, replayed on every
// device at once; a thread each, since a call of NCCL may wait for the other ranks'.
double ReplayMicroseconds(std::vector<Device>& devices, int count, const EnqueueOn& enqueue) {
  constexpr int kReplays = 5;
  std::barrier<> together(static_cast<std::ptrdiff_t>(devices.size()));
  std::vector<double> best(devices.size(), 0);
  std::vector<std::thread> threads;
  threads.reserve(devices.size());
  for (const Device& d : devices) {
    threads.emplace_back([&together, &best, &enqueue, &d, count] {
      Check(cudaSetDevice(d.index), "device");
      Check(cudaStreamBeginCapture(d.stream, cudaStreamCaptureModeThreadLocal), "capture");
      for (int i = 0; i < count; ++i) Check(enqueue(d));
      cudaGraph_t graph = nullptr;
      cudaGraphExec_t exec = nullptr;
      Check(cudaStreamEndCapture(d.stream, &graph), "capture");
      Check(cudaGraphInstantiate(&exec, graph, 0), "graph");
      Check(cudaGraphDestroy(graph), "graph");
      Check(cudaGraphUpload(exec, d.stream), "graph");
      for (int i = 0; i < kReplays; ++i) {
        Check(cudaStreamSynchronize(d.stream), "all-reduce");
        together.arrive_and_wait();
        const auto start = std::chrono::steady_clock::now();
        Check(cudaGraphLaunch(exec, d.stream), "launch");
        Check(cudaStreamSynchronize(d.stream), "all-reduce");
        together.arrive_and_wait();
        const std::chrono::duration<double, std::micro> took =
            std::chrono::steady_clock::now() - start;
        double& least = best[static_cast<size_t>(d.index)];
        if (i == 0 || took.count() / count < least) least = took.count() / count;
      }
      Check(cudaGraphExecDestroy(exec), "graph");
    });
  }
  for (std::thread& thread : threads) thread.join();
  return *std::max_element(best.begin(), best.end());
}

// The own kernels' regions, one a device.
Peers MakeRegions(std::vector<Device>& devices, const ExchangeLayout& layout) {
  const int size = static_cast<int>(devices.size());
  Peers peers;
  peers.size = size;
  peers.patience_ns = 5'000'000'000;
  for (Device& d : devices) {
    Check(cudaSetDevice(d.index), "device");
    Check(kernels::InitAllReduce(), "kernels");
    void* region = nullptr;
    Check(cudaMalloc(&region, ExchangeRegionBytes(layout, size)), "memory");
    d.region = peers.base[d.index] = static_cast<std::byte*>(region);
    Check(ClearExchangeRegion(layout, size, d.region, d.stream), "memory");
    Check(cudaStreamSynchronize(d.stream), "memory");
  }
  return peers;
}

using NcclRanks = std::vector<std::unique_ptr<NcclCommunicator>>;

// As a server's workers would make them; or why there are none.
absl::StatusOr<NcclRanks> JoinNccl(const std::vector<Device>& devices) {
  NcclRanks ranks;
  for (const Device& d : devices) {
    CommunicatorOptions options;
    options.id = "links";
    options.rank = d.index;
    options.size = static_cast<int>(devices.size());
    absl::StatusOr<std::unique_ptr<NcclCommunicator>> nccl =
        NcclCommunicator::Create(options, d.index);
    if (!nccl.ok()) return nccl.status();
    ranks.push_back(*std::move(nccl));
  }
  MemoryExchange exchange;
  std::vector<absl::Status> joined(ranks.size());
  std::vector<std::thread> threads;
  threads.reserve(ranks.size());
  for (size_t r = 0; r < ranks.size(); ++r) {
    threads.emplace_back([&, r] {
      joined[r] = ranks[r]->Join(exchange);
      if (!joined[r].ok()) exchange.Cancel();
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& status : joined) {
    if (!status.ok()) return status;
  }
  return ranks;
}

std::string SizeName(size_t bytes) {
  return bytes < (1 << 20) ? absl::StrCat(bytes >> 10, " KiB") : absl::StrCat(bytes >> 20, " MiB");
}

// Own kernels beside NCCL, and from which size on it is the faster.
void PrintExchanges(std::vector<Device>& devices) {
  const int size = static_cast<int>(devices.size());
  const ExchangeLayout layout = kernels::DefaultExchangeLayout(size);
  const Peers peers = MakeRegions(devices, layout);
  const absl::StatusOr<NcclRanks> nccl = JoinNccl(devices);
  if (!nccl.ok()) std::printf("without NCCL: %s\n", std::string(nccl.status().message()).c_str());
  std::printf("all-reduce among %d GPUs, us  %8s  %s\n", size, "own",
              nccl.ok() ? nccl->front()->version().c_str() : "");
  std::string slower_from;  // of the sizes up to the largest, without a gap
  for (const size_t bytes : kExchangeBytes) {
    const int count = bytes <= (1 << 20) ? kExchanges : kExchanges / 10;
    const double own = ReplayMicroseconds(devices, count, [&](const Device& d) {
      Peers mine = peers;
      mine.rank = d.index;
      AllReduceArgs args;
      args.rows = 1;
      args.hidden = static_cast<int>(bytes / 2);
      args.in = args.out = d.data;
      const cudaError_t error = AllReduce({d.stream, true}, mine, layout,
                                          ChooseAllReduce(args, layout, peers.size), args);
      return error == cudaSuccess ? absl::OkStatus()
                                  : absl::InternalError(cudaGetErrorString(error));
    });
    std::printf("%26s  %8.1f", SizeName(bytes).c_str(), own);
    if (nccl.ok()) {
      const double theirs = ReplayMicroseconds(devices, count, [&](const Device& d) {
        return (*nccl)[static_cast<size_t>(d.index)]->AllReduceSum(kernels::Type::kBF16, d.data,
                                                                   d.data, bytes / 2, d.stream);
      });
      std::printf("  %8.1f", theirs);
      if (own <= theirs) slower_from.clear();
      if (own > theirs && slower_from.empty()) slower_from = SizeName(bytes);
    }
    std::printf("\n");
  }
  if (nccl.ok()) {
    std::printf("%s\n", slower_from.empty()
                            ? "the own kernels are the faster at each of these sizes"
                            : absl::StrCat("NCCL is the faster from ", slower_from, " on").c_str());
  }
}

int Main() {
  // Ranks wait for each other inside kernels, and one that is loaded when first used
  // would wait for its device.
  setenv("CUDA_MODULE_LOADING", "EAGER", /*overwrite=*/1);
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    std::fprintf(stderr, "lockstep-links: %s\n",
                 error != cudaSuccess ? cudaGetErrorString(error) : "no GPU");
    return 2;
  }
  std::vector<Device> devices(std::min(count, kernels::kMaxPeers));
  for (size_t i = 0; i < devices.size(); ++i) {
    devices[i].index = static_cast<int>(i);
    Check(cudaSetDevice(devices[i].index), "device");
    Check(cudaStreamCreateWithFlags(&devices[i].stream, cudaStreamNonBlocking), "stream");
    Check(cudaMalloc(&devices[i].data, kCopyBytes), "memory");
    Check(cudaMemset(devices[i].data, 0, kCopyBytes), "memory");
    Check(cudaDeviceSynchronize(), "memory");
  }
  PrintDevices(devices);
  if (devices.size() == 1) return 0;
  EnableReach(devices);
  const bool all = PrintPairs(devices);
  if (all) {
    PrintExchanges(devices);
  } else {
    std::printf("some GPUs cannot reach each other: NCCL carries everything between them\n");
  }
  return all ? 0 : 1;
}

}  // namespace
}  // namespace lockstep

int main() { return lockstep::Main(); }
