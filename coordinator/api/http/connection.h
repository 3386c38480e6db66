// One connection of the HTTP server: reads requests, pulls their answers, keeps
// time. Private to http_server.cc.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_CONNECTION_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_CONNECTION_H_

// clang-format off
#include <utility>  // first: Boost 1.74's awaitable.hpp uses std::exchange without it
// clang-format on
#include <boost/asio/awaitable.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl/stream.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "coordinator/api/http/server_state.h"

namespace lockstep {

// Everything of a connection happens on its strand, which is the socket's
// executor. One coroutine reads requests and writes answers; one read may be
// pending beside it and only ever appends to in_.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  // Speaks TLS when there is a context.
  Connection(boost::asio::ip::tcp::socket socket, std::shared_ptr<ServerState> state,
             std::shared_ptr<boost::asio::ssl::context> tls);
  ~Connection();

  void Start();
  // From any thread.
  void CloseSoon();
  // Likewise, unless a request has begun by then.
  void CloseSoonIfIdle();

 private:
  using Clock = std::chrono::steady_clock;
  template <typename T>
  using Awaitable = boost::asio::awaitable<T>;
  struct Received;
  class IdleMark;

  Awaitable<void> Run();
  Awaitable<bool> Handshake();
  Awaitable<Received> ReadRequest();
  // Whether the connection may go on.
  Awaitable<bool> Answer(Received received);
  // False when the client is gone, or reads nothing for too long.
  Awaitable<bool> Write(std::string bytes);
  // Says that nothing more comes, and lets the client say so too.
  Awaitable<void> Linger();
  // Until Wake, one since the last Wait included, or the deadline.
  Awaitable<void> Wait(Clock::time_point deadline);

  void StartRead(size_t size);
  // The connection ends if write_limit_ does not move on in time.
  void LimitTime(int64_t ms);
  void Wake();
  void Close();

  boost::asio::ip::tcp::socket socket_;
  const std::shared_ptr<boost::asio::ssl::context> context_;
  std::optional<boost::asio::ssl::stream<boost::asio::ip::tcp::socket&>> tls_;
  boost::asio::steady_timer wake_;
  boost::asio::steady_timer write_limit_;
  const std::shared_ptr<ServerState> state_;
  std::string in_;  // received and not yet parsed
  std::vector<char> chunk_;
  bool reading_ = false;
  bool eof_ = false;
  bool closed_ = false;
  bool woken_ = false;
  bool idle_ = false;  // between requests
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_CONNECTION_H_
