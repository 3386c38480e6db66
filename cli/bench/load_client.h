// Hundreds of streams at a few microseconds of processor time a message: the
// client half of a measurement, which must not become what is measured.
//
//   LoadClient client(address, LanesFor(256));
//   RETURN_IF_ERROR(client.Connect(5'000));
//   std::vector<RequestLog> logs = client.RunAll(requests);
//
// A lane is a connection, a completion queue and a thread; streams are dealt to
// lanes in turn. Each stream reads into one message of its own that is parsed
// over again, so that nothing is allocated a token; texts are not looked at.
// Send may be called from any thread, a lane's included.
#ifndef LOCKSTEP_CLI_BENCH_LOAD_CLIENT_H_
#define LOCKSTEP_CLI_BENCH_LOAD_CLIENT_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "cli/bench/request_log.h"
#include "cli/server_access.h"
#include "proto/inference.pb.h"

namespace lockstep {

// One for every 32 streams, at most one a processor.
int LanesFor(int64_t streams);

class LoadClient {
 public:
  // Called on the lane's thread once the stream has ended, however it did.
  using Done = std::function<void(RequestLog)>;
  // Called on the lane's thread with every event of a stream, in order.
  using Observe = std::function<void(const v1::GenerateEvent&)>;

  LoadClient(const std::string& address, int lanes, const ServerAccess& access = {});
  ~LoadClient();  // cancels what still runs

  // Waits for every lane's connection: set-up is no part of a latency.
  absl::Status Connect(int64_t timeout_ms);

  // Starts a stream. due_ns: when it should have been sent; 0: now.
  void Send(const v1::GenerateRequest& request, int64_t due_ns, Done done, Observe observe = {});

  // All at once; returns when all have ended, in their order.
  std::vector<RequestLog> RunAll(const std::vector<v1::GenerateRequest>& requests);

  // Ends every stream with Cancelled, and those that are sent later. Any thread.
  void Cancel();
  bool cancelled() const { return cancelled_; }

 private:
  struct Lane;
  class Call;

  std::vector<std::unique_ptr<Lane>> lanes_;
  std::atomic<size_t> next_lane_ = 0;
  std::atomic<bool> cancelled_ = false;
};

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_BENCH_LOAD_CLIENT_H_
