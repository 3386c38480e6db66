// Bytes on a connection of the HTTP server, over a real socket: framing, limits,
// pipelining. The first two bytes say where the client pauses. Whatever comes,
// the server answers each request that it hands on, in whole answers, and is
// through with the connection once the client has said its last.
#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <memory>
#include <string>
#include <utility>

#include "common/check.h"
#include "coordinator/api/http/http_server.h"
#include "tests/fuzz/fuzz_input.h"

namespace lockstep::fuzz {
namespace {

// Two parts of an answer whose length is not known at first.
class TwoParts final : public Exchange {
 public:
  std::optional<Part> Next() override {
    if (std::exchange(begun_, true)) return Part{.head = {}, .body = "two", .last = true};
    return Part{.head = HttpReply{.status = 200, .headers = {}, .body = "one"}, .body = {}};
  }
  void SetWaker(std::function<void()>) override {}
  void Abandon() override {}

 private:
  bool begun_ = false;
};

class Handler final : public HttpHandler {
 public:
  std::shared_ptr<Exchange> Handle(HttpRequest request) override {
    LOCKSTEP_CHECK(!request.method.empty());
    LOCKSTEP_CHECK(request.path.find('?') == std::string::npos);
    LOCKSTEP_CHECK(request.body.size() <= limits::kBodyBytes);
    ++replies;
    if (request.path == "/s") return std::make_shared<TwoParts>();
    return std::make_shared<ReadyExchange>(HttpReply{.headers = {}, .body = request.body});
  }
  HttpReply RefuseMalformed(int status, const std::string& message) override {
    LOCKSTEP_CHECK(status >= 400 && status < 600 && !message.empty());
    ++replies;
    return {.status = status, .headers = {}, .body = message};
  }

  std::atomic<int> replies = 0;
};

struct Server {
  Server() : http({.port = 0, .threads = 1, .tls = {}}, &handler) {
    LOCKSTEP_CHECK(http.Start().ok());
  }
  Handler handler;
  HttpServer http;
};

// Whether the answer has as many heads as the server gave replies; those in the
// echoed bodies count as well, so that there may be more.
void RequireHeads(const std::string& answer, int replies) {
  int heads = 0;
  for (size_t at = 0; (at = answer.find("HTTP/1.1 ", at)) != std::string::npos; ++at) ++heads;
  LOCKSTEP_CHECK(heads >= replies);
  LOCKSTEP_CHECK(answer.empty() || answer.starts_with("HTTP/1.1 "));
}

bool Send(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(n));
  }
  return true;
}

void Talk(Server* server, Input input) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(server->http.port()));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  LOCKSTEP_CHECK(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0);
  // No TIME_WAIT: a fuzzer would run out of ports.
  const linger none{1, 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof(none));

  server->handler.replies = 0;
  const size_t pause = input.Byte() | static_cast<size_t>(input.Byte()) << 8;
  if (Send(fd, input.Take(pause)) && Send(fd, input.Rest())) shutdown(fd, SHUT_WR);
  std::string answer;
  for (char buffer[4096];;) {
    pollfd readable{fd, POLLIN, 0};
    int ready;
    // The fuzzer's own alarm interrupts.
    while ((ready = poll(&readable, 1, 20'000)) < 0 && errno == EINTR) {
    }
    LOCKSTEP_CHECK(ready == 1);  // else the server forgot the connection
    const ssize_t n = recv(fd, buffer, sizeof(buffer), 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) break;  // reset: what it had sent may be lost
    if (n == 0) {
      RequireHeads(answer, server->handler.replies);
      break;
    }
    answer.append(buffer, static_cast<size_t>(n));
  }
  close(fd);
}

}  // namespace
}  // namespace lockstep::fuzz

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static auto& server = *new lockstep::fuzz::Server();
  lockstep::fuzz::Talk(&server, {data, size});
  return 0;
}
