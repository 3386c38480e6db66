#include "worker/backend/cuda/kernel_trace.h"

#include <cupti.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <time.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"

namespace lockstep::cuda {
namespace {

constexpr size_t kBufferBytes = 4 << 20;

struct Cupti {
#define LOCKSTEP_CUPTI_ENTRIES                   \
  LOCKSTEP_CUPTI(cuptiActivityEnable)            \
  LOCKSTEP_CUPTI(cuptiActivityDisable)           \
  LOCKSTEP_CUPTI(cuptiActivityFlushAll)          \
  LOCKSTEP_CUPTI(cuptiActivityGetNextRecord)     \
  LOCKSTEP_CUPTI(cuptiActivityRegisterCallbacks) \
  LOCKSTEP_CUPTI(cuptiActivityRegisterTimestampCallback)
// NOLINTBEGIN(bugprone-macro-parentheses): a name that is declared takes none.
#define LOCKSTEP_CUPTI(name) decltype(&::name) name = nullptr;
  // NOLINTEND(bugprone-macro-parentheses)
  LOCKSTEP_CUPTI_ENTRIES
#undef LOCKSTEP_CUPTI

  absl::Status Open() {
    void* library = nullptr;
    for (const char* path : {"libcupti.so.13", "/usr/local/cuda/extras/CUPTI/lib64/libcupti.so.13",
                             "/usr/local/cuda/lib64/libcupti.so.13"}) {
      library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
      if (library != nullptr) break;
    }
    if (library == nullptr) {
      return absl::NotFoundError(
          absl::StrCat("tracing kernels needs libcupti.so.13 (CUPTI of CUDA 13): ", dlerror()));
    }
// NOLINTBEGIN(bugprone-macro-parentheses): a name that is declared takes none.
#define LOCKSTEP_CUPTI(name)                                      \
  name = reinterpret_cast<decltype(name)>(dlsym(library, #name)); \
  if (name == nullptr) return absl::NotFoundError("libcupti.so.13 has no " #name);
    // NOLINTEND(bugprone-macro-parentheses)
    LOCKSTEP_CUPTI_ENTRIES
#undef LOCKSTEP_CUPTI
    return absl::OkStatus();
  }
};

// CUPTI's callbacks have no argument of ours.
struct Collected {
  std::mutex mutex;
  const Cupti* cupti = nullptr;
  std::vector<KernelRecord> records;
};
Collected& TheCollected() {
  static Collected* collected = new Collected;  // CUPTI may call until the process ends
  return *collected;
}

std::string ShortName(const char* mangled) {
  int status = 0;
  char* plain = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = status == 0 ? plain : mangled;
  std::free(plain);
  constexpr char kUnnamed[] = "(anonymous namespace)::";
  for (size_t at; (at = name.find(kUnnamed)) != std::string::npos;) {
    name.erase(at, sizeof(kUnnamed) - 1);
  }
  name = name.substr(0, name.find('('));
  const size_t arguments = name.find('<', name.find("::") == std::string::npos ? 0 : 1);
  if (arguments != std::string::npos && arguments > 0) name.resize(arguments);
  const size_t space = name.rfind(' ');
  return space == std::string::npos ? name : name.substr(space + 1);
}

uint64_t CUPTIAPI MonotonicNs() {
  timespec now = {};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(now.tv_nsec);
}

void CUPTIAPI GiveBuffer(uint8_t** buffer, size_t* size, size_t* max_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, kBufferBytes));
  *size = *buffer == nullptr ? 0 : kBufferBytes;
  *max_records = 0;
}

void CUPTIAPI TakeBuffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
  Collected& all = TheCollected();
  const std::lock_guard<std::mutex> lock(all.mutex);
  CUpti_Activity* record = nullptr;
  while (all.cupti->cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
    KernelRecord& to = all.records.emplace_back();
    if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
      const auto& kernel = *reinterpret_cast<const CUpti_ActivityKernel10*>(record);
      to.name = ShortName(kernel.name);
      to.begin_ns = kernel.start;
      to.end_ns = kernel.end;
      to.stream = kernel.streamId;
      to.grid = static_cast<uint32_t>(kernel.gridX * kernel.gridY * kernel.gridZ);
      to.block = static_cast<uint32_t>(kernel.blockX * kernel.blockY * kernel.blockZ);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      const auto& copy = *reinterpret_cast<const CUpti_ActivityMemcpy6*>(record);
      to.name = absl::StrCat("copy of ", copy.bytes, " bytes");
      to.begin_ns = copy.start;
      to.end_ns = copy.end;
      to.stream = copy.streamId;
      to.copy = true;
    } else {
      all.records.pop_back();
    }
  }
  std::free(buffer);
}

absl::Status Check(CUptiResult result, const char* what) {
  if (result == CUPTI_SUCCESS) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("CUPTI ", what, ": error ", static_cast<int>(result)));
}

}  // namespace

struct KernelTrace::Impl {
  Cupti cupti;
};

KernelTrace::KernelTrace(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
KernelTrace::~KernelTrace() { (void)Stop(); }

absl::StatusOr<std::unique_ptr<KernelTrace>> KernelTrace::Open() {
  auto impl = std::make_unique<Impl>();
  if (absl::Status status = impl->cupti.Open(); !status.ok()) return status;
  TheCollected().cupti = new Cupti(impl->cupti);  // for callbacks after this object's end
  absl::Status status =
      Check(impl->cupti.cuptiActivityRegisterTimestampCallback(MonotonicNs), "clock");
  if (status.ok()) {
    status = Check(impl->cupti.cuptiActivityRegisterCallbacks(GiveBuffer, TakeBuffer), "buffers");
  }
  if (!status.ok()) return status;
  return std::unique_ptr<KernelTrace>(new KernelTrace(std::move(impl)));
}

absl::Status KernelTrace::Start() {
  {
    const std::lock_guard<std::mutex> lock(TheCollected().mutex);
    TheCollected().records.clear();
  }
  absl::Status status =
      Check(impl_->cupti.cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL), "kernels");
  if (status.ok()) {
    status = Check(impl_->cupti.cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY), "copies");
  }
  return status;
}

absl::StatusOr<std::vector<KernelRecord>> KernelTrace::Stop() {
  absl::Status status = Check(impl_->cupti.cuptiActivityFlushAll(0), "flush");
  (void)impl_->cupti.cuptiActivityDisable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
  (void)impl_->cupti.cuptiActivityDisable(CUPTI_ACTIVITY_KIND_MEMCPY);
  if (!status.ok()) return status;
  std::vector<KernelRecord> records;
  {
    const std::lock_guard<std::mutex> lock(TheCollected().mutex);
    records.swap(TheCollected().records);
  }
  std::sort(records.begin(), records.end(),
            [](const KernelRecord& a, const KernelRecord& b) { return a.begin_ns < b.begin_ns; });
  return records;
}

}  // namespace lockstep::cuda
