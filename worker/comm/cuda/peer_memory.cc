#include "worker/comm/cuda/peer_memory.h"

#include <unistd.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/check.h"

namespace lockstep {
namespace {

using kernels::PeerFault;
using kernels::PeerWait;

// What the driver shares is whole pages: nothing else shall lie in them.
constexpr size_t kPageBytes = 2 << 20;

// Names a running host: ranks that agree on it can try to share memory.
std::string HostId() {
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  char name[256] = {};
  gethostname(name, sizeof(name) - 1);
  return absl::StrCat(boot, "/", name);
}

absl::Status CudaStatus(const std::string& what, cudaError_t error) {
  if (error == cudaSuccess) return absl::OkStatus();
  cudaGetLastError();  // not sticky: whoever looks next shall not find it
  return absl::UnavailableError(absl::StrCat(what, ": ", cudaGetErrorString(error)));
}

// Regions of closed epochs: a peer may still have them mapped, and to free
// exported memory before its importers have let go of it is undefined.
struct Retired {
  std::mutex mutex;
  std::vector<std::byte*> regions;

  static Retired& Get() {
    static Retired* const retired = new Retired;
    return *retired;
  }
  void Add(std::byte* region) {
    const std::lock_guard<std::mutex> lock(mutex);
    regions.push_back(region);
  }
  void Free(const std::vector<std::byte*>& which) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (std::byte* region : which) {
      std::erase(regions, region);
      cudaFree(region);
    }
  }
  std::vector<std::byte*> All() {
    const std::lock_guard<std::mutex> lock(mutex);
    return regions;
  }
};

std::string OfferKey(int rank) { return absl::StrCat("peer-memory/", rank); }
std::string MappedKey(int rank) { return absl::StrCat("peer-mapped/", rank); }

// "host bus-id bytes handle", or "none reason".
std::string Offer(const PeerMemory::Options& options, std::byte* own) {
  char bus[32] = {};
  cudaIpcMemHandle_t handle;
  absl::Status status =
      CudaStatus("device address", cudaDeviceGetPCIBusId(bus, sizeof(bus), options.device));
  if (status.ok()) status = CudaStatus("exporting memory", cudaIpcGetMemHandle(&handle, own));
  if (!status.ok()) return absl::StrCat("none ", std::string(status.message()));
  return absl::StrCat(HostId(), " ", bus, " ", options.bytes, " ",
                      absl::BytesToHexString({reinterpret_cast<char*>(&handle), sizeof(handle)}));
}

const char* WaitedFor(PeerWait code) {
  switch (code) {
    case PeerWait::kNothing:
      break;
    case PeerWait::kOneShot:
    case PeerWait::kScatter:
    case PeerWait::kGather:
    case PeerWait::kCopiedRows:
      return "all-reduce";
    case PeerWait::kSmallAllGather:
      return "all-gather";
    case PeerWait::kPushedPartial:
      return "all-reduce in a matrix kernel";
    case PeerWait::kOwnBlocks:
      return "kernel of a whole step";
  }
  return "exchange";
}

}  // namespace

struct PeerMemory::Mailbox {
  PeerFault fault;                 // the kernels write it
  std::atomic<uint32_t> abort{0};  // the kernels read it
};

// Of the first epoch nothing will change; later ones may be short of what the last one's region
// holds until they have heard from every rank, and succeed when tried again.
absl::Status PeerMemory::Shortage(size_t bytes) const {
  cudaGetLastError();
  size_t free_bytes = 0, total_bytes = 0;
  (void)cudaMemGetInfo(&free_bytes, &total_bytes);
  const std::string what =
      absl::StrCat("device ", options_.device, ": the exchange region of tensor parallelism takes ",
                   bytes >> 20, " MiB, but ", free_bytes >> 20, " MiB are free");
  if (!Retired::Get().All().empty()) return absl::UnavailableError(what);
  return absl::ResourceExhaustedError(
      absl::StrCat(what, "; a smaller --num-kv-blocks or --gpu-memory-utilization leaves room"));
}

absl::Status PeerMemory::Allocate(const Clear& clear) {
  const std::string device = absl::StrCat("device ", options_.device);
  if (absl::Status status = CudaStatus(device, cudaSetDevice(options_.device)); !status.ok()) {
    return status;
  }
  void* mailbox = nullptr;
  absl::Status status =
      CudaStatus("pinned memory", cudaHostAlloc(&mailbox, sizeof(Mailbox), cudaHostAllocMapped));
  if (!status.ok()) return status;
  mailbox_ = new (mailbox) Mailbox;
  static_assert(sizeof(mailbox_->abort) == sizeof(uint32_t));
  peers_.fault = &mailbox_->fault;
  peers_.abort = reinterpret_cast<const uint32_t*>(&mailbox_->abort);
  void* own = nullptr;
  const size_t flag = (options_.bytes + 255) / 256 * 256;  // behind the region
  const size_t whole = (flag + sizeof(uint32_t) + kPageBytes - 1) / kPageBytes * kPageBytes;
  const cudaError_t error = cudaMalloc(&own, whole);
  if (error == cudaErrorMemoryAllocation) return Shortage(whole);
  status = CudaStatus(absl::StrCat(device, ", an exchange region"), error);
  if (!status.ok()) return status;
  peers_.base[options_.rank] = static_cast<std::byte*>(own);
  peers_.aborted = reinterpret_cast<uint32_t*>(static_cast<std::byte*>(own) + flag);
  cudaStream_t stream = nullptr;
  status = CudaStatus(device, cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  if (!status.ok()) return status;
  status = CudaStatus("clearing an exchange region", clear(peers_.base[options_.rank], stream));
  if (status.ok()) {
    status = CudaStatus("clearing an exchange region",
                        cudaMemsetAsync(peers_.aborted, 0, sizeof(uint32_t), stream));
  }
  if (status.ok()) {
    status = CudaStatus("clearing an exchange region", cudaStreamSynchronize(stream));
  }
  cudaStreamDestroy(stream);
  return status;
}

std::string PeerMemory::Map(int peer, const std::string& offer) {
  const std::pair<std::string, std::string> none = absl::StrSplit(offer, absl::MaxSplits(' ', 1));
  if (none.first == "none") return none.second;
  const std::vector<std::string> words = absl::StrSplit(offer, ' ');
  cudaIpcMemHandle_t handle;
  if (words.size() != 4 || words[3].size() != 2 * sizeof(handle)) {
    return "its offer has another form: is it the same build?";
  }
  if (words[0] != HostId()) return "it is on another host";
  if (words[2] != absl::StrCat(options_.bytes)) {
    return absl::StrCat("its region has ", words[2], " bytes, not ", options_.bytes);
  }
  // A GPU that this process does not see (CUDA_VISIBLE_DEVICES) may be in reach all the same.
  int device = 0, reachable = 1;
  if (cudaDeviceGetByPCIBusId(&device, words[1].c_str()) != cudaSuccess) {
    cudaGetLastError();
  } else if (device == options_.device) {
    shares_device_ = true;
  } else if (cudaDeviceCanAccessPeer(&reachable, options_.device, device) != cudaSuccess ||
             reachable == 0) {
    cudaGetLastError();
    return absl::StrCat("its GPU ", words[1], " is out of this one's reach");
  }
  const std::string bytes = absl::HexStringToBytes(words[3]);
  std::memcpy(&handle, bytes.data(), sizeof(handle));
  void* base = nullptr;
  const absl::Status opened = CudaStatus(
      "mapping its memory", cudaIpcOpenMemHandle(&base, handle, cudaIpcMemLazyEnablePeerAccess));
  if (!opened.ok()) return std::string(opened.message());
  peers_.base[peer] = static_cast<std::byte*>(base);
  mapped_[peer] = true;
  return "";
}

absl::StatusOr<std::unique_ptr<PeerMemory>> PeerMemory::Join(const Options& options,
                                                             const Clear& clear,
                                                             AddressExchange& exchange) {
  LOCKSTEP_CHECK(options.rank >= 0 && options.rank < options.size);
  if (options.size > kernels::kMaxPeers) {
    return absl::UnimplementedError(
        absl::StrCat("peer memory: ", options.size, " ranks; at most ", kernels::kMaxPeers));
  }
  const std::vector<std::byte*> retired = Retired::Get().All();
  std::unique_ptr<PeerMemory> memory(new PeerMemory(options));
  memory->peers_.rank = options.rank;
  memory->peers_.size = options.size;
  // A rank that fails says so before it returns: the others must not wait for it.
  const absl::Status allocated = memory->Allocate(clear);
  const std::string offer = allocated.ok()
                                ? Offer(options, memory->peers_.base[options.rank])
                                : absl::StrCat("none ", std::string(allocated.message()));
  if (absl::Status said = exchange.Publish(OfferKey(options.rank), offer); !said.ok()) return said;

  std::string obstacle;
  for (int peer = 0; peer < options.size; ++peer) {
    if (peer == options.rank) continue;
    absl::StatusOr<std::string> theirs = exchange.Await(OfferKey(peer));
    if (!theirs.ok()) return theirs.status();
    if (!obstacle.empty() || !allocated.ok()) continue;
    const std::string why = memory->Map(peer, *theirs);
    if (!why.empty()) obstacle = absl::StrCat("rank ", peer, ": ", why);
  }
  // Every rank is in this epoch now, so none holds a region of an earlier one.
  Retired::Get().Free(retired);
  if (!allocated.ok()) obstacle = std::string(allocated.message());
  if (absl::Status said = exchange.Publish(MappedKey(options.rank), obstacle); !said.ok()) {
    return said;
  }
  if (!allocated.ok()) return allocated;
  for (int peer = 0; peer < options.size; ++peer) {
    if (peer == options.rank) continue;
    absl::StatusOr<std::string> theirs = exchange.Await(MappedKey(peer));
    if (!theirs.ok()) return theirs.status();
    if (obstacle.empty() && !theirs->empty()) {
      obstacle = absl::StrCat("seen from rank ", peer, ": ", *theirs);
    }
  }
  if (!obstacle.empty()) return absl::UnimplementedError(absl::StrCat("peer memory: ", obstacle));
  return memory;
}

PeerMemory::~PeerMemory() {
  (void)cudaSetDevice(options_.device);  // whatever thread lets go of it
  for (int peer = 0; peer < options_.size; ++peer) {
    if (mapped_[peer]) cudaIpcCloseMemHandle(peers_.base[peer]);
  }
  if (peers_.base[options_.rank] != nullptr) Retired::Get().Add(peers_.base[options_.rank]);
  cudaFreeHost(mailbox_);
}

void PeerMemory::Abort() { mailbox_->abort.store(1, std::memory_order_relaxed); }

absl::Status PeerMemory::Fault() const {
  PeerFault fault;
  std::memcpy(&fault, &mailbox_->fault, sizeof(fault));
  if (fault.code == PeerWait::kNothing) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat(WaitedFor(fault.code), " ", fault.exchange, " (phase ",
                   static_cast<uint32_t>(fault.code), ", block ", fault.block, "): rank ",
                   fault.rank, " did not come within ", peers_.patience_ns / 1'000'000, " ms"));
}

}  // namespace lockstep
