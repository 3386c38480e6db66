#include "tests/integration/test_server.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <mutex>
#include <sstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace lockstep {

std::string DemoModel() { return std::string(LOCKSTEP_SOURCE_DIR) + "/deploy/demo/model"; }

std::string GoldenModel(const std::string& name) {
  return std::string(LOCKSTEP_SOURCE_DIR) + "/tests/golden/" + name;
}

std::vector<int> SplitSizes() {
  const char* const models = std::getenv("LOCKSTEP_GOLDEN_MODELS");
  return models == nullptr || *models == '\0' ? std::vector<int>{2} : std::vector<int>{2, 4};
}

std::string SplitName(const ::testing::TestParamInfo<int>& tp_size) {
  return absl::StrCat("tp", tp_size.param);
}

bool OnGpus() {
  const char* const backend = std::getenv("LOCKSTEP_BACKEND");
  return backend != nullptr && std::string(backend) == "cuda";
}

void UseBuiltPrograms() {
  setenv("LOCKSTEP_PROGRAMS", (std::string(LOCKSTEP_BINARY_DIR) + "/bin").c_str(),
         /*overwrite=*/0);  // a test may name a folder of its own
  WatchForSanitizerReports();
}

TestServer::~TestServer() {
  // An idle connection does not hear that the server goes away, which would wait for it.
  client_.reset();
  if (server_ != nullptr) server_->Stop(10 * kSlowdown);
}

std::unique_ptr<TestServer> TestServer::Start(const std::string& model, int tp_size,
                                              std::vector<std::string> flags) {
  UseBuiltPrograms();
  std::vector<std::string> args = {"--model", model, "--tensor-parallel-size",
                                   std::to_string(tp_size)};
  args.insert(args.end(), flags.begin(), flags.end());
  absl::StatusOr<std::unique_ptr<LocalServer>> server = LocalServer::Start(args);
  if (!server.ok()) {
    ADD_FAILURE() << "serve did not start: " << server.status();
    return nullptr;
  }
  auto served = std::make_unique<TestServer>();
  served->server_ = *std::move(server);
  served->client_ = std::make_unique<Client>(served->server_->address());
  const absl::StatusOr<v1::GetModelInfoResponse> info =
      served->client_->WaitReady(10'000 * kSlowdown);
  if (!info.ok()) {
    ADD_FAILURE() << "not ready: " << info.status() << "\n" << served->server_->Log();
    return nullptr;
  }
  return served;
}

v1::GetModelInfoResponse TestServer::Info() {
  absl::StatusOr<v1::GetModelInfoResponse> info = client_->GetModelInfo();
  return info.ok() ? *info : v1::GetModelInfoResponse();
}

v1::GetModelInfoResponse TestServer::AwaitEpochAbove(uint64_t epoch) {
  v1::GetModelInfoResponse info;
  EXPECT_TRUE(Eventually([&] {
    info = Info();
    return info.ready() && info.epoch() > epoch;
  })) << "no epoch above "
      << epoch << " came\n"
      << server_->Log();
  return info;
}

pid_t TestServer::WorkerPid(int rank) {
  const v1::GetModelInfoResponse info = Info();
  for (const v1::RankInfo& each : info.ranks()) {
    if (static_cast<int>(each.rank()) == rank) return static_cast<pid_t>(each.pid());
  }
  return 0;
}

pid_t TestServer::CoordinatorPid() {
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const std::string name = entry.path().filename();
    if (name.find_first_not_of("0123456789") != std::string::npos) continue;
    std::ifstream stat(entry.path() / "stat");
    const std::string text((std::istreambuf_iterator<char>(stat)), {});
    const size_t close = text.rfind(')');
    if (close == std::string::npos) continue;
    std::istringstream rest(text.substr(close + 1));
    char state = 0;
    pid_t parent = 0;
    rest >> state >> parent;
    // The kernel keeps 15 characters of a name.
    if (parent == server_->pid() && text.find("(lockstep-coordi") != std::string::npos) {
      return static_cast<pid_t>(std::stol(name));
    }
  }
  return 0;
}

double TestServer::Metric(const std::string& name) {
  std::istringstream text(HttpRequest(server_->http_port(), "GET", "/metrics"));
  for (std::string line; std::getline(text, line);) {
    if (line.rfind(name + " ", 0) == 0) return std::strtod(line.c_str() + name.size(), nullptr);
  }
  return -1;
}

struct StreamedAnswer::Impl {
  CallHandle call;
  mutable std::mutex mutex;
  std::condition_variable changed;
  std::string text;
  std::vector<uint32_t> token_ids;
  int finishes = 0;
  bool done = false;
  absl::Status status;
  std::thread thread;

  void Take(const v1::GenerateEvent& event) {
    std::lock_guard lock(mutex);
    if (event.has_chunk()) {
      text += event.chunk().text();
      token_ids.insert(token_ids.end(), event.chunk().token_ids().begin(),
                       event.chunk().token_ids().end());
    }
    if (event.has_finish()) ++finishes;
    changed.notify_all();
  }
};

StreamedAnswer::StreamedAnswer(Client* client, v1::GenerateRequest request)
    : impl_(std::make_unique<Impl>()) {
  impl_->thread = std::thread([impl = impl_.get(), client, request = std::move(request)] {
    const absl::Status status = client->GenerateStream(
        request, [impl](const v1::GenerateEvent& event) { impl->Take(event); }, &impl->call);
    std::lock_guard lock(impl->mutex);
    impl->status = status;
    impl->done = true;
    impl->changed.notify_all();
  });
}

StreamedAnswer::~StreamedAnswer() {
  Cancel();
  impl_->thread.join();
}

size_t StreamedAnswer::size() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->token_ids.size();
}

bool StreamedAnswer::done() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->done;
}

void StreamedAnswer::AwaitTokens(size_t count) {
  std::unique_lock lock(impl_->mutex);
  EXPECT_TRUE(impl_->changed.wait_for(
      lock, Bound(60), [&] { return impl_->done || impl_->token_ids.size() >= count; }))
      << "no " << count << " tokens came";
}

absl::Status StreamedAnswer::Await() {
  std::unique_lock lock(impl_->mutex);
  const bool done = impl_->changed.wait_for(lock, Bound(120), [&] { return impl_->done; });
  return done ? impl_->status : absl::DeadlineExceededError("the stream hangs");
}

void StreamedAnswer::Cancel() { impl_->call.Cancel(); }

std::string StreamedAnswer::text() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->text;
}

std::vector<uint32_t> StreamedAnswer::token_ids() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->token_ids;
}

int StreamedAnswer::finishes() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->finishes;
}

v1::GenerateRequest LongGreedy(const std::string& prompt, uint32_t max_tokens) {
  v1::GenerateRequest request;
  v1::ChatMessage* message = request.mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content(prompt);
  request.mutable_sampling()->set_temperature(0);
  request.mutable_sampling()->set_max_tokens(max_tokens);
  request.mutable_sampling()->set_ignore_eos(true);
  return request;
}

bool Eventually(const std::function<bool()>& condition, int seconds) {
  const auto until = std::chrono::steady_clock::now() + Bound(seconds);
  while (std::chrono::steady_clock::now() < until) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // the servers need the cores
  }
  return condition();
}

std::string HttpRequest(int port, const std::string& method, const std::string& path,
                        const std::string& body) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  timeval timeout{60 * kSlowdown, 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
    close(fd);
    return "";
  }
  const std::string request =
      absl::StrCat(method, " ", path, " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n",
                   body.empty() ? "" : "Content-Type: application/json\r\n",
                   "Content-Length: ", body.size(), "\r\n\r\n", body);
  std::string answer;
  if (send(fd, request.data(), request.size(), MSG_NOSIGNAL) ==
      static_cast<ssize_t>(request.size())) {
    char buffer[16384];
    for (ssize_t n; (n = recv(fd, buffer, sizeof(buffer), 0)) > 0;) {
      answer.append(buffer, static_cast<size_t>(n));
    }
  }
  close(fd);
  return answer;
}

}  // namespace lockstep
