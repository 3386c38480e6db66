// A blocking client of lockstep.v1.Inference, for the commands. Thread-safe:
// several threads may call one client.
#ifndef LOCKSTEP_CLI_CLIENT_H_
#define LOCKSTEP_CLI_CLIENT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cli/server_access.h"
#include "proto/inference.pb.h"

namespace lockstep {

// Ends a call from another thread; calls after Cancel fail at once.
class CallHandle {
 public:
  CallHandle();
  ~CallHandle();
  void Cancel();

 private:
  friend class Client;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

class Client {
 public:
  // address: host:port or unix:path. Does not wait; see WaitReady.
  explicit Client(const std::string& address, const ServerAccess& access = {});
  ~Client();

  // Polls GetModelInfo until the server is ready, at most timeout_ms.
  // Unauthenticated at once. give_up: asked between polls; true ends the wait with Aborted.
  absl::StatusOr<v1::GetModelInfoResponse> WaitReady(int64_t timeout_ms,
                                                     const std::function<bool()>& give_up = {});
  absl::StatusOr<v1::GetModelInfoResponse> GetModelInfo();
  absl::StatusOr<v1::GenerateResponse> Generate(const v1::GenerateRequest& request,
                                                CallHandle* handle = nullptr);
  absl::StatusOr<v1::TokenizeResponse> Tokenize(const v1::TokenizeRequest& request);
  // on_event is called for every event in order. A refusal for want of room
  // comes back as ResourceExhausted; see RetryDelayMs.
  absl::Status GenerateStream(const v1::GenerateRequest& request,
                              const std::function<void(const v1::GenerateEvent&)>& on_event,
                              CallHandle* handle = nullptr);

  // What a refusal for want of room asks to wait; nothing when the status does not say.
  static std::optional<int64_t> RetryDelayMs(const absl::Status& status);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_CLIENT_H_
