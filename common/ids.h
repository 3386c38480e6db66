// The small integers everything is named by. Slots and blocks are distinct
// types, so that one cannot be passed for the other; tokens are plain numbers,
// because vectors of them go to and from libraries.
#ifndef LOCKSTEP_COMMON_IDS_H_
#define LOCKSTEP_COMMON_IDS_H_

#include <compare>
#include <cstdint>
#include <utility>

namespace lockstep {

using TokenId = uint32_t;

template <typename Tag, typename Int>
struct Id {
  Int value = 0;

  constexpr Id() = default;
  constexpr explicit Id(Int v) : value(v) {}
  friend constexpr auto operator<=>(Id, Id) = default;
  template <typename H>
  friend H AbslHashValue(H h, Id id) {
    return H::combine(std::move(h), id.value);
  }
};

// Names a running sequence on every worker; in [0, max_num_seqs).
using Slot = Id<struct SlotTag, uint32_t>;
// Names a block of the KV cache; in [0, num_kv_blocks), the same on every rank.
using BlockId = Id<struct BlockTag, uint32_t>;
// Names a request inside one coordinator, for its lifetime.
using RequestId = Id<struct RequestTag, uint64_t>;

// One of a request's n sequences.
struct SequenceId {
  RequestId request;
  uint32_t index = 0;  // in [0, n)
  friend constexpr auto operator<=>(SequenceId, SequenceId) = default;
  template <typename H>
  friend H AbslHashValue(H h, SequenceId id) {
    return H::combine(std::move(h), id.request, id.index);
  }
};

}  // namespace lockstep

#endif  // LOCKSTEP_COMMON_IDS_H_
