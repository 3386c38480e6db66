#include "worker/comm/cuda/nccl_library.h"

#include <dlfcn.h>

#include <cstdlib>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

constexpr int kOldestVersion = 21800;  // non-blocking communicators that abort while joining

template <typename Function>
bool Find(void* handle, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  return *function != nullptr;
}

absl::StatusOr<NcclLibrary> Load() {
  setenv("NCCL_NVLS_ENABLE", "0", 1);
  setenv("NCCL_RUNTIME_CONNECT", "0", 0);
  void* handle = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    return absl::NotFoundError(
        absl::StrCat("NCCL: ", dlerror(),
                     "; install libnccl2 or name its folder in LD_LIBRARY_PATH (needed for tensor "
                     "parallelism over GPUs)"));
  }
  NcclLibrary nccl;
  if (!Find(handle, "ncclGetVersion", &nccl.GetVersion) ||
      !Find(handle, "ncclGetUniqueId", &nccl.GetUniqueId) ||
      !Find(handle, "ncclCommInitRankConfig", &nccl.CommInitRankConfig) ||
      !Find(handle, "ncclCommGetAsyncError", &nccl.CommGetAsyncError) ||
      !Find(handle, "ncclCommAbort", &nccl.CommAbort) ||
      !Find(handle, "ncclGetErrorString", &nccl.GetErrorString) ||
      !Find(handle, "ncclGetLastError", &nccl.GetLastError) ||
      !Find(handle, "ncclAllReduce", &nccl.AllReduce) ||
      !Find(handle, "ncclAllGather", &nccl.AllGather) ||
      !Find(handle, "ncclBroadcast", &nccl.Broadcast)) {
    return absl::FailedPreconditionError(
        absl::StrCat("NCCL: ", dlerror(), "; version 2.18 or newer is needed"));
  }
  int version = 0;
  if (nccl.GetVersion(&version) != ncclSuccess || version < kOldestVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("NCCL: version code ", version, " is too old; 2.18 or newer is needed"));
  }
  nccl.version =
      absl::StrCat("NCCL ", version / 10000, ".", version / 100 % 100, ".", version % 100);
  return nccl;
}

}  // namespace

absl::StatusOr<const NcclLibrary*> NcclLibrary::Open() {
  static const absl::StatusOr<NcclLibrary>* const library = new absl::StatusOr<NcclLibrary>(Load());
  if (!library->ok()) return library->status();
  return &**library;
}

}  // namespace lockstep
