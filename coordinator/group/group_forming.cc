// From a worker's Hello to GroupFormed.
#include <algorithm>
#include <iterator>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/log.h"
#include "coordinator/group/group_machine.h"

namespace lockstep {

using worker::v1::CoordinatorMessage;

namespace {

constexpr size_t kLongestName = 256;  // bytes of a name that a worker gives itself

MemoryParts AllocatedMemory(const worker::v1::Ready& ready) {
  MemoryParts memory{.weights = ready.weight_bytes(), .kv = ready.kv_bytes()};
  if (ready.has_activation_bytes()) memory.activations = ready.activation_bytes();
  if (ready.has_communication_bytes()) memory.communication = ready.communication_bytes();
  if (ready.has_runtime_bytes()) memory.runtime = ready.runtime_bytes();
  return memory;
}

}  // namespace

void GroupMachine::OnHello(StreamId stream, Peer& peer, const worker::v1::Hello& hello,
                           int64_t now_ms) {
  if (peer.role != Role::kUnknown) {
    return Lied(stream, peer, "said Hello twice on one stream", now_ms);
  }
  peer.hello = hello;
  // They become part of errors and of metrics.
  peer.hello.set_host(OneLine(hello.host(), kLongestName));
  peer.hello.set_device(OneLine(hello.device(), kLongestName));
  if (phase_ == Phase::kFatal) return Refuse(stream, peer, fatal_reason_);
  if (hello.protocol_version() != wire::kProtocolVersion) {
    return Refuse(
        stream, peer,
        absl::StrCat("protocol version ", hello.protocol_version(), ": this coordinator speaks ",
                     wire::kProtocolVersion, "; start a worker of the same build"));
  }
  if (hello.backend() != options_.backend) {
    return Refuse(stream, peer,
                  absl::StrCat("backend ", OneLine(hello.backend(), kLongestName),
                               ": this group runs on ", options_.backend, " (--backend)"));
  }
  // The same process on a second stream: the first one is broken, whether or not
  // its end has been seen.
  for (const auto& [other, twin] : peers_) {
    if (other != stream && !hello.instance().empty() && twin.role != Role::kUnknown &&
        twin.role != Role::kLeaving && twin.hello.instance() == hello.instance()) {
      port_->Abort(other);
      OnClosed(other, now_ms);
      break;
    }
  }
  if (peers_.size() > options_.tp_size + kMaxSpareWorkers) {
    return Refuse(stream, peer,
                  absl::StrCat("enough workers: ", peers_.size() - 1, " are attached and ",
                               options_.tp_size, " needed"));
  }
  peer.role = Role::kSpare;
  peer.preferred_rank = hello.preferred_rank();
  LogInfo(absl::StrCat("worker ", peer.hello.host(), ":", hello.pid(), " (", peer.hello.device(),
                       ") attached"));
  TryForm(now_ms);
}

void GroupMachine::Refuse(StreamId stream, Peer& peer, const std::string& reason) {
  LogWarning(
      absl::StrCat("worker ", peer.hello.host(), ":", peer.hello.pid(), " refused: ", reason));
  CoordinatorMessage message;
  message.mutable_refusal()->set_reason(reason);
  SendTo(stream, message);
  port_->Close(stream);
  peer.role = Role::kLeaving;
}

// Survivors take the ranks whose weights they hold; the rest goes by arrival. Whom an epoch
// failed for comes last, weights or not.
std::vector<StreamId> GroupMachine::ChooseMembers() const {
  std::vector<StreamId> chosen(options_.tp_size, 0);
  std::vector<StreamId> others, blamed;
  const auto place = [&](StreamId stream, int preferred_rank) {
    const auto rank = static_cast<size_t>(preferred_rank);
    const bool free = preferred_rank >= 0 && rank < chosen.size() && chosen[rank] == 0;
    if (free) chosen[rank] = stream;
    return free;
  };
  for (const auto& [stream, peer] : peers_) {
    if (peer.role != Role::kSpare) continue;
    if (blamed_.contains(peer.hello.instance())) {
      blamed.push_back(stream);
    } else if (!place(stream, peer.preferred_rank)) {
      others.push_back(stream);
    }
  }
  const auto missing = [&] {
    return static_cast<size_t>(std::count(chosen.begin(), chosen.end(), StreamId{0}));
  };
  for (const StreamId stream : blamed) {
    if (missing() <= others.size()) break;
    if (!place(stream, peers_.at(stream).preferred_rank)) others.push_back(stream);
  }
  if (missing() > others.size()) return {};
  auto next = others.begin();
  for (StreamId& empty : chosen) {
    if (empty == 0) empty = *next++;
  }
  return chosen;
}

void GroupMachine::TryForm(int64_t now_ms) {
  if (phase_ != Phase::kGathering || now_ms < earliest_form_ms_) return;
  std::vector<StreamId> members = ChooseMembers();
  if (members.empty() || !DecideSizes(members)) return;
  members_ = std::move(members);
  ++epoch_;
  phase_ = Phase::kLoading;
  SendConfigure(now_ms);
}

bool GroupMachine::DecideSizes(const std::vector<StreamId>& members) {
  if (sizes_) return true;
  std::vector<WorkerMemory> memory;
  for (const StreamId stream : members) {
    const worker::v1::Hello& hello = peers_.at(stream).hello;
    memory.push_back(
        {hello.host(), hello.device_uuid(), hello.memory_total_bytes(), hello.memory_free_bytes()});
  }
  absl::StatusOr<GroupSizes> sizes = options_.size(memory);
  if (!sizes.ok()) {
    phase_ = Phase::kFatal;
    fatal_reason_ = std::string(sizes.status().message());
    port_->Post(GroupFailed{epoch_ + 1, -1, absl::UnavailableError(fatal_reason_), /*fatal=*/true});
    return false;
  }
  sizes_ = *sizes;
  if (options_.predict) predicted_ = options_.predict(*sizes_);
  return true;
}

void GroupMachine::SendConfigure(int64_t now_ms) {
  ledger_ = StepLedger(options_.tp_size);
  step_due_ms_ = kNever;
  symptom_.reset();
  num_keys_ = 0;
  num_members_ready_ = 0;
  num_profiling_ = 0;
  load_moved_ms_ = now_ms;
  std::map<std::string, uint32_t> ranks_on_host;
  for (const StreamId stream : members_) ++ranks_on_host[peers_.at(stream).hello.host()];
  for (uint32_t rank = 0; rank < options_.tp_size; ++rank) {
    Peer& peer = peers_.at(members_[rank]);
    peer.role = Role::kMember;
    peer.rank = rank;
    peer.ready.reset();
    peer.load_bytes_done = 0;
    peer.loaded = false;
    CoordinatorMessage message;
    worker::v1::Configure& configure = *message.mutable_configure();
    configure = options_.configure;
    configure.set_epoch(epoch_);
    configure.set_rank(rank);
    configure.set_tp_size(options_.tp_size);
    configure.set_num_kv_blocks(sizes_->num_kv_blocks);
    configure.set_max_num_seqs(sizes_->max_num_seqs);
    configure.set_communicator(absl::StrCat(nonce_, "/", epoch_));
    if (configure.cpu_threads() == 0 && peer.hello.num_cpu_threads() > 0) {
      // Ranks of one host share its processors.
      configure.set_cpu_threads(
          std::max(1u, peer.hello.num_cpu_threads() / ranks_on_host[peer.hello.host()]));
    }
    SendTo(members_[rank], message);
    LogInfo(absl::StrCat("epoch ", epoch_, ": ", Name(peer), " configured"));
  }
}

void GroupMachine::OnProgress(Peer& peer, const worker::v1::LoadProgress& progress,
                              int64_t now_ms) {
  if (!IsMember(peer) || phase_ != Phase::kLoading || progress.epoch() != epoch_) return;
  if (progress.bytes_done() == peer.load_bytes_done) return;
  peer.load_bytes_done = progress.bytes_done();
  load_moved_ms_ = now_ms;
}

void GroupMachine::OnReady(Peer& peer, const worker::v1::Ready& ready, int64_t now_ms) {
  if (!IsMember(peer) || phase_ != Phase::kLoading || ready.epoch() != epoch_) return;
  if (peer.ready) return;
  peer.ready = ready;
  load_moved_ms_ = now_ms;
  if (++num_members_ready_ == options_.tp_size) AnnounceFormed();
}

void GroupMachine::AnnounceFormed() {
  GroupFormed formed;
  formed.epoch = epoch_;
  formed.num_kv_blocks = sizes_->num_kv_blocks;
  formed.max_num_seqs = sizes_->max_num_seqs;
  for (uint32_t rank = 0; rank < options_.tp_size; ++rank) {
    const Peer& peer = peers_.at(members_[rank]);
    RankReport report;
    report.rank = rank;
    report.host = peer.hello.host();
    report.device = peer.hello.device();
    report.pid = peer.hello.pid();
    report.collective_library = peer.ready->collective_library().empty()
                                    ? peer.hello.collective_library()
                                    : peer.ready->collective_library();
    report.shard = peer.ready->shard();
    report.memory = AllocatedMemory(*peer.ready);
    if (rank < predicted_.size()) report.predicted = predicted_[rank];
    report.checkpoint_bytes = peer.ready->checkpoint_bytes();
    for (const auto& phase : peer.ready->phases()) {
      report.phases.emplace_back(phase.name(), phase.seconds());
    }
    formed.ranks.push_back(std::move(report));
  }
  phase_ = Phase::kServing;
  LogInfo(absl::StrCat("epoch ", epoch_, ": the group is whole"));
  port_->Post(std::move(formed));
}

void GroupMachine::RelayKey(StreamId from, Peer& peer, const worker::v1::CommKey& key,
                            int64_t now_ms) {
  if (!IsMember(peer) || !EpochOpen() || key.epoch() != epoch_) return;
  if (std::ssize(key.key()) > wire::kMaxCommKeyBytes ||
      std::ssize(key.value()) > wire::kMaxCommValueBytes || ++num_keys_ > wire::kMaxCommKeys) {
    const std::string what =
        absl::StrCat("communicator key of ", key.key().size(), " + ", key.value().size(),
                     " bytes, number ", num_keys_, ": at most ", wire::kMaxCommKeyBytes, " + ",
                     wire::kMaxCommValueBytes, " bytes and ", wire::kMaxCommKeys, " keys an epoch");
    return Lied(from, peer, what, now_ms);
  }
  peer.loaded = true;
  CoordinatorMessage message;
  *message.mutable_comm_key() = key;
  std::vector<StreamId> others;
  for (const StreamId stream : members_) {
    if (stream != from) others.push_back(stream);
  }
  port_->Send(others, message);
}

}  // namespace lockstep
