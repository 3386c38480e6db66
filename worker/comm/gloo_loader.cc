#include <dlfcn.h>
#include <gloo/config.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "worker/comm/gloo_communicator.h"
#include "worker/comm/gloo_plugin.h"

namespace lockstep {
namespace {

// A group of one, which has nobody to talk to; or one that can never be joined.
class LoneCommunicator : public RankCommunicator {
 public:
  explicit LoneCommunicator(absl::Status status) : status_(std::move(status)) {}
  absl::Status Join(AddressExchange& /*exchange*/) override { return status_; }
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::optional<uint64_t> buffer_bytes() const override { return 0; }
  absl::Status AllReduceSum(absl::Span<float> /*values*/) override { return Count(); }
  absl::Status Gather(absl::Span<const float> mine, absl::Span<float> all, int root) override {
    LOCKSTEP_CHECK(root == 0 && all.size() == mine.size());
    std::copy(mine.begin(), mine.end(), all.begin());
    return Count();
  }
  absl::Status Broadcast(absl::Span<std::byte> /*data*/, int /*root*/) override { return Count(); }
  absl::Status Barrier() override { return Count(); }
  void Abort() override { aborted_ = true; }

 private:
  absl::Status Count() {
    ++stats_.count;
    return aborted_ ? absl::AbortedError("the communicator was aborted") : status_;
  }
  const absl::Status status_;
  std::atomic<bool> aborted_ = false;
};

// The folder of the running program, without a slash at its end; empty: unknown.
std::string ProgramFolder() {
  char path[PATH_MAX];
  const ssize_t size = readlink("/proc/self/exe", path, sizeof(path));
  if (size <= 0) return "";
  const std::string_view whole(path, static_cast<size_t>(size));
  return std::string(whole.substr(0, whole.rfind('/')));
}

// Beside the program, in the lib or bin beside its folder, or where the system looks.
MakeGlooFunction LoadPlugin(std::string* why) {
  const std::string folder = ProgramFolder();
  for (const std::string& path :
       {absl::StrCat(folder, "/", kGlooPluginFile),
        absl::StrCat(folder, "/../lib/", kGlooPluginFile),
        absl::StrCat(folder, "/../bin/", kGlooPluginFile), std::string(kGlooPluginFile)}) {
    if (path[0] == '/' && access(path.c_str(), F_OK) != 0) continue;
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      *why = dlerror();
      continue;
    }
    if (void* const symbol = dlsym(library, kMakeGlooSymbol)) {
      return reinterpret_cast<MakeGlooFunction>(symbol);
    }
    *why = absl::StrCat(path, " is not of this build");
  }
  return nullptr;
}

}  // namespace

std::unique_ptr<RankCommunicator> MakeGlooCommunicator(const CommunicatorOptions& options) {
  if (options.size == 1) return std::make_unique<LoneCommunicator>(absl::OkStatus());
  static std::string why;
  static const MakeGlooFunction make = LoadPlugin(&why);
  if (make != nullptr) return std::unique_ptr<RankCommunicator>(make(&options));
  return std::make_unique<LoneCommunicator>(absl::FailedPreconditionError(
      absl::StrCat("several processes on the cpu backend need ", kGlooPluginFile,
                   " beside lockstep-worker, and the system's libgloo: ", why)));
}

std::string GlooVersion() {
  return absl::StrCat("gloo ", GLOO_VERSION_MAJOR, ".", GLOO_VERSION_MINOR, ".",
                      GLOO_VERSION_PATCH);
}

}  // namespace lockstep
