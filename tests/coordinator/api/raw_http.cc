#include "tests/coordinator/api/raw_http.h"

#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "common/check.h"

namespace lockstep {

nlohmann::json RawResponse::error() const {
  const nlohmann::json whole = json();
  if (!whole.is_object() || whole.size() != 1 || !whole.contains("error")) return nullptr;
  const nlohmann::json& error = whole["error"];
  if (!error.is_object() || error.size() != 4) return nullptr;
  for (const char* key : {"message", "type", "param", "code"}) {
    if (!error.contains(key)) return nullptr;
  }
  return error;
}

RawClient::RawClient(int port) {
  fd_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  LOCKSTEP_CHECK(fd_ >= 0);
  const timeval patience = {.tv_sec = 20, .tv_usec = 0};
  setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  LOCKSTEP_CHECK(connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0);
}

RawClient::~RawClient() { Close(); }

void RawClient::Close() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

void RawClient::Reset() {
  const linger hard = {.l_onoff = 1, .l_linger = 0};
  setsockopt(fd_, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
  Close();
}

void RawClient::ShutdownSend() { shutdown(fd_, SHUT_WR); }

bool RawClient::Send(const std::string& bytes) {
  size_t sent = 0;
  while (sent < bytes.size()) {
    const ssize_t n = send(fd_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (n <= 0) return false;
    sent += static_cast<size_t>(n);
  }
  return true;
}

bool RawClient::Fill() {
  char bytes[65536];
  const ssize_t n = recv(fd_, bytes, sizeof bytes, 0);
  if (n <= 0) return false;
  buffer_.append(bytes, static_cast<size_t>(n));
  return true;
}

bool RawClient::ReadLine(std::string* line) {
  size_t end;
  while ((end = buffer_.find("\r\n")) == std::string::npos) {
    if (!Fill()) return false;
  }
  *line = buffer_.substr(0, end);
  buffer_.erase(0, end + 2);
  return true;
}

RawResponse RawClient::Read(bool head_only) {
  RawResponse response;
  std::string line;
  if (!ReadLine(&line) || !line.starts_with("HTTP/1.1 ")) return {};
  const int status = std::atoi(line.c_str() + 9);
  while (ReadLine(&line) && !line.empty()) {
    const size_t colon = line.find(": ");
    if (colon == std::string::npos) return {};
    std::string name = line.substr(0, colon);
    std::transform(name.begin(), name.end(), name.begin(),
                   [](unsigned char c) { return std::tolower(c); });
    response.headers[name] = line.substr(colon + 2);
  }
  if (status == 100) return Read(head_only);
  response.status = status;
  if (head_only) return response;
  if (response.headers.contains("content-length")) {
    const size_t length = std::stoul(response.headers["content-length"]);
    while (buffer_.size() < length) {
      if (!Fill()) return {};
    }
    response.body = buffer_.substr(0, length);
    buffer_.erase(0, length);
    return response;
  }
  const auto encoding = response.headers.find("transfer-encoding");
  if (encoding == response.headers.end() || encoding->second != "chunked") {
    while (Fill()) {
    }
    response.body.swap(buffer_);
    return response;
  }
  for (;;) {
    if (!ReadLine(&line)) return {};
    const size_t length = std::stoul(line, nullptr, 16);
    while (buffer_.size() < length + 2) {
      if (!Fill()) return {};
    }
    if (buffer_.compare(length, 2, "\r\n") != 0) return {};
    const std::string chunk = buffer_.substr(0, length);
    buffer_.erase(0, length + 2);
    if (length == 0) return response;
    response.chunks.push_back(chunk);
    response.body += chunk;
  }
}

bool RawClient::WaitFor(const std::string& text) {
  while (buffer_.find(text) == std::string::npos) {
    if (!Fill()) return false;
  }
  return true;
}

bool RawClient::Readable(int timeout_ms) {
  pollfd poller = {.fd = fd_, .events = POLLIN, .revents = 0};
  return poll(&poller, 1, timeout_ms) > 0;
}

std::optional<std::string> RawClient::ReadToEnd() {
  char bytes[65536];
  for (;;) {
    const ssize_t n = recv(fd_, bytes, sizeof bytes, 0);
    if (n < 0) return {};
    if (n == 0) return std::exchange(buffer_, {});
    buffer_.append(bytes, static_cast<size_t>(n));
  }
}

RawResponse Get(int port, const std::string& path) {
  RawClient client(port);
  client.Send("GET " + path + " HTTP/1.1\r\nHost: x\r\n\r\n");
  return client.Read();
}

std::string PostBytes(const std::string& path, const std::string& body,
                      const std::string& headers) {
  return "POST " + path + " HTTP/1.1\r\nHost: x\r\n" + headers +
         "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
}

RawResponse Post(int port, const std::string& path, const std::string& body,
                 const std::string& headers) {
  RawClient client(port);
  client.Send(PostBytes(path, body, headers));
  return client.Read();
}

std::vector<std::string> Events(const std::string& body) {
  std::vector<std::string> events;
  size_t at = 0;
  while (at < body.size()) {
    const size_t end = body.find("\n\n", at);
    if (end == std::string::npos || body.compare(at, 6, "data: ") != 0) {
      events.push_back("MALFORMED");
      return events;
    }
    events.push_back(body.substr(at + 6, end - at - 6));
    at = end + 2;
  }
  return events;
}

}  // namespace lockstep
