#include "coordinator/api/http/http_server.h"

#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <chrono>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/log.h"
#include "coordinator/api/address.h"
#include "coordinator/api/http/connection.h"
#include "coordinator/api/http/tls_context.h"

namespace lockstep {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

}  // namespace

struct HttpServer::Impl {
  Impl(HttpServerOptions options, HttpHandler* handler)
      : state(std::make_shared<ServerState>(std::move(options), handler)),
        strand(asio::make_strand(io)),
        acceptor(strand),
        pause(strand) {
    if (state->options.tls.enabled()) tls.emplace(state->options.tls);
  }

  asio::awaitable<void> Accept();
  bool HasRoom();
  bool CloseLongestIdle();
  void TurnAway(tcp::socket socket);

  const std::shared_ptr<ServerState> state;
  asio::io_context io;
  const asio::strand<asio::io_context::executor_type> strand;  // of what follows
  tcp::acceptor acceptor;
  asio::steady_timer pause;
  std::optional<TlsContext> tls;
  std::vector<std::thread> threads;
  int port = 0;
};

asio::awaitable<void> HttpServer::Impl::Accept() {
  while (acceptor.is_open()) {
    tcp::socket socket{asio::any_io_executor(asio::make_strand(io))};
    error_code ec;
    co_await acceptor.async_accept(socket, asio::redirect_error(asio::use_awaitable, ec));
    if (!acceptor.is_open()) co_return;
    if (ec) {
      // Out of descriptors: those that finish give theirs back, as who asks nothing does now.
      CloseLongestIdle();
      LogWarning(absl::StrCat("http: accept: ", ec.message()));
      pause.expires_after(std::chrono::milliseconds(100));
      co_await pause.async_wait(asio::redirect_error(asio::use_awaitable, ec));
      continue;
    }
    if (!HasRoom() && !CloseLongestIdle()) {
      TurnAway(std::move(socket));
    } else {
      std::make_shared<Connection>(std::move(socket), state, tls ? tls->Current() : nullptr)
          ->Start();
    }
  }
}

bool HttpServer::Impl::HasRoom() {
  const std::lock_guard lock(state->mutex);
  return state->connections.size() < state->options.max_connections;
}

// Clients keep far more connections than they use. False: all are in use.
bool HttpServer::Impl::CloseLongestIdle() {
  const std::lock_guard lock(state->mutex);
  const auto longest = state->idle.begin();
  if (longest == state->idle.end()) return false;
  longest->second->CloseSoonIfIdle();
  state->idle.erase(longest);
  return true;
}

void HttpServer::Impl::TurnAway(tcp::socket socket) {
  if (tls) return;  // closed: a handshake is more than it may cost
  const HttpReply reply = state->handler->RefuseMalformed(503, "too many connections");
  const std::string bytes =
      absl::StrCat("HTTP/1.1 503 Service Unavailable\r\nContent-Type: ", reply.content_type,
                   "\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: ", reply.body.size(),
                   "\r\n\r\n", reply.body);
  error_code ignored;
  socket.non_blocking(true, ignored);
  socket.write_some(asio::buffer(bytes), ignored);
  socket.shutdown(tcp::socket::shutdown_send, ignored);
}

HttpServer::HttpServer(HttpServerOptions options, HttpHandler* handler)
    : impl_(std::make_unique<Impl>(std::move(options), handler)) {}

HttpServer::~HttpServer() { Stop(0); }

absl::Status HttpServer::Start() {
  const HttpServerOptions& options = impl_->state->options;
  if (impl_->tls) {
    if (absl::Status status = impl_->tls->Load(); !status.ok()) return status;
  }
  absl::Status free = CheckCanBind(options.host, options.port, options.flag);
  if (!free.ok()) return free;
  error_code ec;
  tcp::resolver resolver(impl_->io);
  const auto found =
      resolver.resolve(options.host, std::to_string(options.port), tcp::resolver::passive, ec);
  tcp::acceptor& acceptor = impl_->acceptor;
  if (!ec && found.empty()) ec = asio::error::host_not_found;
  if (!ec) acceptor.open(found.begin()->endpoint().protocol(), ec);
  if (!ec) acceptor.set_option(asio::socket_base::reuse_address(true), ec);
  if (!ec) acceptor.bind(found.begin()->endpoint(), ec);
  if (!ec) acceptor.listen(asio::socket_base::max_listen_connections, ec);
  if (ec) {
    return absl::UnavailableError(absl::StrCat(options.flag, " ", options.port, ": ",
                                               HostPort(options.host, options.port), ": ",
                                               ec.message(), "; choose another port"));
  }
  impl_->port = acceptor.local_endpoint().port();
  asio::co_spawn(
      impl_->strand, [impl = impl_.get()] { return impl->Accept(); }, asio::detached);
  for (int i = 0; i < options.threads; ++i) {
    impl_->threads.emplace_back([impl = impl_.get()] { impl->io.run(); });
  }
  return absl::OkStatus();
}

int HttpServer::port() const { return impl_->port; }

void HttpServer::Stop(int64_t grace_ms) {
  if (impl_->threads.empty()) return;
  ServerState& state = *impl_->state;
  {
    std::unique_lock lock(state.mutex);
    state.changed.wait_for(lock, std::chrono::milliseconds(grace_ms),
                           [&] { return state.exchanges == 0; });
  }
  asio::post(impl_->strand, [impl = impl_.get()] {
    error_code ignored;
    impl->acceptor.close(ignored);
    impl->pause.cancel();
  });
  state.stopping = true;
  {
    const std::lock_guard lock(state.mutex);
    for (Connection* connection : state.connections) connection->CloseSoon();
  }
  // Connections end by themselves now, and with the last of them so does run().
  for (std::thread& thread : impl_->threads) thread.join();
  impl_->threads.clear();
}

}  // namespace lockstep
