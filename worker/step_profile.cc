#include "worker/step_profile.h"

#include <algorithm>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "wire/protocol.h"

namespace lockstep {

using worker::v1::ProfilePart;
using worker::v1::WorkerMessage;

void StepProfile::Begin(DeviceTrace* trace, const std::string& why_not) {
  if (trace == nullptr) {
    first_.set_note(why_not);
    return;
  }
  const absl::Status started = trace->Start();
  if (started.ok()) {
    trace_ = trace;
  } else {
    first_.set_note(std::string(started.message()));
  }
}

void StepProfile::Ran(const worker::v1::StepResult& result, uint64_t submitted_ns,
                      uint64_t done_ns) {
  const int before = first_.steps_size();
  const uint64_t previous_end = before == 0 ? 0 : first_.steps(before - 1).end_ns();
  worker::v1::ProfileStep* step = first_.add_steps();
  step->set_step(result.step());
  step->set_submitted_ns(submitted_ns);
  *step->mutable_timing() = result.timing();
  // A step that was enqueued while the one before it ran began when that one ended.
  const uint64_t total_ns = std::min(result.timing().total_ns(), done_ns);
  step->set_begin_ns(std::min(std::max(done_ns - total_ns, previous_end), done_ns));
  step->set_end_ns(done_ns);
}

void StepProfile::Finish(const std::function<void(const WorkerMessage&)>& send) {
  std::vector<DeviceEvent> events;
  if (trace_ != nullptr) {
    absl::StatusOr<std::vector<DeviceEvent>> traced = std::exchange(trace_, nullptr)->Stop();
    if (traced.ok()) {
      events = *std::move(traced);
    } else {
      first_.set_note(std::string(traced.status().message()));
    }
  }
  constexpr size_t kMost = wire::kMaxProfileEventsPerRank;
  if (events.size() > kMost) {
    first_.set_note(absl::StrCat("the first ", kMost, " of ", events.size(), " device events"));
    events.resize(kMost);
  }
  WorkerMessage message;
  *message.mutable_profile() = std::move(first_);
  size_t at = 0;
  do {
    ProfilePart& part = *message.mutable_profile();
    part.set_id(id_);
    std::map<std::string, uint32_t> names;
    const size_t end = std::min(events.size(), at + wire::kMaxProfileEvents);
    for (; at < end; ++at) {
      const DeviceEvent& from = events[at];
      const auto [name, fresh] = names.emplace(from.name, part.names_size());
      if (fresh) part.add_names(from.name);
      worker::v1::ProfileEvent* to = part.add_events();
      const uint64_t duration_ns = from.end_ns > from.begin_ns ? from.end_ns - from.begin_ns : 0;
      to->set_name(name->second);
      to->set_begin_ns(from.begin_ns);
      to->set_duration_ns(static_cast<uint32_t>(
          std::min<uint64_t>(duration_ns, std::numeric_limits<uint32_t>::max())));
      to->set_stream(from.stream);
      to->set_blocks(from.blocks);
      to->set_threads(from.threads);
    }
    part.set_last(at == events.size());
    send(message);
    message.Clear();
  } while (at < events.size());
}

void StepProfile::Abandon() {
  if (trace_ != nullptr) (void)std::exchange(trace_, nullptr)->Stop();
}

}  // namespace lockstep
