#include "cli/supervisor.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <optional>

#include "absl/strings/str_cat.h"
#include "cli/child_output.h"
#include "cli/child_process.h"
#include "common/log.h"
#include "common/service_manager.h"
#include "common/supervisor_link.h"
#include "common/variables.h"

namespace lockstep {
namespace {

int64_t NowMs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1'000'000;
}

constexpr int kBadCommandLine = 2;  // the daemons' exit code for it

struct Child {
  std::string name;
  std::vector<std::string> argv;
  ChildOptions options;
  pid_t pid = 0;  // 0: not running
  int64_t started_ms = 0;
  bool was_ready = false;                // in this life
  int young_deaths = 0;                  // in a row
  std::optional<int64_t> restart_at_ms;  // when a restart is due
  std::string word;                      // to be said when it is
  std::optional<int64_t> kill_at_ms;     // stopped by a signal: when to replace it
};

class Supervisor {
 public:
  Supervisor(const SupervisorOptions& options, ServiceManager& service)
      : options_(options), service_(service), output_(options.workers.size() + 1) {
    coordinator_.name = "coordinator";
    coordinator_.options.stderr_fd = output_.write_fd(0);
    coordinator_.argv = options.coordinator;
    for (size_t i = 0; i < options.workers.size(); ++i) {
      Child worker;
      worker.name = absl::StrCat("worker ", i);
      worker.argv = options.workers[i];
      worker.options.stdout_to_stderr = true;
      worker.options.stderr_fd = output_.write_fd(i + 1);
      workers_.push_back(std::move(worker));
    }
  }

  ~Supervisor() {
    for (const int fd : {notes_[0], notes_[1], signals_}) {
      if (fd >= 0) close(fd);
    }
  }

  int Run() {
    if (pipe2(notes_, O_CLOEXEC | O_NONBLOCK) != 0) {
      Say(absl::StrCat("cannot make a pipe: ", strerror(errno)));
      return 1;
    }
    // Whoever reads stderr may go before the children do.
    signal(SIGPIPE, SIG_IGN);
    coordinator_.options.keep_fd = notes_[1];
    coordinator_.options.keep_fd_variable = kSupervisorFdVariable;
    sigset_t set;
    sigemptyset(&set);
    for (int number : {SIGCHLD, SIGTERM, SIGINT, SIGHUP}) sigaddset(&set, number);
    sigprocmask(SIG_BLOCK, &set, nullptr);
    signals_ = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals_ < 0) {
      Say(absl::StrCat("signalfd: ", strerror(errno)));
      return 1;
    }
    if (!alone()) Start(coordinator_);
    for (Child& worker : workers_) Start(worker);
    if (alone()) service_.Ready();
    while (!Finished()) {
      service_.Beat();
      const int number = NextSignal();
      if (number == SIGTERM || number == SIGINT || number == SIGHUP) OnStopSignal();
      Reap();
      StartDue();
      KillOverdue();
      KillStopped();
    }
    service_.Stopping();
    if (!last_word_.empty()) Say(last_word_);
    return exit_code_;
  }

 private:
  void Say(const std::string& line) {
    output_.BeforeOwnLine();
    if (LogsJson()) {
      LogWarning(line);
    } else {
      std::fprintf(stderr, "%s: %s\n", options_.command.c_str(), line.c_str());
    }
  }

  // Waits until a signal, a note, a word of a child or the next thing to do; 0: no
  // signal.
  int NextSignal() {
    std::vector<pollfd> fds = {{signals_, POLLIN, 0}, {notes_[0], POLLIN, 0}};
    for (const int fd : output_.read_fds()) fds.push_back({fd, POLLIN, 0});
    poll(fds.data(), fds.size(), static_cast<int>(MsUntilNextEvent()));
    output_.Relay();
    signalfd_siginfo info;
    if (read(signals_, &info, sizeof(info)) != sizeof(info)) return 0;
    return static_cast<int>(info.ssi_signo);
  }

  bool alone() const { return coordinator_.argv.empty(); }  // the coordinator is elsewhere

  bool Finished() const {
    return ending_ && coordinator_.pid == 0 &&
           std::all_of(workers_.begin(), workers_.end(), [](const Child& w) { return w.pid == 0; });
  }

  // What the coordinator has said so far is about the lives so far.
  void TakeNotes() {
    char note;
    while (read(notes_[0], &note, 1) == 1) {
      const auto apply = [note](Child& child) {
        if (note == static_cast<char>(SupervisorNote::kServed)) child.young_deaths = 0;
        child.was_ready = child.pid != 0;
      };
      if (note == static_cast<char>(SupervisorNote::kOpen)) {
        service_.Ready();
        open_ = true;
        // `ready` stands on stdout once: the lives to come say it elsewhere.
        coordinator_.options.stdout_to_stderr = true;
        continue;
      }
      apply(coordinator_);
      for (Child& worker : workers_) apply(worker);
    }
  }

  void Start(Child& child) {
    TakeNotes();
    child.was_ready = false;
    child.restart_at_ms.reset();
    child.kill_at_ms.reset();
    child.started_ms = NowMs();
    absl::StatusOr<pid_t> pid = StartChild(child.argv, child.options);
    if (!pid.ok()) {
      Say(std::string(pid.status().message()));
      End(1);
      return;
    }
    child.pid = *pid;
  }

  // The first signal drains through the coordinator; the second ends all.
  void OnStopSignal() {
    const bool first = stop_signals_++ == 0;
    if (first && alone()) {
      service_.Stopping();
      return End(0);
    }
    if (first && coordinator_.pid != 0) {
      draining_ = true;
      service_.Stopping();
      kill(coordinator_.pid, SIGTERM);
      return;
    }
    Say("ending at once");
    if (coordinator_.pid != 0) kill(coordinator_.pid, SIGKILL);
    for (Child& worker : workers_) {
      if (worker.pid != 0) kill(worker.pid, SIGKILL);
    }
    End(1);
  }

  // From here on nothing is started again and every worker is told to go.
  void End(int code) {
    if (!ending_) exit_code_ = code;
    ending_ = true;
    kill_at_ms_ = NowMs() + options_.kill_after_ms;
    coordinator_.restart_at_ms.reset();
    for (Child& worker : workers_) {
      worker.restart_at_ms.reset();
      if (worker.pid != 0) kill(worker.pid, SIGTERM);
    }
    if (coordinator_.pid != 0) kill(coordinator_.pid, SIGTERM);
  }

  void Reap() {
    TakeNotes();
    int status = 0;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG | WUNTRACED | WCONTINUED)) > 0;) {
      if (WIFSTOPPED(status) || WIFCONTINUED(status)) {
        OnPause(pid, WIFSTOPPED(status));
        continue;
      }
      if (pid == coordinator_.pid) {
        OnCoordinatorExit(status);
        continue;
      }
      for (Child& worker : workers_) {
        if (worker.pid == pid) OnWorkerExit(worker, status);
      }
    }
  }

  // A stopped worker can do nothing for itself, not even end; its group has left
  // it behind by the time it is replaced. Who continues it earlier keeps it.
  void OnPause(pid_t pid, bool stopped) {
    for (Child& worker : workers_) {
      if (worker.pid != pid) continue;
      worker.kill_at_ms.reset();
      if (stopped) worker.kill_at_ms = NowMs() + options_.kill_stopped_after_ms;
    }
  }

  void KillStopped() {
    for (Child& worker : workers_) {
      if (worker.pid == 0 || !worker.kill_at_ms || NowMs() < *worker.kill_at_ms) continue;
      Say(absl::StrCat(worker.name, " has been stopped for ", options_.kill_stopped_after_ms,
                       " ms: killing it"));
      kill(worker.pid, SIGKILL);
      worker.kill_at_ms.reset();
    }
  }

  void OnCoordinatorExit(int status) {
    coordinator_.pid = 0;
    output_.Close(0);
    if (ending_) return;
    if (WIFEXITED(status) || draining_) {
      End(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
      return;
    }
    ScheduleRestart(coordinator_, status);
  }

  void OnWorkerExit(Child& worker, int status) {
    worker.pid = 0;
    output_.Close(1 + static_cast<size_t>(&worker - workers_.data()));
    if (ending_) return;
    const bool clean = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    // A clean exit answers the coordinator's own word; it is about to end too.
    if (clean && draining_) return;
    if (clean && alone()) return End(0);
    // A command line that is refused once is refused always; the worker has said why.
    if (WIFEXITED(status) && WEXITSTATUS(status) == kBadCommandLine) {
      // Nobody is served yet, and a farewell would come after the reason.
      if (!open_ && coordinator_.pid != 0) kill(coordinator_.pid, SIGKILL);
      return End(kBadCommandLine);
    }
    ScheduleRestart(worker, status);
  }

  void ScheduleRestart(Child& child, int status) {
    const int64_t now = NowMs();
    // A large model takes minutes to load: a death before the group was whole
    // is as good a sign as a quick one, where somebody tells of it.
    const bool young = (!alone() && !child.was_ready) || now - child.started_ms < options_.young_ms;
    const bool killed = WIFSIGNALED(status) &&
                        (WTERMSIG(status) == SIGKILL || WTERMSIG(status) == SIGTERM) &&
                        child.was_ready;
    if (!young) child.young_deaths = 0;
    if (young && !killed) ++child.young_deaths;
    if (child.young_deaths >= options_.crash_loop_deaths) {
      last_word_ = absl::StrCat(child.name, ": crash loop: ended ", child.young_deaths,
                                " times in a row ", alone() ? "" : "before the group was whole or ",
                                "within ", options_.young_ms,
                                " ms of its start, the last time with ", DescribeExit(status));
      End(1);
      return;
    }
    int64_t pause = 0;
    if (child.young_deaths > 0 && !killed) {
      pause = std::min<int64_t>(options_.max_pause_ms, int64_t{100} << child.young_deaths);
    }
    child.restart_at_ms = now + pause;
    std::string word =
        absl::StrCat(child.name, " ended with ", DescribeExit(status), "; starting it again",
                     pause > 0 ? absl::StrCat(" in ", pause, " ms") : "");
    // Who was told to end is not worth a word if the one that told him ends too.
    if (pause > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0) {
      child.word = std::move(word);
    } else {
      Say(word);
    }
  }

  void StartDue() {
    if (ending_) return;
    const int64_t now = NowMs();
    auto start_if_due = [&](Child& child) {
      if (!child.restart_at_ms || *child.restart_at_ms > now) return;
      if (!child.word.empty()) Say(std::exchange(child.word, {}));
      Start(child);
    };
    start_if_due(coordinator_);
    for (Child& worker : workers_) start_if_due(worker);
  }

  void KillOverdue() {
    if (!ending_ || NowMs() < kill_at_ms_) return;
    if (coordinator_.pid != 0) kill(coordinator_.pid, SIGKILL);
    for (Child& worker : workers_) {
      if (worker.pid != 0) kill(worker.pid, SIGKILL);
    }
  }

  int64_t MsUntilNextEvent() const {
    int64_t at = NowMs() + 60'000;
    auto consider = [&](const Child& child) {
      if (child.restart_at_ms) at = std::min(at, *child.restart_at_ms);
      if (child.kill_at_ms) at = std::min(at, *child.kill_at_ms);
    };
    consider(coordinator_);
    for (const Child& worker : workers_) consider(worker);
    if (ending_) at = std::min(at, kill_at_ms_);
    const int64_t wait = std::max<int64_t>(at - NowMs(), ending_ ? 20 : 0);
    const int64_t beat = service_.MsUntilBeat();
    return beat < 0 ? wait : std::min(wait, beat);
  }

  const SupervisorOptions options_;
  ServiceManager& service_;
  ChildOutput output_;
  Child coordinator_;
  std::vector<Child> workers_;
  int notes_[2] = {-1, -1};  // the coordinator's, see SupervisorLink
  int signals_ = -1;         // a signalfd
  int stop_signals_ = 0;
  bool open_ = false;  // the coordinator has let clients in
  bool draining_ = false;
  bool ending_ = false;
  int64_t kill_at_ms_ = 0;
  int exit_code_ = 0;
  std::string last_word_;  // the reason, said when nobody else has anything to say
};

}  // namespace

int RunSupervisor(const SupervisorOptions& options) {
  ServiceManager service;
  if (options.log_json) InitLog({.json = true, .source = options.command});
  return Supervisor(options, service).Run();
}

void SayUnknownVariables(const std::string& command, bool log_json) {
  if (log_json) InitLog({.json = true, .source = command});
  for (const std::string& line : TakeUnknownVariables()) {
    if (log_json) {
      LogWarning(line);
    } else {
      std::fprintf(stderr, "lockstep %s: %s\n", command.c_str(), line.c_str());
    }
  }
}

}  // namespace lockstep
