// Collectives over gloo's TCP transport.
//
// All-reduce is recursive doubling: at level d a rank exchanges its block's sum
// with the sibling block of 2^d ranks, so after the last level every rank holds
// the binary tree over rank order, bit for bit. In a group whose size is not a
// power of two a rank without a partner is served by another rank of the
// sibling block; a level whose sibling block is wholly missing is skipped.
//
//   size 4:  level 0  0<->1 2<->3     size 3:  level 0  0<->1
//            level 1  0<->2 1<->3              level 1  0<->2, 2->1
//
// From kScatterBytes on, a power-of-two group halves the message at every level
// instead and gathers the pieces back: the same tree at each element, with
// 2 (size-1)/size of the message sent instead of log2(size) times all of it.
//
// Messages above one segment are cut and pipelined. Every message begins with a
// small segment; the time blocked on that first segment counts as wait (the
// peer has not arrived), everything else of a call as transfer. A message of one
// segment therefore counts its one-way latency as wait.
//
// Segments name the collective they belong to; a rank that is at another one is
// an error (FailedPrecondition) instead of a wrong sum. A rank that does not
// come within max_skew_ms: DeadlineExceeded. A lost connection: Unavailable.
// After Abort: Aborted. Messages name the rank at fault. Dropping a communicator
// resets its connections: what a peer has not received yet is lost.
#ifndef LOCKSTEP_WORKER_COMM_GLOO_COMMUNICATOR_H_
#define LOCKSTEP_WORKER_COMM_GLOO_COMMUNICATOR_H_

#include <memory>
#include <string>

#include "worker/comm/rank_communicator.h"

namespace lockstep {

// Ignores SIGPIPE for the process if nothing handles it: gloo writes to sockets
// whose peer may be gone.
std::unique_ptr<RankCommunicator> MakeGlooCommunicator(const CommunicatorOptions& options);

// "gloo 0.5.0"
std::string GlooVersion();

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_COMM_GLOO_COMMUNICATOR_H_
