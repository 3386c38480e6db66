// What the connections of the HTTP server share, and what each takes of it for a
// while. Private to http_server.cc and connection.cc.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_SERVER_STATE_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_SERVER_STATE_H_

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

#include "coordinator/api/http/exchange.h"
#include "coordinator/api/http/http_server.h"

namespace lockstep {

class Connection;

struct ServerState {
  explicit ServerState(HttpServerOptions o, HttpHandler* h) : options(std::move(o)), handler(h) {}

  const HttpServerOptions options;
  HttpHandler* const handler;
  std::atomic<size_t> body_bytes = 0;
  std::atomic<bool> stopping = false;
  std::mutex mutex;
  std::condition_variable changed;
  std::set<Connection*> connections;     // guarded by mutex, as what follows
  std::map<uint64_t, Connection*> idle;  // between requests, the longest first
  uint64_t times_idle = 0;
  size_t most_connections = 0;  // since memory was last given back
  size_t exchanges = 0;
};

// Bytes of a body that is held, counted among those of all connections. Given back
// from any thread.
class BodyLease {
 public:
  explicit BodyLease(std::shared_ptr<ServerState> state) : state_(std::move(state)) {}
  ~BodyLease();
  BodyLease(const BodyLease&) = delete;
  BodyLease& operator=(const BodyLease&) = delete;

  // Never less than before; false when all bodies together are too much.
  bool Resize(size_t bytes);

 private:
  const std::shared_ptr<ServerState> state_;
  size_t held_ = 0;
};

// Counts an exchange under way, for Stop.
class BusyGuard {
 public:
  explicit BusyGuard(std::shared_ptr<ServerState> state);
  ~BusyGuard();
  BusyGuard(const BusyGuard&) = delete;
  BusyGuard& operator=(const BusyGuard&) = delete;

 private:
  const std::shared_ptr<ServerState> state_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_SERVER_STATE_H_
