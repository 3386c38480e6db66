// The ranks of one host as a kernel sees them: every rank's exchange region,
// mapped into this process, and where a kernel that waited in vain says so.
// Whoever maps the regions (worker/comm/cuda/peer_memory.h) fills this in once.
//
// A region is plain device memory of its rank, written by the others. Each kernel
// family lays out its own part of it and says how large that is.
#ifndef LOCKSTEP_KERNELS_PEERS_H_
#define LOCKSTEP_KERNELS_PEERS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace lockstep::kernels {

inline constexpr int kMaxPeers = 8;

// Where the next part of a region may begin.
constexpr size_t AlignedInRegion(size_t bytes) { return (bytes + 255) / 256 * 256; }

// What a kernel was waiting for when its patience ended. Written whole, just
// before the kernel traps; 0: nothing was missed.
enum class PeerWait : uint32_t {
  kNothing = 0,
  kOneShot = 1,  // all-reduce, one-shot: a rank's row
  kScatter = 2,  // all-reduce, two-shot: a rank's part of a row
  kGather = 3,   // all-reduce, two-shot: a row's sum from its owner
  kSmallAllGather = 4,
  kPushedPartial = 5,  // a partial pushed by the epilogue of a matrix kernel
  kOwnBlocks = 6,      // other blocks of this rank, in the kernel of a whole step
  kCopiedRows = 7,     // a rank's copies of a long all-reduce
};

struct alignas(16) PeerFault {
  PeerWait code = PeerWait::kNothing;
  uint32_t exchange = 0;  // counted from 0 per kernel family
  uint32_t rank = 0;      // the missing one
  uint32_t block = 0;     // of the grid that waited
};

// What a rank's exchanges cost it, added up by the kernels of this rank, of which
// one at a time counts: an exchange is seen by one thread of its first block.
struct CollectiveClock {
  uint64_t wait_ns = 0;      // from having sent to the arrival of the last rank
  uint64_t transfer_ns = 0;  // the rest of the kernel; of other libraries', all of it
  uint64_t aside_ns = 0;     // the same of what ran behind the step's other work
  uint64_t mark_ns = 0;      // when a transfer of another library began
};

struct Peers {
  std::byte* base[kMaxPeers] = {};  // by rank; 256-byte aligned; base[rank]: one's own
  int rank = 0;
  int size = 1;
  PeerFault* fault = nullptr;  // mapped host memory, outlives a trap; nullptr: trap only
  // Mapped host memory, or nullptr: not 0 once the group is given up. Kernels stop
  // waiting and end; what they write from then on means nothing. The first to see
  // it sets *aborted, in this device's memory, which the others look at.
  const uint32_t* abort = nullptr;
  uint32_t* aborted = nullptr;  // set if `abort` is
  // How long a kernel waits for a rank before it traps. Above every honest delay:
  // the coordinator's step deadline is what users meet.
  uint64_t patience_ns = 20'000'000'000;
  CollectiveClock* clock = nullptr;  // in this device's memory; nullptr: not measured
};

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_PEERS_H_
