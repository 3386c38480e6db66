#include "worker/fault_injection.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <set>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/log.h"

namespace lockstep {
namespace {

// What the host and the communicator it is given share.
struct State {
  std::vector<Fault> faults;
  std::atomic<uint64_t> epoch{0}, rank{0}, step{0};
  std::atomic<bool> skip_next{false};

  // The first fault of that name that applies now.
  template <typename Pred>
  const Fault* Find(const std::string& name, Pred pred) const {
    for (const Fault& fault : faults) {
      if (fault.name == name && (!fault.epoch || *fault.epoch == epoch) &&
          (!fault.rank || *fault.rank == rank) && pred(fault)) {
        return &fault;
      }
    }
    return nullptr;
  }
  const Fault* AtStep(const std::string& name) const {
    return Find(name, [&](const Fault& f) { return f.step && *f.step == step; });
  }
  void Phase(const std::string& phase) const {
    const auto here = [&](const Fault& f) { return f.phase == phase; };
    if (Find("exit", here) != nullptr) {
      LogError(absl::StrCat("injected: exit in phase ", phase));
      _exit(kInjectedExitCode);
    }
    if (Find("hang", here) != nullptr) Hang();
  }
  [[noreturn]] static void Hang() {
    LogError("injected: hang");
    while (true) pause();
  }
};

bool HasToken(const NewSequence& sequence, uint64_t token) {
  const auto end = sequence.tokens.begin() + sequence.num_prompt_tokens;
  return std::find(sequence.tokens.begin(), end, token) != end;
}

class FaultyHost final : public ModelHost {
 public:
  FaultyHost(std::shared_ptr<State> state, std::unique_ptr<ModelHost> host)
      : state_(std::move(state)), host_(std::move(host)) {}

  absl::StatusOr<LoadReport> Load(const worker::v1::Configure& configure,
                                  const Progress& progress) override {
    state_->epoch = configure.epoch();
    state_->rank = configure.rank();
    state_->step = 0;
    poisoned_.clear();
    state_->Phase("load");
    return host_->Load(configure, progress);
  }

  absl::Status Begin(uint64_t epoch, Communicator* comm) override {
    state_->Phase("communicator");
    absl::Status status = host_->Begin(epoch, comm);
    state_->Phase("kv");
    return status;
  }

  absl::Status Submit(const StepPlan& plan, uint64_t plan_received_ns) override {
    state_->step = plan.step;
    for (const Slot slot : plan.finished_slots) poisoned_.erase(slot);
    for (const NewSequence& sequence : plan.new_sequences) {
      const auto asks = [&](const Fault& f) { return f.token && HasToken(sequence, *f.token); };
      if (state_->Find("die", asks) != nullptr) {
        LogError("injected: a poison request");
        _exit(kInjectedExitCode);
      }
      if (state_->Find("poison", asks) != nullptr) poisoned_.insert(sequence.slot);
    }
    if (state_->AtStep("hang") != nullptr) State::Hang();
    if (state_->AtStep("fail") != nullptr) return absl::InternalError("injected: step failed");
    const Fault* slow = state_->Find("slow", [](const Fault& f) { return f.ms.has_value(); });
    if (slow != nullptr) std::this_thread::sleep_for(std::chrono::milliseconds(*slow->ms));
    state_->skip_next = state_->AtStep("skip_collective") != nullptr;
    return host_->Submit(plan, plan_received_ns);
  }

  bool Done() override { return host_->Done(); }

  absl::StatusOr<StepResult> Collect() override {
    absl::StatusOr<StepResult> result = host_->Collect();
    if (!result.ok()) return result;
    state_->step = result->step;
    if (state_->AtStep("lie_digest") != nullptr) result->digest ^= 1;
    if (state_->AtStep("lie_token") != nullptr && !result->sampled.empty()) {
      result->sampled.front().token = 0xffffffff;
    }
    for (SampledToken& sampled : result->sampled) {
      if (poisoned_.count(sampled.slot) == 0) continue;
      sampled.poisoned = true;
      sampled.has_logprobs = false;
    }
    return result;
  }

  bool End() override { return host_->End(); }
  int loaded_rank() const override { return host_->loaded_rank(); }
  uint64_t held_bytes() const override { return host_->held_bytes(); }

 private:
  const std::shared_ptr<State> state_;
  const std::unique_ptr<ModelHost> host_;
  std::set<Slot> poisoned_;
};

class FaultyCommunicator final : public RankCommunicator {
 public:
  FaultyCommunicator(std::shared_ptr<State> state, std::unique_ptr<RankCommunicator> comm)
      : state_(std::move(state)), comm_(std::move(comm)) {}

  int rank() const override { return comm_->rank(); }
  int size() const override { return comm_->size(); }
  std::optional<uint64_t> buffer_bytes() const override { return comm_->buffer_bytes(); }
  std::string library() const override { return comm_->library(); }
  absl::Status Join(AddressExchange& exchange) override { return comm_->Join(exchange); }
  absl::Status AllReduceSum(absl::Span<float> values) override {
    if (state_->skip_next.exchange(false)) return absl::OkStatus();
    return Counted(comm_->AllReduceSum(values));
  }
  absl::Status Gather(absl::Span<const float> mine, absl::Span<float> all, int root) override {
    return Counted(comm_->Gather(mine, all, root));
  }
  absl::Status Broadcast(absl::Span<std::byte> data, int root) override {
    return Counted(comm_->Broadcast(data, root));
  }
  absl::Status Barrier() override { return Counted(comm_->Barrier()); }
  void Abort() override { comm_->Abort(); }
  DeviceCommunicator* device() override { return comm_->device(); }

 private:
  absl::Status Counted(absl::Status status) {
    const CollectiveStats one = comm_->stats();
    comm_->ResetStats();
    stats_.count += one.count;
    stats_.wait_ns += one.wait_ns;
    stats_.transfer_ns += one.transfer_ns;
    stats_.bytes_sent += one.bytes_sent;
    return status;
  }

  const std::shared_ptr<State> state_;
  const std::unique_ptr<RankCommunicator> comm_;
};

absl::Status ParseCondition(const std::string& text, Fault* fault) {
  const std::vector<std::string> pair = absl::StrSplit(text, absl::MaxSplits('=', 1));
  if (pair.size() == 2 && pair[0] == "phase" &&
      (pair[1] == "load" || pair[1] == "communicator" || pair[1] == "kv")) {
    fault->phase = pair[1];
    return absl::OkStatus();
  }
  const std::pair<const char*, std::optional<uint64_t>*> numbers[] = {{"step", &fault->step},
                                                                      {"token", &fault->token},
                                                                      {"ms", &fault->ms},
                                                                      {"epoch", &fault->epoch},
                                                                      {"rank", &fault->rank}};
  for (const auto& [name, value] : numbers) {
    uint64_t parsed = 0;
    if (pair.size() != 2 || pair[0] != name || !absl::SimpleAtoi(pair[1], &parsed)) continue;
    *value = parsed;
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "--inject: condition \"", text,
      "\": expected phase=load|communicator|kv, or step, token, ms, epoch or rank = N"));
}

}  // namespace

absl::StatusOr<std::vector<Fault>> ParseFaults(const std::string& spec) {
  // Each with the condition it cannot do without.
  static const std::set<std::pair<std::string, std::string>> known = {
      {"exit", "phase"},     {"hang", "step"}, {"hang", "phase"},    {"skip_collective", "step"},
      {"lie_token", "step"}, {"die", "token"}, {"slow", "ms"},       {"lie_digest", "step"},
      {"poison", "token"},   {"fail", "step"}, {"no_peers", "phase"}};
  std::vector<Fault> faults;
  for (const std::string& part :
       std::vector<std::string>(absl::StrSplit(spec, ';', absl::SkipWhitespace()))) {
    const std::vector<std::string> halves = absl::StrSplit(part, absl::MaxSplits('@', 1));
    Fault fault;
    fault.name = halves[0];
    if (halves.size() == 2) {
      for (const std::string& condition :
           std::vector<std::string>(absl::StrSplit(halves[1], ','))) {
        absl::Status status = ParseCondition(condition, &fault);
        if (!status.ok()) return status;
      }
    }
    const bool complete = (!fault.phase.empty() && known.count({fault.name, "phase"}) > 0) ||
                          (fault.step && known.count({fault.name, "step"}) > 0) ||
                          (fault.token && known.count({fault.name, "token"}) > 0) ||
                          (fault.ms && known.count({fault.name, "ms"}) > 0);
    if (!complete) {
      return absl::InvalidArgumentError(
          absl::StrCat("--inject: \"", part, "\": no such fault; see worker/fault_injection.h"));
    }
    faults.push_back(std::move(fault));
  }
  return faults;
}

std::unique_ptr<ModelHost> InjectFaults(std::vector<Fault> faults, std::unique_ptr<ModelHost> host,
                                        MakeCommunicator* make_communicator) {
  if (faults.empty()) return host;
  auto state = std::make_shared<State>();
  state->faults = std::move(faults);
  *make_communicator = [state, make = *make_communicator](CommunicatorOptions options) {
    for (const Fault& fault : state->faults) {
      options.nccl_only |= fault.name == "no_peers";
      if (fault.name == "skip_collective")
        options.skips = [state] { return state->skip_next.exchange(false); };
    }
    return std::make_unique<FaultyCommunicator>(state, make(options));
  };
  return std::make_unique<FaultyHost>(state, std::move(host));
}

}  // namespace lockstep
