// The supervisor over small shell scripts in place of the daemons.
#include "cli/supervisor.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "cli/child_process.h"
#include "cli/private_folder.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/process_state.h"
#include "tests/fakes/temp_dir.h"

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
  void TearDown() override {
    if (pid_ > 0) kill(pid_, SIGKILL), waitpid(pid_, nullptr, 0);
  }
  // A script that notes its process id in dir/name, one line a start.
  std::string Note(const std::string& name) { return "echo $$ >> " + dir_ + "/" + name + "; "; }
  std::vector<pid_t> Starts(const std::string& name) {
    std::ifstream file(dir_ + "/" + name);
    std::vector<pid_t> pids;
    for (pid_t pid; file >> pid;) pids.push_back(pid);
    return pids;
  }
  // A worker's script: `last_words` in its n-th life when dir/name has n lines.
  std::string NotedAndThen(const std::string& name, const std::string& last_words) {
    return Note("w0") + "n=$(wc -l < " + dir_ + "/w0); while [ $(wc -l < " + dir_ + "/" + name +
           ") -lt $n ]; do sleep 0.01; done; " + last_words;
  }
  // A coordinator's script: sends `note` in every life of w0, then adds a line to dir/name;
  // ends with 0 in life `last`.
  std::string NotesEveryLife(char note, const std::string& name, int last = 1'000) {
    return "said=0; while [ $said -lt " + std::to_string(last) + " ]; do n=$(wc -l < " + dir_ +
           "/w0); if [ \"$n\" != \"$said\" ]; then said=$n; printf " + note +
           " > /proc/self/fd/$LOCKSTEP_SUPERVISOR_FD; echo $n >> " + dir_ + "/" + name +
           "; fi; sleep 0.01; done; exit 0";
  }
  void Touch(const std::string& name) { std::ofstream(dir_ + "/" + name).close(); }
  void AddLine(const std::string& name) {
    std::ofstream(dir_ + "/" + name, std::ios::app) << "1" << std::endl;
  }
  std::string Read(const std::string& name) {
    std::ifstream file(dir_ + "/" + name);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  static bool Alive(pid_t pid) { return kill(pid, 0) == 0; }

  void Launch(const SupervisorOptions& options, const std::string& stdout_path = "",
              const std::string& stderr_path = "") {
    pid_ = fork();
    ASSERT_GE(pid_, 0);
    if (pid_ != 0) return;
    if (!stdout_path.empty() && freopen(stdout_path.c_str(), "w", stdout) == nullptr) _exit(1);
    if (!stderr_path.empty()) {  // by its number: stderr stays unbuffered
      dup2(open(stderr_path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600), STDERR_FILENO);
    }
    _exit(RunSupervisor(options));
  }
  // The exit code; -1 if it does not end.
  int Wait() {
    int status = 0;
    if (!Eventually([&] { return waitpid(pid_, &status, WNOHANG) == pid_; })) return -1;
    pid_ = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

  // w0 dies as often as is allowed, and the whole ends.
  void ExpectCrashLoop(const SupervisorOptions& options) {
    Launch(options);
    EXPECT_EQ(Wait(), 1);
    EXPECT_EQ(Starts("w0").size(), static_cast<size_t>(options.crash_loop_deaths));
  }

  const TempDir temp_;
  const std::string dir_ = temp_.path();
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
  ExpectCrashLoop(options);
}

TEST_F(SupervisorTest, DeathsWhileLoadingAreACrashLoopHoweverLongThatTook) {
  SupervisorOptions options;
  options.coordinator = Shell("exec sleep 60");
  options.workers = {Shell(Note("w0") + "exit 3")};
  options.crash_loop_deaths = 3;
  options.young_ms = 0;  // every life is a long one
  ExpectCrashLoop(options);
}

TEST_F(SupervisorTest, KillsOfReadyWorkersAreNoCrashLoop) {
  SupervisorOptions options;
  options.coordinator = Shell(NotesEveryLife('r', "ready"));
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
  options.coordinator = Shell(NotesEveryLife('r', "ready"));
  options.workers = {Shell(NotedAndThen("ready", "exit 3"))};
  options.crash_loop_deaths = 3;
  options.young_ms = 60'000;
  Touch("w0");
  Touch("ready");
  Launch(options);
  EXPECT_EQ(Wait(), 1);
  EXPECT_EQ(Starts("w0").size(), 3u);
}

TEST_F(SupervisorTest, AServedStepForgives) {
  SupervisorOptions options;
  options.coordinator = Shell(NotesEveryLife('s', "served", /*last=*/6));
  options.workers = {Shell(NotedAndThen("served", "exit 3"))};
  options.crash_loop_deaths = 3;
  options.young_ms = 60'000;
  options.max_pause_ms = 50;
  Touch("w0");
  Touch("served");
  Launch(options);
  EXPECT_EQ(Wait(), 0);
}

// Before each death the test says whether the group had been whole: with young_ms 0 such a
// life is a long one.
TEST_F(SupervisorTest, ALongLifeForgivesEarlyDeaths) {
  SupervisorOptions options;
  options.coordinator = Shell("while [ ! -e " + dir_ +
                              "/whole ]; do sleep 0.01; done; "
                              "printf r > /proc/self/fd/$LOCKSTEP_SUPERVISOR_FD; echo 1 > " +
                              dir_ + "/told; exec sleep 60");
  options.workers = {Shell(NotedAndThen("die", "exit 3"))};
  options.crash_loop_deaths = 2;
  options.young_ms = 0;
  options.max_pause_ms = 0;
  Touch("w0");
  Touch("die");
  Launch(options);
  AddLine("die");
  ASSERT_TRUE(Eventually([&] { return Starts("w0").size() == 2; }));
  Touch("whole");
  ASSERT_TRUE(Eventually([&] { return Starts("told").size() == 1; }));
  AddLine("die");
  ASSERT_TRUE(Eventually([&] { return Starts("w0").size() == 3; }));
  AddLine("die");
  EXPECT_TRUE(Eventually([&] { return Starts("w0").size() == 4; }));
}

TEST_F(SupervisorTest, PausesGrowNoLongerThanTheLongest) {
  SupervisorOptions options;
  options.coordinator = Shell("exec sleep 60");
  options.workers = {Shell("exit 3")};
  options.crash_loop_deaths = 6;
  options.max_pause_ms = 300;
  Launch(options, "", dir_ + "/stderr");
  EXPECT_EQ(Wait(), 1);
  std::istringstream lines(Read("stderr"));
  std::vector<std::string> pauses;
  for (std::string line; std::getline(lines, line);) {
    const size_t at = line.find(" again in ");
    if (at != line.npos) pauses.push_back(line.substr(at + 10));
  }
  EXPECT_THAT(pauses, ::testing::ElementsAre("200 ms", "300 ms", "300 ms", "300 ms", "300 ms"));
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

// A farewell of the coordinator would come after the worker's reason.
TEST_F(SupervisorTest, TheReasonOfABadCommandLineStandsLast) {
  SupervisorOptions options;
  options.coordinator =
      Shell("trap 'echo draining >&2; exit 0' TERM; " + Note("c") + "while :; do sleep 0.01; done");
  options.workers = {
      Shell("while [ ! -e " + dir_ + "/c ]; do sleep 0.01; done; echo no such flag >&2; exit 2")};
  Launch(options, "", dir_ + "/stderr");
  EXPECT_EQ(Wait(), 2);
  EXPECT_EQ(Read("stderr"), "no such flag\n");
}

TEST_F(SupervisorTest, GoesOnWhenTheReaderOfItsStderrIsGone) {
  const std::string pipe = dir_ + "/stderr";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  SupervisorOptions options;
  options.coordinator = Shell("exec sleep 60");
  options.workers = {Shell(Note("w0") + "exec sleep 60")};
  options.max_pause_ms = 0;
  Launch(options, "", pipe);
  // Ours alone; its end of the pipe waits for this one.
  const int reader = open(pipe.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  ASSERT_GE(reader, 0);
  ASSERT_TRUE(Eventually([&] { return Starts("w0").size() == 1; }));
  close(reader);
  kill(Starts("w0")[0], SIGKILL);  // a death has a line
  EXPECT_TRUE(Eventually([&] { return Starts("w0").size() == 2; }));
  EXPECT_EQ(waitpid(pid_, nullptr, WNOHANG), 0);
}

TEST_F(SupervisorTest, ChildrenDoNotIgnoreBrokenPipes) {
  SupervisorOptions options;
  options.coordinator = Shell("grep SigIgn /proc/self/status > " + dir_ + "/ignored; exit 0");
  Launch(options);
  EXPECT_EQ(Wait(), 0);
  const std::string line = Read("ignored");  // others may be: of nohup, say
  ASSERT_TRUE(line.starts_with("SigIgn:\t")) << line;
  EXPECT_EQ(std::stoull(line.substr(8), nullptr, 16) & (1ull << (SIGPIPE - 1)), 0u) << line;
}

// What is reaped comes in order: a new life of w1 says that the stop of w0 has been seen.
TEST_F(SupervisorTest, AStoppedWorkerIsReplacedUnlessSomebodyContinuesIt) {
  SupervisorOptions options;
  options.coordinator = Shell("exec sleep 60");
  options.workers = {Shell(Note("w0") + "exec sleep 60"), Shell(Note("w1") + "exec sleep 60")};
  options.max_pause_ms = 0;
  options.kill_stopped_after_ms = 4'000;
  Launch(options);
  ASSERT_TRUE(Eventually([&] { return Starts("w0").size() == 1 && Starts("w1").size() == 1; }));
  const pid_t continued = Starts("w0")[0];
  kill(continued, SIGSTOP);
  ASSERT_TRUE(Eventually([&] { return ProcessState(continued) == 'T'; }));
  kill(Starts("w1")[0], SIGKILL);
  ASSERT_TRUE(Eventually([&] { return Starts("w1").size() == 2; }));
  kill(continued, SIGCONT);
  kill(Starts("w1")[1], SIGSTOP);
  // Its time is up after that of w0 would have been.
  ASSERT_TRUE(Eventually([&] { return Starts("w1").size() == 3; }));
  EXPECT_FALSE(ProcessGone(continued));
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

// A drain that does not end.
TEST_F(SupervisorTest, TheSecondInterruptEndsAllAtOnce) {
  SupervisorOptions options;
  options.coordinator = Shell("trap 'echo 1 >> " + dir_ + "/draining' TERM; " + Note("c") +
                              "while :; do sleep 0.01; done");
  options.workers = {Shell("trap '' TERM; " + Note("w") + "while :; do sleep 0.01; done")};
  options.kill_after_ms = 3'600'000;
  Launch(options);
  ASSERT_TRUE(Eventually([&] { return !Starts("c").empty() && !Starts("w").empty(); }));
  kill(pid_, SIGINT);
  ASSERT_TRUE(Eventually([&] { return Starts("draining").size() == 1; }));
  EXPECT_EQ(waitpid(pid_, nullptr, WNOHANG), 0) << "it waits for the drain";
  kill(pid_, SIGINT);
  EXPECT_EQ(Wait(), 1);
  EXPECT_FALSE(Alive(Starts("c")[0]));
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

// What `lockstep worker-group` asks for.
TEST_F(SupervisorTest, WithoutACoordinatorSigtermIsForTheWorkers) {
  SupervisorOptions options;
  options.workers = {Shell("trap 'echo 1 >> " + dir_ + "/told; exit 3' TERM; " + Note("w0") +
                           "while :; do sleep 0.01; done"),
                     Shell(Note("w1") + "exec sleep 60")};
  options.kill_after_ms = 3'600'000;
  Launch(options);
  ASSERT_TRUE(Eventually([&] { return !Starts("w0").empty() && !Starts("w1").empty(); }));
  kill(pid_, SIGTERM);
  EXPECT_EQ(Wait(), 0);
  EXPECT_EQ(Starts("told").size(), 1u);
  EXPECT_EQ(Starts("w0").size(), 1u);
  EXPECT_FALSE(Alive(Starts("w1")[0]));
}

TEST_F(SupervisorTest, WithoutACoordinatorAWorkerThatWasToldToEndEndsAll) {
  SupervisorOptions options;
  options.workers = {Shell(Note("w0") + "while [ ! -s " + dir_ + "/w1 ]; do :; done; exit 0"),
                     Shell(Note("w1") + "exec sleep 60")};
  Launch(options);
  EXPECT_EQ(Wait(), 0);
  EXPECT_EQ(Starts("w0").size(), 1u);
  ASSERT_EQ(Starts("w1").size(), 1u);
  EXPECT_FALSE(Alive(Starts("w1")[0]));
}

TEST_F(SupervisorTest, WithoutACoordinatorLongLivesAreNoCrashLoop) {
  SupervisorOptions options;
  options.workers = {Shell(Note("w0") + "[ $(wc -l < " + dir_ + "/w0) -gt 4 ] && exit 0; exit 3")};
  options.crash_loop_deaths = 2;
  options.young_ms = 0;  // every life is a long one
  Launch(options);
  EXPECT_EQ(Wait(), 0);
  EXPECT_EQ(Starts("w0").size(), 5u);
}

TEST_F(SupervisorTest, WithoutACoordinatorAKillSoonAfterTheStartCountsToo) {
  SupervisorOptions options;
  options.workers = {Shell(Note("w0") + "kill -KILL $$")};
  options.crash_loop_deaths = 2;
  options.young_ms = 3'600'000;
  ExpectCrashLoop(options);
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
