// lockstep-links: how this host's GPUs reach each other, measured; what
// `lockstep doctor --links` shows. One process drives all devices, so it tells
// what the hardware does, not whether processes may share memory.
//
// Exit code 0: every pair is in reach; 1: some are not; 2: no GPU, or a CUDA error.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels/all_reduce.h"

namespace lockstep {
namespace {

using kernels::AllReduceArgs;
using kernels::ExchangeLayout;
using kernels::Peers;

constexpr size_t kCopyBytes = 256 << 20;
constexpr int kExchanges = 200;

// The first failing call ends the program.
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
  cudaGraphExec_t graph = nullptr;
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

// Replays a captured chain of exchanges on every device at once.
double ExchangeMicroseconds(std::vector<Device>& devices, const ExchangeLayout& layout,
                            const Peers& peers, size_t bytes) {
  for (Device& d : devices) {
    Check(cudaSetDevice(d.index), "device");
    Check(cudaStreamBeginCapture(d.stream, cudaStreamCaptureModeThreadLocal), "capture");
    Peers mine = peers;
    mine.rank = d.index;
    AllReduceArgs args;
    args.rows = 1;
    args.hidden = static_cast<int>(bytes / 2);
    args.in = args.out = d.data;
    for (int i = 0; i < kExchanges; ++i) {
      Check(AllReduce({d.stream, true}, mine, layout, ChooseAllReduce(args, layout, peers.size),
                      args),
            "all-reduce");
    }
    cudaGraph_t graph = nullptr;
    Check(cudaStreamEndCapture(d.stream, &graph), "capture");
    Check(cudaGraphInstantiate(&d.graph, graph, 0), "graph");
    Check(cudaGraphDestroy(graph), "graph");
  }
  double best = 0;
  for (int i = 0; i < 5; ++i) {
    const auto start = std::chrono::steady_clock::now();
    for (const Device& d : devices) {
      Check(cudaSetDevice(d.index), "device");
      Check(cudaGraphLaunch(d.graph, d.stream), "launch");
    }
    for (const Device& d : devices) {
      Check(cudaSetDevice(d.index), "device");
      Check(cudaStreamSynchronize(d.stream), "all-reduce");
    }
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
    if (i == 0 || took.count() / kExchanges < best) best = took.count() / kExchanges;
  }
  for (Device& d : devices) Check(cudaGraphExecDestroy(d.graph), "graph");
  return best;
}

void PrintExchanges(std::vector<Device>& devices) {
  const int size = static_cast<int>(devices.size());
  const ExchangeLayout layout = kernels::DefaultExchangeLayout(size);
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
  for (const size_t bytes :
       {size_t{8} << 10, size_t{64} << 10, size_t{256} << 10, size_t{1} << 20}) {
    std::printf("all-reduce of %4zu KiB among %d GPUs: %.1f us\n", bytes >> 10, size,
                ExchangeMicroseconds(devices, layout, peers, bytes));
  }
}

int Main() {
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
