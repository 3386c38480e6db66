// A child process of the launcher: started in a process group of its own (a
// Ctrl-C at the terminal reaches the launcher alone, which then ends its
// children in order) and killed by the kernel when the launcher dies first.
// Single-threaded use; the caller reaps.
#ifndef LOCKSTEP_CLI_CHILD_PROCESS_H_
#define LOCKSTEP_CLI_CHILD_PROCESS_H_

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace lockstep {

struct ChildOptions {
  bool stdout_to_stderr = false;  // keeps stdout for the word `ready`
  std::string log_path;           // when set: stdout and stderr go to this file
  int stderr_fd = -1;             // when set: what stderr is
  int keep_fd = -1;               // a descriptor to hand on, whose number ...
  std::string keep_fd_variable;   // ... this environment variable tells
};

// argv[0] is the path of the program. The child's signal mask is empty, and
// SIGPIPE ends it.
absl::StatusOr<pid_t> StartChild(const std::vector<std::string>& argv, const ChildOptions& options);

// "exit code 3", "signal 9 (Killed)".
std::string DescribeExit(int wait_status);

// The path of a program that is installed beside this one.
absl::StatusOr<std::string> SiblingProgram(const std::string& name);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_CHILD_PROCESS_H_
