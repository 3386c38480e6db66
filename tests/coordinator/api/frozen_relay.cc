#include "tests/coordinator/api/frozen_relay.h"

#include <arpa/inet.h>
#include <linux/filter.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <vector>

#include "common/check.h"

namespace lockstep {
namespace {

sockaddr_in Loopback(int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

bool WaitAtLeast(const std::atomic<size_t>& count, size_t bytes) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (count < bytes) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::yield();
  }
  return true;
}

}  // namespace

FrozenRelay::FrozenRelay(int target_port) : target_port_(target_port) {
  listener_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof address;
  LOCKSTEP_CHECK(bind(listener_, reinterpret_cast<sockaddr*>(&address), size) == 0);
  LOCKSTEP_CHECK(listen(listener_, 8) == 0);
  LOCKSTEP_CHECK(getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  port_ = ntohs(address.sin_port);
  LOCKSTEP_CHECK(pipe(wake_) == 0);
  thread_ = std::thread([this] { Run(); });
}

FrozenRelay::~FrozenRelay() {
  Stop();
  for (const auto& [fd, peer] : peer_) close(fd);
  for (const int fd : {listener_, wake_[0], wake_[1]}) close(fd);
}

void FrozenRelay::Stop() {
  if (!thread_.joinable()) return;
  LOCKSTEP_CHECK(write(wake_[1], "x", 1) == 1);
  thread_.join();
}

void FrozenRelay::Freeze() { Stop(); }

void FrozenRelay::Vanish() {
  Stop();
  // Every packet is dropped before TCP sees it, so that nothing answers it.
  sock_filter drop = BPF_STMT(BPF_RET | BPF_K, 0);
  const sock_fprog program = {.len = 1, .filter = &drop};
  for (const auto& [fd, is_server] : server_) {
    if (!is_server) continue;
    LOCKSTEP_CHECK(setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) == 0);
  }
}

bool FrozenRelay::WaitFromServer(size_t bytes) const { return WaitAtLeast(from_server_, bytes); }
bool FrozenRelay::WaitFromClient(size_t bytes) const { return WaitAtLeast(from_client_, bytes); }

void FrozenRelay::Run() {
  for (;;) {
    std::vector<pollfd> watched = {{wake_[0], POLLIN, 0}, {listener_, POLLIN, 0}};
    for (const auto& [fd, peer] : peer_) watched.push_back({fd, POLLIN, 0});
    LOCKSTEP_CHECK(poll(watched.data(), watched.size(), -1) > 0);
    if (watched[0].revents != 0) return;
    if (watched[1].revents != 0) Accept();
    for (size_t i = 2; i < watched.size(); ++i) {
      const int fd = watched[i].fd;
      if (watched[i].revents == 0 || !peer_.contains(fd) || Forward(fd)) continue;
      for (const int end : {peer_[fd], fd}) {
        peer_.erase(end);
        server_.erase(end);
        close(end);
      }
    }
  }
}

void FrozenRelay::Accept() {
  const int client = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
  const int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  LOCKSTEP_CHECK(client >= 0 && server >= 0);
  // Little room, so that little unread data stops the door's writes.
  const int room = 4096;
  setsockopt(server, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
  const sockaddr_in address = Loopback(target_port_);
  LOCKSTEP_CHECK(connect(server, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
  peer_[client] = server;
  peer_[server] = client;
  server_[client] = false;
  server_[server] = true;
}

bool FrozenRelay::Forward(int from) {
  char bytes[4096];
  const ssize_t count = recv(from, bytes, sizeof bytes, 0);
  if (count <= 0) return false;
  for (ssize_t sent = 0; sent < count;) {
    const ssize_t n =
        send(peer_[from], bytes + sent, static_cast<size_t>(count - sent), MSG_NOSIGNAL);
    if (n <= 0) return false;
    sent += n;
  }
  (server_[from] ? from_server_ : from_client_) += static_cast<size_t>(count);
  return true;
}

}  // namespace lockstep
