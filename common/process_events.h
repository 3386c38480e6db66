// What a daemon's main thread waits for: SIGTERM and SIGINT, which it
// takes as events, and a wake from another thread. Made before any other thread
// starts, so that every thread inherits the blocked signals. One per process.
#ifndef LOCKSTEP_COMMON_PROCESS_EVENTS_H_
#define LOCKSTEP_COMMON_PROCESS_EVENTS_H_

#include <cstdint>

#include "absl/status/statusor.h"

namespace lockstep {

class ProcessEvents {
 public:
  enum class Event { kWoken, kTerminate, kTimeout };

  static absl::StatusOr<ProcessEvents> Install();
  ~ProcessEvents();
  ProcessEvents(ProcessEvents&& other) noexcept;
  ProcessEvents& operator=(ProcessEvents&&) = delete;

  // Any thread; wakes are merged.
  void Wake() const;
  // Blocks; -1: for as long as it takes.
  Event Wait(int64_t timeout_ms = -1) const;

 private:
  ProcessEvents(int signals, int wakes) : signal_fd_(signals), wake_fd_(wakes) {}
  int signal_fd_;
  int wake_fd_;
};

// Ends this process when its parent ends; false if the parent is gone already.
bool DieWithParent();

}  // namespace lockstep

#endif  // LOCKSTEP_COMMON_PROCESS_EVENTS_H_
