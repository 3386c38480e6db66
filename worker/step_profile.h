// One profile of a worker: its steps' times and what the device ran in them,
// collected as they pass and sent as ProfileParts at the end. Of one thread, the
// runner's.
//
//   Begin -> (Ran) per step, in order -> Finish
//
// The device is idle at Begin and at Finish: a profile's steps share it with no
// other step, so that what was traced is theirs.
#ifndef LOCKSTEP_WORKER_STEP_PROFILE_H_
#define LOCKSTEP_WORKER_STEP_PROFILE_H_

#include <cstdint>
#include <functional>
#include <string>

#include "proto/worker.pb.h"
#include "wire/step_plan.h"
#include "worker/device_trace.h"

namespace lockstep {

class StepProfile {
 public:
  explicit StepProfile(uint64_t id) : id_(id) {}

  uint64_t id() const { return id_; }
  // `trace`: null where the device's own events cannot be had, which `why_not`
  // explains (empty: there is no device).
  void Begin(DeviceTrace* trace, const std::string& why_not);
  // A step: when it was enqueued, and when its result was seen.
  void Ran(const worker::v1::StepResult& result, uint64_t submitted_ns, uint64_t done_ns);
  // In parts small enough for the wire; the last one says so.
  void Finish(const std::function<void(const worker::v1::WorkerMessage&)>& send);
  // Instead of Finish, when nobody asks any more.
  void Abandon();

 private:
  const uint64_t id_;
  DeviceTrace* trace_ = nullptr;  // started
  worker::v1::ProfilePart first_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_STEP_PROFILE_H_
