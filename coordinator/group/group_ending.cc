// What ends an epoch, whom it is blamed on, and the way back to gathering.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/log.h"
#include "coordinator/group/group_machine.h"

namespace lockstep {

using worker::v1::CoordinatorMessage;

namespace {
std::string Seconds(int64_t ms) {
  return absl::StrFormat("%.1f s", static_cast<double>(ms) / 1000);
}
}  // namespace

void GroupMachine::EndEpoch(int rank, const std::string& what, bool fatal, int64_t now_ms) {
  if (!EpochOpen()) return;
  LogError(absl::StrCat("epoch ", epoch_, " ended: ", what));
  failures_in_a_row_ = phase_ == Phase::kServing ? 1 : failures_in_a_row_ + 1;
  if (phase_ == Phase::kServing) lost_ms_ = now_ms;
  // The first failure is answered at once; a series backs off.
  const int64_t pause_ms = failures_in_a_row_ == 1
                               ? 0
                               : std::min<int64_t>(3'000, 100LL << std::min(failures_in_a_row_, 6));
  earliest_form_ms_ = now_ms + pause_ms;
  symptom_.reset();
  step_due_ms_ = kNever;
  phase_ = fatal ? Phase::kFatal : Phase::kClosing;
  if (fatal) fatal_reason_ = what;
  release_deadline_ms_ = fatal ? kNever : now_ms + options_.timeouts.release_ms;

  CoordinatorMessage message;
  message.mutable_close_epoch()->set_epoch(epoch_);
  message.mutable_close_epoch()->set_reason(what);
  for (auto& [stream, peer] : peers_) {
    if (!IsMember(peer)) continue;
    peer.role = Role::kReleasing;
    SendTo(stream, message);
  }
  port_->Post(GroupFailed{epoch_, rank, absl::UnavailableError(what), fatal});
  CheckClosing(now_ms);
}

// Ends the stream of a worker whose state or word cannot be relied on. It may
// dial again, as a newcomer.
void GroupMachine::Distrust(StreamId stream) {
  const auto it = peers_.find(stream);
  if (it == peers_.end() || it->second.role == Role::kLeaving) return;
  it->second.role = Role::kLeaving;
  port_->Abort(stream);
}

void GroupMachine::Lied(StreamId stream, const Peer& peer, const std::string& what,
                        int64_t now_ms) {
  const bool member = IsMember(peer);
  const int rank = static_cast<int>(peer.rank);
  const std::string named = absl::StrCat(Name(peer), ": ", what);
  const std::string host = absl::StrCat(peer.hello.host(), ":", peer.hello.pid());
  Blame(peer);
  Distrust(stream);
  if (member) {
    EndEpoch(rank, named, false, now_ms);
  } else {
    LogWarning(absl::StrCat("worker ", host, " dropped: ", what));
  }
  CheckClosing(now_ms);
}

void GroupMachine::Blame(const Peer& peer) {
  if (blamed_.size() >= kMaxSpareWorkers) blamed_.clear();  // of processes long gone
  if (!peer.hello.instance().empty()) blamed_.insert(peer.hello.instance());
}

bool GroupMachine::MayLoadAgain(int64_t now_ms) const {
  return lost_ms_ && now_ms - *lost_ms_ < options_.timeouts.reload_ms;
}

void GroupMachine::CheckClosing(int64_t now_ms) {
  if (phase_ != Phase::kClosing) return;
  const bool waiting = std::any_of(peers_.begin(), peers_.end(), [](const auto& entry) {
    return entry.second.role == Role::kReleasing;
  });
  if (!waiting) return FinishClosing(now_ms);
  if (now_ms < release_deadline_ms_) return;
  for (auto& [stream, peer] : peers_) {
    if (peer.role != Role::kReleasing) continue;
    LogWarning(absl::StrCat(Name(peer), ": did not give up epoch ", epoch_, " within ",
                            Seconds(options_.timeouts.release_ms), "; dropped"));
    Distrust(stream);
  }
  FinishClosing(now_ms);
}

void GroupMachine::FinishClosing(int64_t now_ms) {
  phase_ = Phase::kGathering;
  release_deadline_ms_ = kNever;
  TryForm(now_ms);
}

// Nothing better turned up: the rank that complained is named, or one that has
// missed heartbeats while the others sent theirs.
void GroupMachine::BlameSymptom(int64_t now_ms) {
  if (!symptom_ || now_ms < symptom_->due_ms) return;
  const int64_t quiet_ms = 5 * options_.timeouts.heartbeat_interval_ms / 2;
  for (auto& [stream, peer] : peers_) {
    if (!IsMember(peer) || peer.rank == symptom_->rank || now_ms - peer.heard_ms < quiet_ms) {
      continue;
    }
    const std::string what = absl::StrCat(
        Name(peer), ": silent for ", Seconds(now_ms - peer.heard_ms), " (", symptom_->text, ")");
    return EndEpoch(static_cast<int>(peer.rank), what, false, now_ms);
  }
  const Symptom symptom = *symptom_;
  EndEpoch(static_cast<int>(symptom.rank), symptom.text, false, now_ms);
}

void GroupMachine::CheckSilence(int64_t now_ms) {
  int culprit = -1;
  std::string what;
  for (auto& [stream, peer] : peers_) {
    const int64_t limit_ms = peer.role == Role::kUnknown ? options_.timeouts.hello_ms
                                                         : options_.timeouts.heartbeat_timeout_ms;
    const int64_t silent_ms = now_ms - peer.heard_ms;
    if (silent_ms < limit_ms) continue;
    if (peer.role == Role::kLeaving) {
      // It was told to go and does not read: cut it off.
      port_->Abort(stream);
      peer.heard_ms = now_ms;
      continue;
    }
    if (IsMember(peer) && what.empty()) {
      culprit = static_cast<int>(peer.rank);
      what = absl::StrCat(Name(peer), ": no sign of life for ", Seconds(silent_ms));
    }
    Distrust(stream);
  }
  // After all who are silent are out: none of them is to be in the next epoch.
  if (!what.empty()) EndEpoch(culprit, what, false, now_ms);
}

void GroupMachine::CheckStep(int64_t now_ms) {
  if (phase_ != Phase::kServing || now_ms < step_due_ms_) return;
  const StepLedger::Step& step = *ledger_.oldest();
  const std::vector<uint32_t> missing = ledger_.Missing();
  // When everybody hangs, nobody can be told apart.
  const bool one_is_late = missing.size() == 1;
  const std::string who = one_is_late ? Name(peers_.at(members_[missing[0]]))
                                      : absl::StrCat("ranks ", absl::StrJoin(missing, ", "));
  // Not blamed: who hangs comes back without its weights, if at all, and who lets go was only slow.
  EndEpoch(one_is_late ? static_cast<int>(missing[0]) : -1,
           absl::StrCat(who, ": step ", step.step, " (", step.tokens, " tokens) not done after ",
                        Seconds(now_ms - step.began_ms)),
           false, now_ms);
}

void GroupMachine::CheckLoad(int64_t now_ms) {
  if (phase_ != Phase::kLoading || now_ms - load_moved_ms_ < options_.timeouts.load_stall_ms) {
    return;
  }
  // Who has loaded waits for who has not, and is no more ready than they are.
  const bool one_hangs = std::any_of(members_.begin(), members_.end(),
                                     [this](StreamId stream) { return !peers_.at(stream).loaded; });
  int culprit = -1;
  std::string who;
  for (const StreamId stream : members_) {
    const Peer& peer = peers_.at(stream);
    if (peer.ready || (one_hangs && peer.loaded)) continue;
    if (one_hangs) Blame(peer);
    culprit = static_cast<int>(peer.rank);
    absl::StrAppend(&who, who.empty() ? "" : ", ", Name(peer));
  }
  EndEpoch(culprit,
           absl::StrCat(who, ": loading made no progress for ", Seconds(now_ms - load_moved_ms_)),
           false, now_ms);
}

void GroupMachine::Beat(int64_t now_ms) {
  if (now_ms < next_beat_ms_) return;
  CoordinatorMessage message;
  message.mutable_heartbeat()->set_epoch(epoch_);
  message.mutable_heartbeat()->set_last_step(ledger_.last_sent());
  std::vector<StreamId> all;
  for (const auto& [stream, peer] : peers_) {
    if (peer.role != Role::kUnknown && peer.role != Role::kLeaving) all.push_back(stream);
  }
  if (!all.empty()) port_->Send(all, message);
  next_beat_ms_ = peers_.empty() ? kNever : now_ms + options_.timeouts.heartbeat_interval_ms;
}

void GroupMachine::OnTick(int64_t now_ms) {
  // A tick that comes far too late means that this process stood still, not that
  // everybody else fell silent.
  const int64_t late_ms = expected_tick_ms_ == kNever ? 0 : now_ms - expected_tick_ms_;
  if (late_ms > 2 * options_.timeouts.heartbeat_interval_ms) {
    LogWarning(absl::StrCat("the coordinator stood still for ", Seconds(late_ms)));
    for (auto& [stream, peer] : peers_) {
      peer.heard_ms = std::max(peer.heard_ms, std::min(now_ms, peer.heard_ms + late_ms));
    }
    ledger_.Forgive(late_ms);
    if (step_due_ms_ != kNever) step_due_ms_ += late_ms;
    if (release_deadline_ms_ != kNever) release_deadline_ms_ += late_ms;
    load_moved_ms_ += late_ms;
  }
  expected_tick_ms_ = kNever;
  if (phase_ != Phase::kShutdown) {
    BlameSymptom(now_ms);
    CheckSilence(now_ms);
    CheckStep(now_ms);
    CheckLoad(now_ms);
    CheckClosing(now_ms);
    TryForm(now_ms);
    Beat(now_ms);
  }
  expected_tick_ms_ = NextWakeMs();
}

int64_t GroupMachine::NextWakeMs() const {
  if (phase_ == Phase::kShutdown) return kNever;
  // Silence, missing Hellos and stalled loads are found with the next heartbeat.
  int64_t wake_ms = std::min({next_beat_ms_, step_due_ms_, release_deadline_ms_});
  if (symptom_) wake_ms = std::min(wake_ms, symptom_->due_ms);
  if (phase_ == Phase::kGathering && !peers_.empty() && earliest_form_ms_ > 0) {
    wake_ms = std::min(wake_ms, std::max(earliest_form_ms_, next_beat_ms_));
  }
  return wake_ms;
}

}  // namespace lockstep
