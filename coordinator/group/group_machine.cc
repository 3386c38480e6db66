// Messages in, plans out. Forming an epoch is in group_forming.cc, ending one in
// group_ending.cc.
#include "coordinator/group/group_machine.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/log.h"
#include "wire/codec.h"

namespace lockstep {

using worker::v1::CoordinatorMessage;
using worker::v1::WorkerMessage;

namespace {
constexpr size_t kLongestReason = 2048;  // bytes of a worker's own words that go on to clients
}  // namespace

GroupMachine::GroupMachine(GroupOptions options, std::string nonce, GroupPort* port)
    : options_(std::move(options)),
      nonce_(std::move(nonce)),
      port_(port),
      ledger_(options_.tp_size),
      deadline_(options_.timeouts.step) {
  LOCKSTEP_CHECK(options_.tp_size > 0);
}

void GroupMachine::OnOpen(StreamId stream, int64_t now_ms) {
  if (phase_ == Phase::kShutdown) return port_->Close(stream);
  Peer peer;
  peer.heard_ms = now_ms;
  peers_.emplace(stream, std::move(peer));
  next_beat_ms_ = std::min(next_beat_ms_, now_ms + options_.timeouts.heartbeat_interval_ms);
}

void GroupMachine::OnMessage(StreamId stream, const WorkerMessage& message, int64_t now_ms) {
  const auto it = peers_.find(stream);
  if (it == peers_.end() || phase_ == Phase::kShutdown) return;
  Peer& peer = it->second;
  peer.heard_ms = now_ms;
  if (peer.role == Role::kLeaving) return;
  if (peer.role == Role::kUnknown && !message.has_hello()) {
    return Refuse(stream, peer, "the first message of a worker must be Hello");
  }
  switch (message.message_case()) {
    case WorkerMessage::kHello:
      return OnHello(stream, peer, message.hello(), now_ms);
    case WorkerMessage::kProgress:
      return OnProgress(peer, message.progress(), now_ms);
    case WorkerMessage::kReady:
      return OnReady(peer, message.ready(), now_ms);
    case WorkerMessage::kFailure:
      return OnFailure(stream, peer, message.failure(), now_ms);
    case WorkerMessage::kResult:
      return OnResult(stream, peer, message.result(), now_ms);
    case WorkerMessage::kReleased:
      return OnReleased(peer, message.released(), now_ms);
    case WorkerMessage::kCommKey:
      return RelayKey(stream, peer, message.comm_key(), now_ms);
    case WorkerMessage::kHeartbeat:
      if (message.heartbeat().has_device()) peer.device_stats = message.heartbeat().device();
      return;
    case WorkerMessage::kProfile:
      if (!IsMember(peer)) return;
      if (message.profile().last() && num_profiling_ > 0) --num_profiling_;
      port_->OnProfilePart(peer.rank, message.profile());
      return;
    case WorkerMessage::MESSAGE_NOT_SET:
      return OnGarbage(stream, now_ms);
  }
}

void GroupMachine::OnGarbage(StreamId stream, int64_t now_ms) {
  const auto it = peers_.find(stream);
  if (it == peers_.end() || it->second.role == Role::kLeaving) return;
  Lied(stream, it->second, "sent bytes that are no message", now_ms);
}

void GroupMachine::OnClosed(StreamId stream, int64_t now_ms) {
  const auto it = peers_.find(stream);
  if (it == peers_.end()) return;
  const Peer peer = std::move(it->second);
  peers_.erase(it);
  if (phase_ == Phase::kShutdown) return;
  if (IsMember(peer) && EpochOpen()) {
    std::string what = absl::StrCat(Name(peer), ": connection lost");
    if (symptom_) {
      what = symptom_->rank == peer.rank ? symptom_->text
                                         : absl::StrCat(what, " (", symptom_->text, ")");
    }
    EndEpoch(static_cast<int>(peer.rank), what, false, now_ms);
  } else if (peer.role == Role::kSpare) {
    LogInfo(absl::StrCat("spare worker ", peer.hello.host(), ":", peer.hello.pid(), " left"));
  }
  CheckClosing(now_ms);
}

void GroupMachine::SendPlan(const StepPlan& plan, int64_t now_ms) {
  if (phase_ != Phase::kServing || plan.epoch != epoch_ || symptom_) return;
  CoordinatorMessage message;
  *message.mutable_plan() = wire::Encode(plan);
  ledger_.Sent(plan, now_ms);
  if (ledger_.size() == 1) {
    step_due_ms_ = now_ms + StepAllowanceMs(ledger_.oldest()->tokens);
  }
  SendToMembers(message);
}

bool GroupMachine::SendProfileStart(const worker::v1::ProfileStart& start) {
  if (phase_ != Phase::kServing) return false;
  CoordinatorMessage message;
  *message.mutable_profile_start() = start;
  if (start.steps() > 0) num_profiling_ = options_.tp_size;
  SendToMembers(message);
  return true;
}

int64_t GroupMachine::StepAllowanceMs(uint64_t tokens) const {
  // Opening CUPTI and sending what it found take seconds, between two steps.
  constexpr int64_t kProfileMs = 30'000;
  return deadline_.AllowanceMs(tokens) + (num_profiling_ > 0 ? kProfileMs : 0);
}

std::vector<GroupMachine::Member> GroupMachine::Members() const {
  std::vector<Member> all;
  if (phase_ != Phase::kServing) return all;
  for (const StreamId stream : members_) {
    const Peer& peer = peers_.at(stream);
    all.push_back({.stream = stream,
                   .name = Name(peer),
                   .device = peer.hello.device(),
                   .stats = peer.device_stats ? &*peer.device_stats : nullptr});
  }
  return all;
}

void GroupMachine::OnResult(StreamId stream, const Peer& peer, const worker::v1::StepResult& result,
                            int64_t now_ms) {
  if (!IsMember(peer) || phase_ != Phase::kServing || result.epoch() != epoch_) return;
  const auto lied = [&](const absl::Status& status) {
    Lied(stream, peer, std::string(status.message()), now_ms);
  };
  absl::StatusOr<StepResult> decoded = wire::Decode(result);
  if (!decoded.ok()) return lied(decoded.status());
  absl::StatusOr<std::optional<StepLedger::Done>> answer =
      ledger_.Answer(peer.rank, *std::move(decoded), now_ms);
  if (!answer.ok()) return lied(answer.status());
  if (!answer->has_value()) return;
  StepLedger::Done& done = **answer;
  if (num_profiling_ == 0) deadline_.Observe(done.tokens, done.milliseconds);
  const StepLedger::Step* next = ledger_.oldest();
  step_due_ms_ = next == nullptr ? kNever : next->began_ms + StepAllowanceMs(next->tokens);
  port_->Post(std::move(done.step));
}

void GroupMachine::OnFailure(StreamId stream, const Peer& peer, const worker::v1::Failure& failure,
                             int64_t now_ms) {
  if (!IsMember(peer) || !EpochOpen() || failure.epoch() != epoch_) return;
  const std::string what =
      absl::StrCat(Name(peer), ": ", OneLine(failure.message(), kLongestReason));
  const int rank = static_cast<int>(peer.rank);
  if (!failure.recoverable()) {
    const bool fatal = phase_ == Phase::kLoading && !MayLoadAgain(now_ms);
    Blame(peer);
    if (!fatal) Distrust(stream);
    EndEpoch(rank, what, fatal, now_ms);
    return CheckClosing(now_ms);
  }
  const auto code = static_cast<absl::StatusCode>(failure.code());
  const bool of_a_collective =
      code == absl::StatusCode::kAborted || code == absl::StatusCode::kUnavailable ||
      code == absl::StatusCode::kDeadlineExceeded || code == absl::StatusCode::kCancelled;
  if (!of_a_collective) return EndEpoch(rank, what, false, now_ms);
  if (!symptom_) symptom_ = {peer.rank, what, now_ms + options_.timeouts.symptom_ms};
}

void GroupMachine::OnReleased(Peer& peer, const worker::v1::Released& released, int64_t now_ms) {
  if (peer.role != Role::kReleasing || released.epoch() != epoch_) return;
  peer.role = Role::kSpare;
  peer.preferred_rank = static_cast<int>(peer.rank);
  CheckClosing(now_ms);
}

void GroupMachine::FailEpoch(uint64_t epoch, const absl::Status& reason, int64_t now_ms) {
  if (!EpochOpen() || epoch != epoch_) return;
  // Sampled tokens, which is what the engine checks, come from rank 0.
  Lied(members_[0], peers_.at(members_[0]), std::string(reason.message()), now_ms);
}

void GroupMachine::Shutdown() {
  phase_ = Phase::kShutdown;
  CoordinatorMessage message;
  message.mutable_shutdown();
  for (const auto& [stream, peer] : peers_) {
    if (peer.role == Role::kLeaving) continue;
    SendTo(stream, message);
    port_->Close(stream);
  }
  next_beat_ms_ = kNever;
}

std::string GroupMachine::Name(const Peer& peer) const {
  return absl::StrCat("rank ", peer.rank, " (", peer.hello.host(), ":", peer.hello.pid(), ")");
}

void GroupMachine::SendTo(StreamId stream, const CoordinatorMessage& message) {
  port_->Send({&stream, 1}, message);
}

void GroupMachine::SendToMembers(const CoordinatorMessage& message) {
  port_->Send(members_, message);
}

}  // namespace lockstep
