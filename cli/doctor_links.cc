#include "cli/doctor_links.h"

#include <sys/wait.h>

#include <cerrno>
#include <cstdio>
#include <string>

#include "cli/child_process.h"

namespace lockstep {

int RunDoctorLinks() {
  const absl::StatusOr<std::string> program = SiblingProgram("lockstep-links");
  if (!program.ok()) {
    std::printf("--  %-18s no lockstep-links beside this program: built without LOCKSTEP_CUDA\n",
                "links");
    return 1;
  }
  std::fflush(stdout);
  const absl::StatusOr<pid_t> child = StartChild({*program}, {});
  if (!child.ok()) {
    std::printf("!!  %-18s %s\n", "links", std::string(child.status().message()).c_str());
    return 1;
  }
  int status = 0;
  while (waitpid(*child, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFEXITED(status)) return WEXITSTATUS(status) == 0 ? 0 : 1;
  std::printf("!!  %-18s lockstep-links ended with %s\n", "links", DescribeExit(status).c_str());
  return 1;
}

}  // namespace lockstep
