// Runs a body in one forked process a rank, each with a GPU of its own if there
// are enough. The parent never touches CUDA: a forked context is unusable.
#ifndef LOCKSTEP_TESTS_WORKER_CUDA_RANK_PROCESSES_H_
#define LOCKSTEP_TESTS_WORKER_CUDA_RANK_PROCESSES_H_

#include <cuda_runtime_api.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "tests/fakes/exchanges.h"
#include "tests/fakes/temp_dir.h"

namespace lockstep::testing {

struct RankProcess {
  int rank = 0, size = 1;
  int device = 0;
  AddressExchange* exchange = nullptr;
};

// Asked in a child.
inline int CountDevices() {
  const pid_t child = fork();
  if (child == 0) {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    std::_Exit(count);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

// "" or what the ranks that failed had to say.
inline std::string RunRanks(int size, const std::function<absl::Status(const RankProcess&)>& body) {
  const int devices = CountDevices();
  if (devices == 0) return "no GPU";
  const TempDir folder;
  std::vector<pid_t> children;
  for (int rank = 0; rank < size; ++rank) {
    const pid_t child = fork();
    if (child == 0) {
      fakes::FileExchange exchange(folder.path());
      const absl::Status status = body({rank, size, rank % devices, &exchange});
      exchange.Publish(absl::StrCat("outcome/", rank), std::string(status.message())).IgnoreError();
      std::_Exit(status.ok() ? 0 : 1);
    }
    children.push_back(child);
  }
  // One that fails leaves the others waiting for it: they end with it.
  std::string failures;
  for (size_t left = children.size(); left > 0;) {
    int status = 0;
    const pid_t child = waitpid(-1, &status, 0);
    const auto at = std::find(children.begin(), children.end(), child);
    if (at == children.end()) continue;
    --left;
    *at = 0;
    if ((WIFEXITED(status) && WEXITSTATUS(status) == 0) || !failures.empty()) continue;
    const auto rank = at - children.begin();
    fakes::FileExchange exchange(folder.path());
    failures =
        absl::StrCat("rank ", rank, ": ",
                     WIFEXITED(status) ? *exchange.Await(absl::StrCat("outcome/", rank))
                                       : absl::StrCat("killed by signal ", WTERMSIG(status)));
    for (const pid_t other : children) {
      if (other != 0) kill(other, SIGKILL);
    }
  }
  return failures;
}

// For bodies: absl::Status of a CUDA call.
inline absl::Status Cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": ", cudaGetErrorString(error)));
}

#define RETURN_IF_CUDA_ERROR(call)                                       \
  do {                                                                   \
    absl::Status cuda_status = ::lockstep::testing::Cuda((call), #call); \
    if (!cuda_status.ok()) return cuda_status;                           \
  } while (false)
#define RETURN_IF_BAD(expression)            \
  do {                                       \
    absl::Status bad_status = (expression);  \
    if (!bad_status.ok()) return bad_status; \
  } while (false)
#define RETURN_UNLESS(condition)                                                    \
  do {                                                                              \
    if (!(condition))                                                               \
      return absl::InternalError(absl::StrCat("line ", __LINE__, ": " #condition)); \
  } while (false)

}  // namespace lockstep::testing

#endif  // LOCKSTEP_TESTS_WORKER_CUDA_RANK_PROCESSES_H_
