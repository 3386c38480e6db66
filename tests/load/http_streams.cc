#include "tests/load/http_streams.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <string_view>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "nlohmann/json.hpp"

namespace lockstep {
namespace {

constexpr int kMsBetweenSips = 250;
constexpr size_t kSip = 64;

int Connect(int port, bool small_buffer) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (small_buffer) {
    const int bytes = 1;  // the kernel makes it its least
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof(bytes));
  }
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) return fd;
  close(fd);
  return -1;
}

}  // namespace

HttpStreams::HttpStreams(int port, Reading reading)
    : port_(port), reading_(reading), epoll_(epoll_create1(EPOLL_CLOEXEC)) {
  thread_ = std::thread([this] { Loop(); });
}

HttpStreams::~HttpStreams() {
  stopping_ = true;
  thread_.join();
  for (const auto& [fd, stream] : streams_) close(fd);
  close(epoll_);
}

bool HttpStreams::Send(const std::string& body, Done done) {
  const int fd = Connect(port_, reading_ == Reading::kTrickle);
  if (fd < 0) return false;
  const std::string request = absl::StrCat(
      "POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: ",
      body.size(), "\r\n\r\n", body);
  if (send(fd, request.data(), request.size(), MSG_NOSIGNAL) !=
      static_cast<ssize_t>(request.size())) {
    close(fd);
    return false;
  }
  ++open_;
  {
    const std::lock_guard lock(mutex_);
    streams_[fd] = {.answer = {}, .done = std::move(done)};
  }
  if (reading_ != Reading::kTrickle) {
    epoll_event event{.events = EPOLLIN, .data = {.fd = fd}};
    epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
  }
  return true;
}

bool HttpStreams::Read(int fd, Stream* stream) {
  std::array<char, 16 * 1024> buffer;
  ssize_t n = 0;
  switch (reading_) {
    case Reading::kKeep:
      n = recv(fd, buffer.data(), buffer.size(), 0);
      if (n > 0) stream->answer.append(buffer.data(), static_cast<size_t>(n));
      return n > 0;
    case Reading::kDiscard:
      return recv(fd, nullptr, 1 << 20, MSG_TRUNC) > 0;
    case Reading::kTrickle:
      n = recv(fd, buffer.data(), kSip, MSG_DONTWAIT);
      return n > 0 || (n < 0 && errno == EAGAIN);
  }
  return false;
}

void HttpStreams::Loop() {
  std::array<epoll_event, 64> events;
  while (!stopping_) {
    std::vector<int> ready;
    if (reading_ == Reading::kTrickle) {
      epoll_wait(epoll_, events.data(), 1, kMsBetweenSips);
      const std::lock_guard lock(mutex_);
      for (const auto& [fd, stream] : streams_) ready.push_back(fd);
    } else {
      const int count =
          epoll_wait(epoll_, events.data(), static_cast<int>(events.size()), /*timeout=*/50);
      for (int i = 0; i < count; ++i) ready.push_back(events[static_cast<size_t>(i)].data.fd);
    }
    for (const int fd : ready) {
      Stream ended;
      {
        const std::lock_guard lock(mutex_);
        const auto it = streams_.find(fd);
        if (it == streams_.end() || Read(fd, &it->second)) continue;
        ended = std::move(it->second);
        streams_.erase(it);
      }
      close(fd);
      --open_;
      ended.done(std::move(ended.answer));
    }
  }
}

HttpAnswer ReadAnswer(const std::string& bytes) {
  HttpAnswer answer;
  if (!absl::StartsWith(bytes, "HTTP/1.1 200 ")) return answer;
  bool finished = false;
  for (const auto& piece : absl::StrSplit(bytes, "\n\n")) {
    const std::string line(piece.data(), piece.size());
    const size_t data = line.rfind("data: ");
    if (data == std::string::npos) continue;
    if (line.compare(data, std::string::npos, "data: [DONE]") == 0) {
      answer.whole = finished;
      continue;
    }
    const auto chunk = nlohmann::json::parse(line.substr(data + 6), nullptr, false);
    if (!chunk.is_object() || !chunk.contains("choices") || chunk["choices"].empty()) continue;
    const auto& choice = chunk["choices"][0];
    answer.text += choice.value("text", "");
    if (choice.contains("token_ids") && choice["token_ids"].is_array()) {
      for (const auto& id : choice["token_ids"]) answer.token_ids.push_back(id.get<uint32_t>());
    }
    if (choice.contains("finish_reason") && choice["finish_reason"].is_string()) finished = true;
  }
  return answer;
}

}  // namespace lockstep
