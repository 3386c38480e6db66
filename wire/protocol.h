// Constants both ends of the private plane agree on.
#ifndef LOCKSTEP_WIRE_PROTOCOL_H_
#define LOCKSTEP_WIRE_PROTOCOL_H_

#include <cstdint>

namespace lockstep::wire {

// Raised by any change that an older peer would misread.
inline constexpr uint32_t kProtocolVersion = 3;

inline constexpr int64_t kHeartbeatIntervalMs = 250;
// Silence after which a peer counts as gone. Above a pause of 0.5 s by a wide
// margin, and so that a worker stopped for ever is found within 3 s.
inline constexpr int64_t kHeartbeatTimeoutMs = 2'000;
// Time a worker has to give up an epoch before it ends itself.
inline constexpr int64_t kReleaseTimeoutMs = 1'500;

// Plans that may be in flight: one running, one queued behind it.
inline constexpr int kMaxPlansInFlight = 2;

// What ranks may publish to each other through the coordinator in one epoch.
inline constexpr int kMaxCommKeys = 4'096;
inline constexpr int kMaxCommKeyBytes = 128;
inline constexpr int kMaxCommValueBytes = 64 << 10;

// A profile: steps it may span, events of a message, and of a rank in all.
inline constexpr uint32_t kMaxProfileSteps = 1'000;
inline constexpr int kMaxProfileEvents = 8'192;
inline constexpr int kMaxProfileEventsPerRank = 4'000'000;

// One message of the private plane. Its largest is a plan of new sequences: their tokens and
// blocks of one position each, 5 bytes apiece, are 40 MiB.
inline constexpr int kMaxMessageBytes = 64 << 20;
inline constexpr uint32_t kMaxNewTokens = 1 << 22;  // of new sequences in a plan; also of one

}  // namespace lockstep::wire

#endif  // LOCKSTEP_WIRE_PROTOCOL_H_
