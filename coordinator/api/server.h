// The public plane: the gRPC door and the HTTP door over one engine and one
// validated request path. Made by the coordinator's main, before the engine:
//
//   ApiServer api(api_options, std::move(model));
//   engine_options.on_change = [&api](const EngineInfo& i) { api.OnEngineChange(i); };
//   Engine engine(engine_options, std::move(group), api.observer());
//   RETURN_IF_ERROR(api.Start(&engine));   // answers from here on: 503 / UNAVAILABLE until ready
//   engine.Start();
//   ...                                    // SIGTERM:
//   api.BeginLeaving();                    // not ready, so that no more is sent here; still serves
//   api.BeginDrain();                      // new work gets 503 / UNAVAILABLE, ports stay open
//   engine.Drain(drain_timeout_ms);        // running streams finish
//   api.Stop(grace_ms);                    // last bytes go out, ports close
//
// The engine must outlive Stop. Start and Stop: one thread; the rest is
// thread-safe.
#ifndef LOCKSTEP_COORDINATOR_API_SERVER_H_
#define LOCKSTEP_COORDINATOR_API_SERVER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "common/tls_files.h"
#include "coordinator/api/grpc_door.h"
#include "coordinator/api/limits.h"
#include "coordinator/api/served_model.h"
#include "coordinator/engine.h"
#include "coordinator/engine_client.h"
#include "coordinator/group_watch.h"

namespace lockstep {

struct ApiOptions {
  std::string host = "127.0.0.1";  // other than loopback needs TLS or `insecure`
  int http_port = 8000;            // 0 picks a free one; -1 leaves the door shut
  int grpc_port = 50051;           // likewise
  int health_port = -1;            // likewise: /health and /ready in plain text, for probers
  bool insecure = false;
  bool reflection = false;
  TlsFiles tls;                              // of both doors
  std::string api_key_file;                  // "": everybody may ask
  std::vector<std::string> allowed_origins;  // of pages in browsers; "*" is all of them
  uint32_t max_http_connections = limits::kHttpConnections;
  // Where lockstep.v1.Admin answers: loopback or unix:PATH; "" for nowhere.
  std::string admin_address;
  int64_t ping_interval_ms = limits::kSsePingSeconds * 1000;
  int64_t write_timeout_ms = limits::kHttpWriteSeconds * 1000;
  GrpcPings grpc_pings;
  int text_threads = 2;
};

class ApiServer {
 public:
  ApiServer(ApiOptions options, ServedModel model);
  ~ApiServer();  // Stop(0) if still running

  // For the engine: feeds the metrics.
  std::shared_ptr<EngineObserver> observer();
  // Before Start: metrics of the devices, and what lockstep.v1.Admin asks. `watch`
  // outlives Stop.
  void Watch(GroupWatch* watch);
  // For EngineOptions::on_change: the health service follows the state.
  void OnEngineChange(const EngineInfo& info);
  // Where the coordinator's start-up seconds went, for GetModelInfo and metrics.
  void SetStartup(std::vector<std::pair<std::string, double>> phases);

  // Opens both doors. One line that names the flag and the port when a port is
  // taken or the host needs --insecure.
  absl::Status Start(EngineClient* engine);
  int http_port() const;  // the bound ones
  int grpc_port() const;
  int health_port() const;

  std::string admin_address() const;  // "" where it is shut

  // /ready and the health service say no from here on, so that balancers turn
  // away; what still comes is served.
  void BeginLeaving();
  // No new work from here on; what runs goes on.
  void BeginDrain();
  // Waits at most grace_ms for open answers to be written, then closes both
  // doors and cancels what is left.
  void Stop(int64_t grace_ms);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_SERVER_H_
