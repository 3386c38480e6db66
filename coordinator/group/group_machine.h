// The life of a group, as a state machine: workers come and go, an epoch is
// formed, steps are sent and answered, the epoch ends, the next one is formed.
//
//   gathering --enough workers--> loading --all ready--> serving
//       ^                            |                      |
//       |                            +--- anything wrong ---+
//       +---- all released or gone ---- closing <-----------+
//
// At most one epoch exists at a time, and epochs rise. An epoch ends because a
// stream ended, a heartbeat was missed, a step took too long, a rank reported
// a failure or a rank lied; GroupFailed is posted once, at once, naming the
// rank at fault. Survivors keep their rank, hence their weights; workers beyond
// tp_size wait as spares. Epochs that fail before they are whole are spaced by
// a growing pause.
//
// Pure: no thread, clock or I/O. The owner serialises the calls, hands in the
// time (monotonic milliseconds) and calls OnTick at NextWakeMs().
#ifndef LOCKSTEP_COORDINATOR_GROUP_GROUP_MACHINE_H_
#define LOCKSTEP_COORDINATOR_GROUP_GROUP_MACHINE_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/group/group_options.h"
#include "coordinator/group/group_port.h"
#include "coordinator/group/step_deadline.h"
#include "coordinator/group/step_ledger.h"
#include "proto/worker.pb.h"
#include "wire/step_plan.h"

namespace lockstep {

class GroupMachine {
 public:
  // `port` outlives the machine. `nonce` makes communicator names unique across
  // coordinators.
  GroupMachine(GroupOptions options, std::string nonce, GroupPort* port);

  void OnOpen(StreamId stream, int64_t now_ms);
  void OnMessage(StreamId stream, const worker::v1::WorkerMessage& message, int64_t now_ms);
  // The stream's bytes made no message.
  void OnGarbage(StreamId stream, int64_t now_ms);
  void OnClosed(StreamId stream, int64_t now_ms);
  void OnTick(int64_t now_ms);
  // When OnTick is due next; kNever when nothing can become late.
  int64_t NextWakeMs() const;

  // Dropped when the plan's epoch is over or ending.
  void SendPlan(const StepPlan& plan, int64_t now_ms);
  void FailEpoch(uint64_t epoch, const absl::Status& reason, int64_t now_ms);
  // To every rank, before the next plan. False: no epoch serves.
  bool SendProfileStart(const worker::v1::ProfileStart& start);
  struct Member {
    StreamId stream = 0;
    std::string name;  // "rank 1 (host:pid)"
    std::string device;
    const worker::v1::DeviceStats* stats = nullptr;  // the last; null: none. Until the next call
  };
  std::vector<Member> Members() const;  // by rank, while an epoch serves
  // Tells every worker to exit. Nothing is posted from here on.
  void Shutdown();

  static constexpr int64_t kNever = INT64_MAX;

 private:
  enum class Phase { kGathering, kLoading, kServing, kClosing, kFatal, kShutdown };
  enum class Role { kUnknown, kSpare, kMember, kReleasing, kLeaving };

  struct Peer {
    Role role = Role::kUnknown;
    worker::v1::Hello hello;
    int preferred_rank = -1;  // the rank it holds weights of
    uint32_t rank = 0;        // of a member or one that is releasing
    int64_t heard_ms = 0;
    std::optional<worker::v1::Ready> ready;
    uint64_t load_bytes_done = 0;
    bool loaded = false;  // has said something to the others, which follows its load
    std::optional<worker::v1::DeviceStats> device_stats;
  };
  using Peers = std::map<StreamId, Peer>;  // in order of arrival

  struct Symptom {
    uint32_t rank = 0;
    std::string text;
    int64_t due_ms = 0;
  };

  // Forming (group_forming.cc).
  void OnHello(StreamId stream, Peer& peer, const worker::v1::Hello& hello, int64_t now_ms);
  void Refuse(StreamId stream, Peer& peer, const std::string& reason);
  void TryForm(int64_t now_ms);
  std::vector<StreamId> ChooseMembers() const;  // by rank; empty: too few
  bool DecideSizes(const std::vector<StreamId>& members);
  void SendConfigure(int64_t now_ms);
  void OnProgress(Peer& peer, const worker::v1::LoadProgress& progress, int64_t now_ms);
  void OnReady(Peer& peer, const worker::v1::Ready& ready, int64_t now_ms);
  void AnnounceFormed();
  void RelayKey(StreamId from, Peer& peer, const worker::v1::CommKey& key, int64_t now_ms);

  // Serving.
  void OnResult(StreamId stream, const Peer& peer, const worker::v1::StepResult& result,
                int64_t now_ms);
  void OnFailure(StreamId stream, const Peer& peer, const worker::v1::Failure& failure,
                 int64_t now_ms);
  void OnReleased(Peer& peer, const worker::v1::Released& released, int64_t now_ms);

  // Ending an epoch (group_ending.cc).
  bool MayLoadAgain(int64_t now_ms) const;  // after a load that failed for good
  void Blame(const Peer& peer);
  void EndEpoch(int rank, const std::string& what, bool fatal, int64_t now_ms);
  void Distrust(StreamId stream);
  // Distrusts it and ends the epoch that it is a member of.
  void Lied(StreamId stream, const Peer& peer, const std::string& what, int64_t now_ms);
  void BlameSymptom(int64_t now_ms);
  void CheckSilence(int64_t now_ms);
  void CheckStep(int64_t now_ms);
  void CheckLoad(int64_t now_ms);
  void CheckClosing(int64_t now_ms);
  void FinishClosing(int64_t now_ms);
  void Beat(int64_t now_ms);

  // From when a step began; longer while a profile starts or is being sent.
  int64_t StepAllowanceMs(uint64_t tokens) const;
  bool EpochOpen() const { return phase_ == Phase::kLoading || phase_ == Phase::kServing; }
  bool IsMember(const Peer& peer) const { return peer.role == Role::kMember; }
  std::string Name(const Peer& peer) const;  // "rank 1 (host:pid)"
  void SendTo(StreamId stream, const worker::v1::CoordinatorMessage& message);
  void SendToMembers(const worker::v1::CoordinatorMessage& message);

  const GroupOptions options_;
  const std::string nonce_;
  GroupPort* const port_;

  Phase phase_ = Phase::kGathering;
  Peers peers_;
  uint64_t epoch_ = 0;
  std::vector<StreamId> members_;  // by rank, of the current or last epoch
  std::optional<GroupSizes> sizes_;
  std::vector<MemoryParts> predicted_;  // by rank; may be empty
  std::string fatal_reason_;
  // Instances that hung, lied or could not load: they come after spares that did not. One that was
  // silent is not of them: it may have its weights still.
  std::set<std::string> blamed_;

  int64_t now_ms_ = 0;  // of the last tick, to notice a pause of this process
  int64_t expected_tick_ms_ = kNever;
  int64_t next_beat_ms_ = kNever;
  int64_t earliest_form_ms_ = 0;
  int64_t load_moved_ms_ = 0;  // last sign of progress while loading
  int64_t release_deadline_ms_ = kNever;
  int failures_in_a_row_ = 0;
  std::optional<int64_t> lost_ms_;  // when a group that was whole last ended
  int num_keys_ = 0;                // relayed in this epoch
  size_t num_members_ready_ = 0;
  uint32_t num_profiling_ = 0;  // members that have not sent the last part of a profile

  StepLedger ledger_;
  StepDeadline deadline_;
  int64_t step_due_ms_ = kNever;  // of the ledger's oldest step
  std::optional<Symptom> symptom_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_GROUP_GROUP_MACHINE_H_
