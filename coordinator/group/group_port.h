// How the group machine acts on the world, and how it names a worker's stream.
#ifndef LOCKSTEP_COORDINATOR_GROUP_GROUP_PORT_H_
#define LOCKSTEP_COORDINATOR_GROUP_GROUP_PORT_H_

#include <cstdint>

#include "absl/types/span.h"
#include "coordinator/worker_group.h"
#include "proto/worker.pb.h"

namespace lockstep {

// One worker's Attach call. Ids rise in order of arrival and are never reused.
using StreamId = uint64_t;

class GroupPort {
 public:
  virtual ~GroupPort() = default;
  // The same bytes to each stream, in order with what was sent before; nothing
  // blocks, and a stream that is gone is passed over.
  virtual void Send(absl::Span<const StreamId> to,
                    const worker::v1::CoordinatorMessage& message) = 0;
  // Ends the stream after what was sent on it. Its end is reported like any other.
  virtual void Close(StreamId stream) = 0;
  // Ends it at once: the worker does not read, or is not to be trusted.
  virtual void Abort(StreamId stream) = 0;
  virtual void Post(GroupEvent event) = 0;
  // Of a member of the epoch, as it came.
  virtual void OnProfilePart(uint32_t rank, const worker::v1::ProfilePart& part) {
    (void)rank, (void)part;
  }
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_GROUP_GROUP_PORT_H_
