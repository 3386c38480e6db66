// The gRPC end of the private plane: accepts workers' Attach calls, parses what
// they send and writes what they are sent. Knows no epochs. Thread-safe.
//
// Writes never block: each stream has a queue, one write under way, and a bound
// beyond which the stream is cut (a worker that does not read is not alive).
// A message for several streams is serialised once.
#ifndef LOCKSTEP_COORDINATOR_GROUP_ATTACH_SERVER_H_
#define LOCKSTEP_COORDINATOR_GROUP_ATTACH_SERVER_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/tls_files.h"
#include "coordinator/group/group_port.h"
#include "proto/worker.pb.h"

namespace lockstep {

class AttachServer {
 public:
  // Called from gRPC's threads; for one stream in order: OnOpen, then messages
  // (or garbage), then OnClosed. May call the server back.
  class Handler {
   public:
    virtual ~Handler() = default;
    virtual void OnOpen(StreamId stream) = 0;
    virtual void OnMessage(StreamId stream, const worker::v1::WorkerMessage& message) = 0;
    virtual void OnGarbage(StreamId stream) = 0;
    virtual void OnClosed(StreamId stream) = 0;
  };

  // `address`: HOST:PORT (port 0: any) or unix:PATH. `handler` outlives the
  // server and may be called before Listen returns. An address that is taken or
  // unusable is an error naming it. With `tls`, only workers' certificates pass.
  static absl::StatusOr<std::unique_ptr<AttachServer>> Listen(const std::string& address,
                                                              Handler* handler,
                                                              const TlsFiles& tls = {});
  ~AttachServer();  // cuts what is still open; no call of the handler afterwards

  // As bound: with the real port. What a worker on this host dials.
  const std::string& address() const;

  void Send(absl::Span<const StreamId> to, const worker::v1::CoordinatorMessage& message);
  void Close(StreamId stream);
  void Abort(StreamId stream);

 private:
  struct Impl;
  explicit AttachServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_GROUP_ATTACH_SERVER_H_
