// The supervisor at a terminal, over small shell scripts in place of the daemons.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "cli/supervisor.h"

namespace lockstep {
namespace {

std::vector<std::string> Shell(const std::string& script) { return {"/bin/sh", "-c", script}; }

// Runs the supervisor in a process whose stderr is a terminal of ours.
class SupervisorTerminalTest : public ::testing::Test {
 protected:
  void Launch(const SupervisorOptions& options) {
    terminal_ = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    ASSERT_GE(terminal_, 0);
    ASSERT_EQ(grantpt(terminal_), 0);
    ASSERT_EQ(unlockpt(terminal_), 0);
    const char* const name = ptsname(terminal_);
    ASSERT_NE(name, nullptr);
    const int side = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
    ASSERT_GE(side, 0);
    pid_ = fork();
    ASSERT_GE(pid_, 0);
    if (pid_ == 0) {
      dup2(side, STDERR_FILENO);
      _exit(RunSupervisor(options));
    }
    close(side);
  }
  void TearDown() override {
    if (pid_ > 0) kill(pid_, SIGKILL), waitpid(pid_, nullptr, 0);
    if (terminal_ >= 0) close(terminal_);
  }

  // Reads until `text` has come, in what has come since the start.
  bool Shows(const std::string& text) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!absl::StrContains(seen_, text)) {
      pollfd fd = {terminal_, POLLIN, 0};
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
          until - std::chrono::steady_clock::now());
      if (left.count() <= 0 || poll(&fd, 1, static_cast<int>(left.count())) <= 0) return false;
      char bytes[4096];
      const ssize_t size = read(terminal_, bytes, sizeof(bytes));
      if (size <= 0) return false;
      seen_.append(bytes, static_cast<size_t>(size));
    }
    return true;
  }

  pid_t pid_ = 0;
  int terminal_ = -1;
  std::string seen_;
};

// A bar that stands until the script ends.
std::string Bar(const std::string& text) {
  return "printf '\\r" + text + "\\033[K' >&2; exec sleep 60";
}

TEST_F(SupervisorTerminalTest, EveryWorkersBarHasItsOwnLine) {
  SupervisorOptions options;
  options.coordinator = Shell("echo the coordinator speaks >&2; exec sleep 60");
  options.workers = {Shell(Bar("rank 0 [##  ]")), Shell(Bar("rank 1 [#   ]")),
                     Shell(Bar("rank 2 [### ]"))};
  Launch(options);
  // The terminal makes "\r\n" of a newline.
  EXPECT_TRUE(Shows("rank 0 [##  ]\r\nrank 1 [#   ]\r\nrank 2 [### ]\r\n")) << seen_;
  EXPECT_TRUE(Shows("the coordinator speaks\r\n")) << seen_;
}

TEST_F(SupervisorTerminalTest, TellsChildrenThatABarMayBeDrawn) {
  SupervisorOptions options;
  options.coordinator = Shell("exec sleep 60");
  options.workers = {Shell("echo bars=$LOCKSTEP_PROGRESS_BARS; exec sleep 60")};
  Launch(options);
  EXPECT_TRUE(Shows("bars=1\r\n")) << seen_;
}

TEST_F(SupervisorTerminalTest, LastWordsOfAChildComeBeforeWhatIsSaidOfItsEnd) {
  SupervisorOptions options;
  options.coordinator = Shell("exec sleep 60");
  options.workers = {Shell("printf 'no such model' >&2; exit 3")};
  options.crash_loop_deaths = 1;
  Launch(options);
  EXPECT_TRUE(Shows("no such model\r\nserve: worker 0: crash loop")) << seen_;
}

}  // namespace
}  // namespace lockstep
