// How far each worker's monotonic clock is from this host's, from its heartbeats:
// the smallest of the last few differences between when one came and when it was
// sent, which is the offset plus the quickest way here. Too large by that way:
// some tens of microseconds within a rack.
#ifndef LOCKSTEP_COORDINATOR_GROUP_CLOCK_OFFSETS_H_
#define LOCKSTEP_COORDINATOR_GROUP_CLOCK_OFFSETS_H_

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>

#include "coordinator/group/group_port.h"

namespace lockstep {

class ClockOffsets {
 public:
  void Heard(StreamId stream, uint64_t sent_ns, int64_t now_ns) {
    if (sent_ns > INT64_MAX / 2) return;  // no clock of this century
    std::deque<int64_t>& last = differences_[stream];
    last.push_back(now_ns - static_cast<int64_t>(sent_ns));
    if (last.size() > kKept) last.pop_front();
  }
  void Forget(StreamId stream) { differences_.erase(stream); }
  // To be added to the worker's clock. 0 before its first heartbeat, and where
  // the difference is no more than a message's way on one host: one clock.
  int64_t OffsetNs(StreamId stream) const {
    const auto it = differences_.find(stream);
    if (it == differences_.end()) return 0;
    const int64_t least = *std::min_element(it->second.begin(), it->second.end());
    return least >= 0 && least < kSameClockNs ? 0 : least;
  }

 private:
  static constexpr size_t kKept = 64;  // 16 s of heartbeats: clocks drift apart
  static constexpr int64_t kSameClockNs = 20'000'000;

  std::map<StreamId, std::deque<int64_t>> differences_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_GROUP_CLOCK_OFFSETS_H_
