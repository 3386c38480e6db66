#include "coordinator/group/profile_trace.h"

#include <algorithm>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "wire/protocol.h"

namespace lockstep {
namespace {

using worker::v1::ProfilePart;
using worker::v1::ProfileStep;

constexpr uint32_t kStepsTrack = 0, kKindsTrack = 1, kFirstStreamTrack = 2;

std::string Quoted(const std::string& text) {
  return nlohmann::json(text).dump(-1, ' ', /*ensure_ascii=*/true,
                                   nlohmann::json::error_handler_t::replace);
}

// Appends events, one a line; times are relative to the trace's origin.
class Writer {
 public:
  explicit Writer(int64_t origin_ns) : origin_ns_(origin_ns) {}

  void Name(const char* what, uint32_t rank, uint32_t track, const std::string& name) {
    absl::StrAppendFormat(Next(), R"({"ph":"M","pid":%d,"tid":%d,"name":"%s","args":{"name":%s}})",
                          rank, track, what, Quoted(name));
  }
  // `args`: the inside of a JSON object.
  void Slice(uint32_t rank, uint32_t track, const std::string& name, int64_t begin_ns,
             uint64_t duration_ns, const std::string& args) {
    absl::StrAppendFormat(
        Next(), R"({"ph":"X","pid":%d,"tid":%d,"name":%s,"ts":%.3f,"dur":%.3f,"args":{%s}})", rank,
        track, Quoted(name), static_cast<double>(begin_ns - origin_ns_) * 1e-3,
        static_cast<double>(duration_ns) * 1e-3, args);
  }
  std::string Done() && { return absl::StrCat("{\"traceEvents\":[", text_, "\n]}\n"); }

 private:
  std::string* Next() {
    text_ += text_.empty() ? "\n" : ",\n";
    return &text_;
  }
  const int64_t origin_ns_;
  std::string text_;
};

void WriteStep(uint32_t rank, const ProfileStep& step, int64_t clock_ns, Writer* writer) {
  const worker::v1::StepTiming& timing = step.timing();
  const int64_t begin_ns = static_cast<int64_t>(step.begin_ns()) + clock_ns;
  const uint64_t duration_ns = step.end_ns() - step.begin_ns();
  writer->Slice(
      rank, kStepsTrack, absl::StrCat("step ", step.step()), begin_ns, duration_ns,
      absl::StrFormat(
          R"("step":%d,"total_ns":%d,"compute_ns":%d,"collective_wait_ns":%d,)"
          R"("collective_transfer_ns":%d,"sampling_ns":%d,"device_idle_ns":%d,)"
          R"("collective_bytes":%d,"enqueued_before_ns":%d)",
          step.step(), timing.total_ns(), timing.compute_ns(), timing.collective_wait_ns(),
          timing.collective_transfer_ns(), timing.sampling_ns(), timing.device_idle_ns(),
          timing.collective_bytes(),
          static_cast<int64_t>(step.begin_ns()) - static_cast<int64_t>(step.submitted_ns())));
  uint64_t at_ns = 0;
  for (const auto& [name, ns] : {std::pair("compute", timing.compute_ns()),
                                 std::pair("collective wait", timing.collective_wait_ns()),
                                 std::pair("collective transfer", timing.collective_transfer_ns()),
                                 std::pair("sampling", timing.sampling_ns())}) {
    const uint64_t fits_ns = std::min(ns, duration_ns - at_ns);
    if (fits_ns == 0) continue;
    writer->Slice(rank, kKindsTrack, name, begin_ns + static_cast<int64_t>(at_ns), fits_ns,
                  absl::StrCat("\"step\":", step.step()));
    at_ns += fits_ns;
  }
}

void WriteEvents(uint32_t rank, const ProfilePart& part, int64_t clock_ns,
                 std::set<uint32_t>* streams, Writer* writer) {
  for (const worker::v1::ProfileEvent& event : part.events()) {
    streams->insert(event.stream());
    const auto index = static_cast<int>(event.name());
    writer->Slice(rank, kFirstStreamTrack + event.stream(), part.names(index),
                  static_cast<int64_t>(event.begin_ns()) + clock_ns, event.duration_ns(),
                  event.blocks() == 0 ? ""
                                      : absl::StrCat("\"blocks\":", event.blocks(),
                                                     ",\"threads\":", event.threads()));
  }
}

absl::Status Broken(uint32_t rank, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat("rank ", rank, " sent a broken profile: ", what));
}

}  // namespace

ProfileTrace::ProfileTrace(uint64_t id, uint32_t steps, std::vector<ProfiledRank> ranks)
    : id_(id), steps_(steps) {
  for (ProfiledRank& about : ranks) ranks_.push_back({.about = std::move(about), .parts = {}});
}

absl::Status ProfileTrace::Add(uint32_t rank, const ProfilePart& part) {
  if (part.id() != id_ || rank >= ranks_.size() || ranks_[rank].complete) return absl::OkStatus();
  Rank& to = ranks_[rank];
  to.num_steps += static_cast<size_t>(part.steps_size());
  to.num_events += static_cast<size_t>(part.events_size());
  if (to.num_steps > steps_) return Broken(rank, absl::StrCat("more than ", steps_, " steps"));
  if (part.events_size() > wire::kMaxProfileEvents ||
      to.num_events > size_t{wire::kMaxProfileEventsPerRank} ||
      part.names_size() > wire::kMaxProfileEvents) {
    return Broken(rank, "too many events");
  }
  for (const ProfileStep& step : part.steps()) {
    if (step.begin_ns() < to.last_end_ns || step.end_ns() < step.begin_ns() ||
        step.end_ns() > uint64_t{std::numeric_limits<int64_t>::max() / 2} ||
        step.submitted_ns() > uint64_t{std::numeric_limits<int64_t>::max() / 2}) {
      return Broken(rank, absl::StrCat("step ", step.step(), " is out of order"));
    }
    to.last_end_ns = step.end_ns();
  }
  for (const worker::v1::ProfileEvent& event : part.events()) {
    if (event.name() >= static_cast<uint32_t>(part.names_size()) ||
        event.begin_ns() > uint64_t{std::numeric_limits<int64_t>::max() / 2} ||
        event.stream() > std::numeric_limits<uint32_t>::max() / 2) {
      return Broken(rank, "an event's name, time or stream");
    }
  }
  to.parts.push_back(part);
  to.complete = part.last();
  num_complete_ += to.complete ? 1 : 0;
  return absl::OkStatus();
}

size_t ProfileTrace::num_steps() const {
  size_t least = steps_;
  for (const Rank& rank : ranks_) least = std::min(least, rank.num_steps);
  return least;
}

std::string ProfileTrace::Json() const {
  int64_t origin_ns = std::numeric_limits<int64_t>::max();
  for (const Rank& rank : ranks_) {
    for (const ProfilePart& part : rank.parts) {
      for (const ProfileStep& step : part.steps()) {
        origin_ns =
            std::min(origin_ns, static_cast<int64_t>(step.begin_ns()) + rank.about.clock_ns);
      }
      for (const worker::v1::ProfileEvent& event : part.events()) {
        origin_ns =
            std::min(origin_ns, static_cast<int64_t>(event.begin_ns()) + rank.about.clock_ns);
      }
    }
  }
  Writer writer(origin_ns);
  for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
    const Rank& from = ranks_[rank];
    std::string name = from.about.name;
    std::set<uint32_t> streams;
    for (const ProfilePart& part : from.parts) {
      if (!part.note().empty()) absl::StrAppend(&name, " [", part.note(), "]");
      for (const ProfileStep& step : part.steps()) {
        WriteStep(rank, step, from.about.clock_ns, &writer);
      }
      WriteEvents(rank, part, from.about.clock_ns, &streams, &writer);
    }
    writer.Name("process_name", rank, 0, name);
    writer.Name("thread_name", rank, kStepsTrack, "steps");
    writer.Name("thread_name", rank, kKindsTrack, "time by kind");
    for (const uint32_t stream : streams) {
      writer.Name("thread_name", rank, kFirstStreamTrack + stream, absl::StrCat("stream ", stream));
    }
  }
  return std::move(writer).Done();
}

}  // namespace lockstep
