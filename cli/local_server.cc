#include "cli/local_server.h"

#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "cli/child_process.h"
#include "nlohmann/json.hpp"

namespace lockstep {
namespace {

// Loading a large checkpoint from a cold disk takes minutes; a server that
// makes no progress ends itself long before this.
constexpr auto kStartTimeout = std::chrono::minutes(30);
constexpr auto kPoll = std::chrono::milliseconds(20);

}  // namespace

absl::StatusOr<std::unique_ptr<LocalServer>> LocalServer::Start(
    const std::vector<std::string>& serve_args) {
  std::unique_ptr<LocalServer> server(new LocalServer);
  const char* base = std::getenv("TMPDIR");
  std::string pattern = absl::StrCat(base != nullptr ? base : "/tmp", "/lockstep-XXXXXX");
  if (mkdtemp(pattern.data()) == nullptr) {
    return absl::UnavailableError(
        absl::StrCat("cannot make a directory like ", pattern, ": ", strerror(errno)));
  }
  server->directory_ = pattern;
  server->log_path_ = pattern + "/serve.log";
  server->port_file_ = pattern + "/ports.json";

  absl::StatusOr<std::string> program = SiblingProgram("lockstep");
  if (!program.ok()) return program.status();
  std::vector<std::string> argv = {*program, "serve"};
  argv.insert(argv.end(), serve_args.begin(), serve_args.end());
  for (const char* flag :
       {"--host", "127.0.0.1", "--http-port", "0", "--grpc-port", "0", "--health-port", "0"}) {
    argv.push_back(flag);
  }
  argv.push_back("--port-file");
  argv.push_back(server->port_file_);
  ChildOptions options;
  options.log_path = server->log_path_;
  absl::StatusOr<pid_t> pid = StartChild(argv, options);
  if (!pid.ok()) return pid.status();
  server->pid_ = *pid;
  if (absl::Status ready = server->WaitReady(); !ready.ok()) return ready;
  return server;
}

LocalServer::~LocalServer() {
  Stop();
  std::error_code ignored;
  std::filesystem::remove_all(directory_, ignored);
}

int LocalServer::Stop(int seconds) {
  if (!Ended()) kill(pid_, SIGTERM);
  return AwaitEnd(seconds);
}

int LocalServer::AwaitEnd(int seconds) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  while (!Ended() && std::chrono::steady_clock::now() < until) std::this_thread::sleep_for(kPoll);
  if (pid_ != 0) {
    kill(pid_, SIGKILL);
    waitpid(pid_, &status_, 0);
    pid_ = 0;
  }
  return status_;
}

bool LocalServer::Ended() {
  if (pid_ != 0 && waitpid(pid_, &status_, WNOHANG) == pid_) pid_ = 0;
  return pid_ == 0;
}

absl::Status LocalServer::WaitReady() {
  const auto until = std::chrono::steady_clock::now() + kStartTimeout;
  while (std::chrono::steady_clock::now() < until) {
    // The file appears whole, by a rename, when the doors answer.
    std::ifstream file(port_file_);
    if (file) {
      const nlohmann::json ports = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
      if (ports.is_object() && ports.contains("grpc_port")) {
        address_ = absl::StrCat("127.0.0.1:", ports["grpc_port"].get<int>());
        http_port_ = ports.value("http_port", 0);
        admin_address_ = ports.value("admin_address", "");
        return absl::OkStatus();
      }
    }
    if (Ended()) return absl::UnavailableError(LastLogLine());
    std::this_thread::sleep_for(kPoll);
  }
  return absl::DeadlineExceededError(absl::StrCat("not ready yet; last line: ", LastLogLine()));
}

std::string LocalServer::Log() const {
  std::ifstream log(log_path_);
  return {std::istreambuf_iterator<char>(log), {}};
}

std::string LocalServer::LastLogLine() const {
  std::istringstream log(Log());
  std::string line, last = "the server ended without a word";
  while (std::getline(log, line)) {
    const bool restart = line.rfind("serve: ", 0) == 0 && absl::StrContains(line, "starting it");
    if (!line.empty() && !restart) last = line;
  }
  return last;
}

}  // namespace lockstep
