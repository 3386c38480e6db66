#include "cli/child_process.h"

#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>

#include "absl/strings/str_cat.h"
#include "common/supervisor_link.h"

namespace lockstep {
namespace {

[[noreturn]] void ExecChild(const std::vector<char*>& argv, const ChildOptions& options,
                            pid_t parent) {
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  signal(SIGPIPE, SIG_DFL);  // what is ignored stays so across exec
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  // The parent may have died before the line above took effect.
  if (getppid() != parent) _exit(1);
  if (!options.log_path.empty()) {
    const int log = open(options.log_path.c_str(), O_CREAT | O_WRONLY | O_APPEND, 0600);
    if (log < 0) _exit(126);
    dup2(log, STDERR_FILENO);
    dup2(log, STDOUT_FILENO);
  }
  unsetenv(kProgressBarsVariable);
  if (options.stderr_fd >= 0) {
    dup2(options.stderr_fd, STDERR_FILENO);
    setenv(kProgressBarsVariable, "1", 1);
  }
  if (options.stdout_to_stderr) dup2(STDERR_FILENO, STDOUT_FILENO);
  if (options.keep_fd >= 0) {
    fcntl(options.keep_fd, F_SETFD, 0);
    setenv(options.keep_fd_variable.c_str(), std::to_string(options.keep_fd).c_str(), 1);
  }
  execv(argv[0], argv.data());
  _exit(127);
}

}  // namespace

absl::StatusOr<pid_t> StartChild(const std::vector<std::string>& argv,
                                 const ChildOptions& options) {
  std::vector<char*> raw;
  raw.reserve(argv.size() + 1);
  for (const std::string& arg : argv) raw.push_back(const_cast<char*>(arg.c_str()));
  raw.push_back(nullptr);
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid < 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot start ", argv[0], ": ", strerror(errno)));
  }
  if (pid == 0) ExecChild(raw, options, parent);
  return pid;
}

std::string DescribeExit(int wait_status) {
  if (WIFSIGNALED(wait_status)) {
    const int number = WTERMSIG(wait_status);
    return absl::StrCat("signal ", number, " (", strsignal(number), ")");
  }
  return absl::StrCat("exit code ", WEXITSTATUS(wait_status));
}

absl::StatusOr<std::string> SiblingProgram(const std::string& name) {
  // Tests name the folder of the programs they were built with.
  if (const char* folder = std::getenv("LOCKSTEP_PROGRAMS"); folder != nullptr) {
    return absl::StrCat(folder, "/", name);
  }
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) return absl::InternalError("cannot read /proc/self/exe");
  const std::filesystem::path sibling = self.parent_path() / name;
  if (access(sibling.c_str(), X_OK) != 0) {
    return absl::NotFoundError(
        absl::StrCat(sibling.string(), " is missing: install it beside lockstep"));
  }
  return sibling.string();
}

}  // namespace lockstep
