// Says yes to a request, or gives the client a status now. Reads declared
// lengths only (prompt tokens, max_tokens), never what a prompt says.
//
//   InvalidArgument     it can never fit: the message names the field, the
//                       number and the limit
//   ResourceExhausted   the queue is full now, with a retry delay
//                       (coordinator/retry_delay.h) estimated from how fast
//                       requests have been leaving the queue
//
// The queue is what waits beyond the sequences that could start at once, so a
// burst into an idle group is judged the same whenever the scheduler runs.
// Pure: the time is handed in. Owned by the scheduler.
#ifndef LOCKSTEP_COORDINATOR_ADMISSION_H_
#define LOCKSTEP_COORDINATOR_ADMISSION_H_

#include <cstdint>

#include "absl/status/status.h"
#include "coordinator/request.h"
#include "coordinator/scheduler.h"

namespace lockstep {

class Admission {
 public:
  explicit Admission(const SchedulerConfig& config) : config_(config) {}

  // waiting: requests without a slot. idle_slots: slots nobody runs in.
  absl::Status Check(const Request& request, uint32_t waiting, uint32_t idle_slots) const;

  // A request left the queue for a slot, `still_waiting` others did not.
  void NoteStarted(int64_t now_ms, uint32_t still_waiting);

  // Nobody waits, or nobody is served: the time until the next start says nothing
  // of the queue's pace.
  void NoteIdle() { queue_was_busy_ = false; }

  // Whole seconds until half of the queue has left, in [1, 60].
  int RetryDelaySeconds(uint32_t waiting) const;

 private:
  absl::Status CheckFits(const Request& request) const;

  const SchedulerConfig config_;
  // Time between departures while somebody waited, smoothed; before there are
  // any, half a second is as good a guess as another.
  double departure_interval_ms_ = 500;
  int64_t last_departure_ms_ = 0;
  bool queue_was_busy_ = false;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_ADMISSION_H_
