// The HTTP/1.1 server under the routes: connections, limits, time limits,
// keep-alive, pipelining, chunked answers. Two I/O threads, a coroutine per
// connection; a connection waiting for tokens costs no thread.
//
// While an answer is being made the socket stays watched, so a client that
// leaves is noticed at once and its exchange abandoned.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_HTTP_SERVER_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_HTTP_SERVER_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "common/tls_files.h"
#include "coordinator/api/http/exchange.h"
#include "coordinator/api/limits.h"

namespace lockstep {

// The defaults are the table's; tests shorten them.
struct HttpServerOptions {
  std::string host = "127.0.0.1";
  int port = 8000;                   // 0 picks one
  const char* flag = "--http-port";  // that said so, for errors
  uint32_t max_connections = limits::kHttpConnections;
  int threads = 2;
  int64_t header_timeout_ms = limits::kHttpHeaderSeconds * 1000;
  int64_t body_timeout_ms = limits::kHttpBodySeconds * 1000;
  int64_t idle_timeout_ms = limits::kHttpIdleSeconds * 1000;
  int64_t write_timeout_ms = limits::kHttpWriteSeconds * 1000;
  int64_t ping_interval_ms = limits::kSsePingSeconds * 1000;
  TlsFiles tls = {};
};

class HttpServer {
 public:
  HttpServer(HttpServerOptions options, HttpHandler* handler);  // handler outlives the server
  ~HttpServer();                                                // Stop(0)

  // One line that names the port's flag when the address cannot be had, or the
  // certificate's.
  absl::Status Start();
  int port() const;
  // Waits at most grace_ms for exchanges under way, then closes everything.
  void Stop(int64_t grace_ms);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_HTTP_SERVER_H_
