// A worker's life: dial the coordinator, say what it is, do what it is told,
// and start over when the coordinator is gone. Four threads:
//
//   Run's caller   dials; watches: the coordinator silent, an epoch not let go of
//   reader         reads the stream and hands on; blocks on nothing else
//   runner         computes (epoch_runner.h)
//   heartbeat      every 250 ms, whatever the others do
//
// The coordinator silent for kHeartbeatTimeoutMs, or the stream broken: the
// worker fences itself (the epoch is dropped, the weights stay) and dials again,
// for ever, with pauses of 100 ms growing to 2 s. It never runs a collective of
// its own accord, and decides nothing by its own clock but when to give up.
#ifndef LOCKSTEP_WORKER_SESSION_H_
#define LOCKSTEP_WORKER_SESSION_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "proto/worker.pb.h"
#include "wire/protocol.h"
#include "worker/epoch_runner.h"
#include "worker/model_host.h"
#include "worker/plane.h"

namespace lockstep {

struct SessionOptions {
  worker::v1::Hello hello;  // preferred_rank is replaced once weights are loaded
  // Bytes in total and free, asked at every dial; may be empty.
  std::function<std::pair<uint64_t, uint64_t>()> read_memory;
  // What the device's driver says, once a sample; may be empty.
  std::function<std::optional<worker::v1::DeviceStats>()> take_device_stats;
  std::string comm_address;  // empty: the stream's local address
  EpochRunnerOptions runner;
  // Shortened by tests.
  int64_t heartbeat_interval_ms = wire::kHeartbeatIntervalMs;
  int64_t heartbeat_timeout_ms = wire::kHeartbeatTimeoutMs;
  int64_t release_timeout_ms = wire::kReleaseTimeoutMs;
  int64_t min_pause_ms = 100, max_pause_ms = 2'000;  // between dials
};

enum class SessionEnd {
  kStopped,    // Stop was called
  kShutdown,   // the coordinator said so
  kRefused,    // the coordinator will not have it: do not come back
  kForbidden,  // this host's own flags forbid the dial
  kStuck,      // an epoch could not be let go of in time: end the process
};

class Session {
 public:
  Session(SessionOptions options, std::unique_ptr<Plane> plane, std::unique_ptr<ModelHost> host);
  // Waits for the runner's thread; see idle().
  ~Session();

  // Once. The outcome is logged.
  SessionEnd Run();
  // Any thread: Run returns soon. Not for a signal handler.
  void Stop();
  // After Run: whether nothing computes any more, so that destruction is quick.
  bool idle() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_SESSION_H_
