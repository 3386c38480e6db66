// A coordinator for tests of the worker: a real gRPC server whose streams the
// test drives by hand. Relays communicator keys and sends heartbeats by itself.
// Thread-safe; every wait is for a condition, with a bound.
#ifndef LOCKSTEP_TESTS_FAKES_FAKE_COORDINATOR_H_
#define LOCKSTEP_TESTS_FAKES_FAKE_COORDINATOR_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "proto/worker.pb.h"

namespace lockstep::fakes {

class FakeCoordinator {
 public:
  // address: "127.0.0.1:0" or "unix:PATH". `heartbeat_ms` 0: none by itself.
  explicit FakeCoordinator(const std::string& address, int64_t heartbeat_ms = 50);
  ~FakeCoordinator();  // cuts every stream

  const std::string& address() const;

  // Streams are numbered by arrival, from 0. Blocks until that many have come
  // and said Hello; empty when the bound passes.
  std::optional<worker::v1::Hello> AwaitHello(size_t stream);
  void Send(size_t stream, const worker::v1::CoordinatorMessage& message);
  // The next message of a stream for which `wanted` holds; earlier ones are
  // passed over (heartbeats without figures of a device and keys always). Empty when the bound
  // passes.
  std::optional<worker::v1::WorkerMessage> Await(
      size_t stream, const std::function<bool(const worker::v1::WorkerMessage&)>& wanted,
      int64_t bound_ms = 20'000);
  std::optional<worker::v1::WorkerMessage> AwaitCase(size_t stream,
                                                     worker::v1::WorkerMessage::MessageCase wanted,
                                                     int64_t bound_ms = 20'000);
  bool AwaitEnd(size_t stream, int64_t bound_ms = 20'000);  // the worker has left it
  size_t num_heartbeats(size_t stream) const;

  // Neither heartbeats nor relays until told otherwise: alive, but silent.
  void FallSilent(bool silent);
  // Ends the stream from this side.
  void Cut(size_t stream);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep::fakes

#endif  // LOCKSTEP_TESTS_FAKES_FAKE_COORDINATOR_H_
