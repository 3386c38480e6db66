// The supervisor over small shell scripts in place of the daemons.
#include "cli/supervisor.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <thread>

#include "cli/child_process.h"
#include "cli/private_folder.h"
#include "gtest/gtest.h"
#include "tests/fakes/process_state.h"

namespace lockstep {
namespace {

std::vector<std::string> Shell(const std::string& script) { return {"/bin/sh", "-c", script}; }

bool Eventually(const std::function<bool()>& condition) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (std::chrono::steady_clock::now() < until) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return condition();
}

// Runs the supervisor in a process of its own.
class SupervisorTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = ::testing::TempDir() + "/supervisor-XXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    dir_ = pattern;
  }
  void TearDown() override {
    if (pid_ > 0) kill(pid_, SIGKILL), waitpid(pid_, nullptr, 0);
    std::filesystem::remove_all(dir_);
  }
  // A script that notes its process id in dir/name, one line a start.
  std::string Note(const std::string& name) { return "echo $$ >> " + dir_ + "/" + name + "; "; }
  std::vector<pid_t> Starts(const std::string& name) {
    std::ifstream file(dir_ + "/" + name);
    std::vector<pid_t> pids;
    for (pid_t pid; file >> pid;) pids.push_back(pid);
    return pids;
  }
  void Touch(const std::string& name) { std::ofstream(dir_ + "/" + name).close(); }
  static bool Alive(pid_t pid) { return kill(pid, 0) == 0; }

  void Launch(const SupervisorOptions& options, const std::string& stdout_path = "") {
    pid_ = fork();
    ASSERT_GE(pid_, 0);
    if (pid_ != 0) return;
    if (!stdout_path.empty() && freopen(stdout_path.c_str(), "w", stdout) == nullptr) _exit(1);
    _exit(RunSupervisor(options));
  }
  int Wait() {
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

  std::string dir_;
  pid_t pid_ = 0;
};

TEST_F(SupervisorTest, EndsWithTheCoordinatorsCodeAndTakesTheWorkersAlong) {
  SupervisorOptions options;
  options.coordinator = Shell("while [ ! -s " + dir_ + "/worker ]; do :; done; exit 7");
  options.workers = {Shell(Note("worker") + "exec sleep 60")};
  Launch(options);
  EXPECT_EQ(Wait(), 7);
  ASSERT_EQ(Starts("worker").size(), 1u);
  EXPECT_FALSE(Alive(Starts("worker")[0]));
}

TEST_F(SupervisorTest, StartsAKilledWorkerAgain) {
  SupervisorOptions options;
  options.coordinator = Shell("exec sleep 60");
  options.workers = {Shell(Note("w0") + "exec sleep 60"), Shell(Note("w1") + "exec sleep 60")};
  Launch(options);
  ASSERT_TRUE(Eventually([&] { return Starts("w0").size() == 1 && Starts("w1").size() == 1; }));
  kill(Starts("w1")[0], SIGKILL);
  EXPECT_TRUE(Eventually([&] { return Starts("w1").size() == 2 && Alive(Starts("w1")[1]); }));
  EXPECT_EQ(Starts("w0").size(), 1u);
}

TEST_F(SupervisorTest, NamesACrashLoopAndEnds) {
  SupervisorOptions options;
  options.coordinator = Shell("exec sleep 60");
  options.workers = {Shell(Note("w0") + "exit 3")};
  options.crash_loop_deaths = 3;
  Launch(options);
  EXPECT_EQ(Wait(), 1);
  EXPECT_EQ(Starts("w0").size(), 3u);
}

TEST_F(SupervisorTest, DeathsWhileLoadingAreACrashLoopHoweverLongThatTook) {
  SupervisorOptions options;
  options.coordinator = Shell("exec sleep 60");
  options.workers = {Shell(Note("w0") + "exit 3")};
  options.crash_loop_deaths = 3;
  options.young_ms = 0;  // every life is a long one
  Launch(options);
  EXPECT_EQ(Wait(), 1);
  EXPECT_EQ(Starts("w0").size(), 3u);
}

// A coordinator that calls each new life of the worker ready, and says when it has.
TEST_F(SupervisorTest, KillsOfReadyWorkersAreNoCrashLoop) {
  SupervisorOptions options;
  options.coordinator = Shell("said=0; while :; do n=$(wc -l < " + dir_ +
                              "/w0); if [ \"$n\" != \"$said\" ]; then said=$n; "
                              "printf r > /proc/self/fd/$LOCKSTEP_SUPERVISOR_FD; echo $n >> " +
                              dir_ + "/ready; fi; sleep 0.01; done");
  options.workers = {Shell(Note("w0") + "exec sleep 60")};
  options.crash_loop_deaths = 2;
  Touch("w0");
  Launch(options);
  for (size_t life = 1; life <= 6; ++life) {
    ASSERT_TRUE(Eventually([&] { return Starts("ready").size() == life; })) << life;
    kill(Starts("w0").back(), SIGKILL);
  }
  EXPECT_TRUE(Eventually([&] { return Starts("w0").size() == 7; }));
}

TEST_F(SupervisorTest, CrashesOfReadyWorkersAreACrashLoop) {
  SupervisorOptions options;
  options.coordinator = Shell(
      "while :; do printf r > /proc/self/fd/$LOCKSTEP_SUPERVISOR_FD; "
      "sleep 0.01; done");
  options.workers = {Shell(Note("w0") + "sleep 0.1; exit 3")};
  options.crash_loop_deaths = 3;
  Launch(options);
  EXPECT_EQ(Wait(), 1);
  EXPECT_EQ(Starts("w0").size(), 3u);
}

TEST_F(SupervisorTest, AServedStepForgives) {
  SupervisorOptions options;
  options.coordinator = Shell("while [ $(wc -l < " + dir_ +
                              "/w0) -lt 6 ]; do printf s > /proc/self/fd/$LOCKSTEP_SUPERVISOR_FD; "
                              "sleep 0.01; done; exit 0");
  options.workers = {Shell(Note("w0") + "sleep 0.1; exit 3")};
  options.crash_loop_deaths = 3;
  options.max_pause_ms = 50;
  Touch("w0");
  Launch(options);
  EXPECT_EQ(Wait(), 0);
}

TEST_F(SupervisorTest, AFolderIsGoneWithItsOwnerOrWithTheNextOne) {
  const std::string prefix = dir_ + "/folder";
  const std::string abandoned = prefix + "-abcdef", fresh = prefix + "-ghijkl";
  std::filesystem::create_directory(abandoned);
  std::ofstream(abandoned + "/workers").close();
  std::filesystem::create_directory(fresh);
  std::filesystem::last_write_time(
      abandoned, std::filesystem::file_time_type::clock::now() - std::chrono::hours(1));
  std::string path;
  {
    const auto first = PrivateFolder::Make(prefix);
    ASSERT_TRUE(first.ok()) << first.status();
    path = (*first)->path();
    EXPECT_FALSE(std::filesystem::exists(abandoned));
    EXPECT_TRUE(std::filesystem::exists(fresh)) << "somebody may be about to use it";
    std::filesystem::last_write_time(
        path, std::filesystem::file_time_type::clock::now() - std::chrono::hours(1));
    const auto second = PrivateFolder::Make(prefix);
    ASSERT_TRUE(second.ok()) << second.status();
    EXPECT_TRUE(std::filesystem::exists(path)) << "its owner lives";
  }
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST_F(SupervisorTest, DoesNotRetryABadCommandLine) {
  SupervisorOptions options;
  options.coordinator = Shell("exec sleep 60");
  options.workers = {Shell(Note("w0") + "exit 2")};
  Launch(options);
  EXPECT_EQ(Wait(), 2);
  EXPECT_EQ(Starts("w0").size(), 1u);
}

TEST_F(SupervisorTest, StartsAKilledCoordinatorAgain) {
  SupervisorOptions options;
  options.coordinator = Shell(Note("c") + "exec sleep 60");
  options.workers = {Shell("exec sleep 60")};
  Launch(options);
  ASSERT_TRUE(Eventually([&] { return Starts("c").size() == 1; }));
  kill(Starts("c")[0], SIGKILL);
  EXPECT_TRUE(Eventually([&] { return Starts("c").size() == 2; }));
}

// Each life says `ready` when it is told to, as the coordinator does it.
TEST_F(SupervisorTest, ReadyStandsOnStdoutOnceHoweverManyLivesThereWere) {
  SupervisorOptions options;
  options.coordinator = Shell(Note("c") + "while [ ! -e " + dir_ +
                              "/open ]; do sleep 0.01; done; echo ready; printf o > "
                              "/proc/self/fd/$LOCKSTEP_SUPERVISOR_FD; echo $$ >> " +
                              dir_ + "/said; exec sleep 60");
  options.workers = {Shell("exec sleep 60")};
  Launch(options, dir_ + "/stdout");
  const auto killed_after = [&](const std::string& name, size_t times) {
    if (!Eventually([&] { return Starts(name).size() == times; })) return false;
    return kill(Starts("c").back(), SIGKILL) == 0;
  };
  ASSERT_TRUE(killed_after("c", 1)) << "before it was ready";
  ASSERT_TRUE(Eventually([&] { return Starts("c").size() == 2; }));
  Touch("open");
  ASSERT_TRUE(killed_after("said", 1));
  ASSERT_TRUE(Eventually([&] { return Starts("said").size() == 2; }));
  std::ifstream said(dir_ + "/stdout");
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(said), {}), "ready\n");
}

TEST_F(SupervisorTest, SigtermDrainsThroughTheCoordinator) {
  SupervisorOptions options;
  options.coordinator = Shell("trap 'echo drained > " + dir_ + "/drained; exit 0' TERM; " +
                              Note("c") + "while :; do sleep 0.05; done");
  options.workers = {Shell(Note("w") + "exec sleep 60")};
  Launch(options);
  ASSERT_TRUE(Eventually([&] { return !Starts("c").empty() && !Starts("w").empty(); }));
  kill(pid_, SIGTERM);
  EXPECT_EQ(Wait(), 0);
  EXPECT_TRUE(std::filesystem::exists(dir_ + "/drained"));
  EXPECT_FALSE(Alive(Starts("w")[0]));
}

TEST_F(SupervisorTest, AStubbornWorkerIsKilledAtTheEnd) {
  SupervisorOptions options;
  options.coordinator = Shell("while [ ! -s " + dir_ + "/w ]; do :; done; exit 0");
  options.workers = {Shell("trap '' TERM; " + Note("w") + "while :; do sleep 0.05; done")};
  options.kill_after_ms = 200;
  Launch(options);
  EXPECT_EQ(Wait(), 0);
  EXPECT_FALSE(Alive(Starts("w")[0]));
}

TEST_F(SupervisorTest, NoChildOutlivesAKilledSupervisor) {
  SupervisorOptions options;
  options.coordinator = Shell(Note("c") + "exec sleep 60");
  options.workers = {Shell(Note("w") + "exec sleep 60")};
  Launch(options);
  ASSERT_TRUE(Eventually([&] { return !Starts("c").empty() && !Starts("w").empty(); }));
  kill(pid_, SIGKILL);
  Wait();
  EXPECT_TRUE(
      Eventually([&] { return ProcessGone(Starts("c")[0]) && ProcessGone(Starts("w")[0]); }));
}

TEST(DescribeExitTest, NamesCodesAndSignals) {
  EXPECT_EQ(DescribeExit(3 << 8), "exit code 3");
  EXPECT_EQ(DescribeExit(9), "signal 9 (Killed)");
}

}  // namespace
}  // namespace lockstep
