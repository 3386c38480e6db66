#include "tests/sim/simulation.h"

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <utility>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/retry_delay.h"
#include "coordinator/scheduler.h"
#include "tests/sim/client_mix.h"
#include "tests/sim/ledger.h"
#include "tests/sim/sim_model.h"
#include "tests/sim/sim_random.h"
#include "tests/sim/sim_worker.h"

namespace lockstep::sim {
namespace {

// Enough for the slowest run to end; a run that needs more hangs.
constexpr int kMaxDrainEvents = 100'000;

// A slot by the plans' word.
struct SlotView {
  std::vector<BlockId> table;
  uint32_t num_computed = 0;
};

struct PlanInFlight {
  StepPlan plan;
  std::set<BlockId> writes;          // blocks it may write
  std::vector<RequestId> killers;    // the group dies of executing it
  std::optional<StepResult> result;  // once the worker has executed it
};

class Run {
 public:
  explicit Run(const RunOptions& options)
      : options_(options),
        random_(options.seed),
        config_(DrawConfig(options.scenario, &random_)),
        weather_(DrawWeather(options.scenario, &random_)),
        clients_(config_, options.scenario, weather_, &random_),
        scheduler_(config_) {}

  RunReport Go();

 private:
  void OneEvent();
  void Arrive();
  void CancelOne();
  void StopOne();
  void Schedule();
  void Send(const StepPlan& plan);
  void ExecuteOne();
  void Answer();
  void Lie();
  void BeginEpoch();
  void EndEpoch(const std::string& why);
  void Publish();
  void CheckBooks();
  void CheckEnd();

  bool ok() const { return ledger_.violation().empty(); }
  template <typename... Args>
  void Trace(const Args&... args) {
    const std::string line = absl::StrCat(args..., "\n");
    for (const char c : line) report_.trace_hash = Mix(report_.trace_hash, static_cast<uint8_t>(c));
    if (options_.keep_trace) report_.trace += line;
    ++report_.events;
  }

  const RunOptions options_;
  Random random_;
  const SchedulerConfig config_;
  const Weather weather_;
  ClientMix clients_;
  Scheduler scheduler_;
  Ledger ledger_;
  PoisonSet poison_;
  RunReport report_;

  int64_t now_ms_ = 0;
  uint64_t epoch_ = 0, acknowledged_ = 0;
  bool epoch_open_ = false;
  std::unique_ptr<SimWorker> worker_;
  std::deque<PlanInFlight> in_flight_;
  std::map<Slot, SlotView> slots_;
  std::map<RequestId, int> kills_;
  std::vector<SequenceId> stops_;  // found by the text stage, not yet told
  std::vector<SchedulerEvent> events_;
  uint64_t arrived_ = 0;
};

RunReport Run::Go() {
  Trace("slots ", config_.max_num_seqs, " batch ", config_.max_batched_tokens, " length ",
        config_.max_model_len, " block ", config_.block_size, " blocks ", config_.num_kv_blocks,
        " caching ", config_.enable_prefix_caching, " plans ", config_.max_plans_in_flight);
  while (ok() && arrived_ < weather_.num_requests) OneEvent();
  Trace("drain");
  for (int i = 0; ok() && (scheduler_.HasRequests() || scheduler_.plans_in_flight() > 0); ++i) {
    if (i > kMaxDrainEvents) ledger_.Violate("it never ends");
    OneEvent();
  }
  if (ok()) CheckEnd();
  const SchedulerStats stats = scheduler_.Stats();
  report_.violation = ledger_.violation();
  report_.received = stats.received;
  report_.completed = stats.completed;
  report_.failed = stats.failed;
  report_.cancelled = stats.cancelled;
  report_.rejected = stats.rejected;
  report_.preemptions = stats.preemptions;
  report_.cache_hits = stats.prefix_cache_hits;
  return report_;
}

void Run::OneEvent() {
  now_ms_ += random_.Below(3);
  if (!epoch_open_ && random_.Percent(30)) {
    BeginEpoch();
  } else {
    const Weather& w = weather_;
    const uint32_t arrivals = arrived_ < w.num_requests ? w.arrivals : 0;
    const uint32_t stops = stops_.empty() ? 0 : 20;
    uint32_t x = random_.Below(arrivals + w.cancels + w.deaths + w.lies + w.schedules +
                               2 * w.answers + stops);
    const auto is = [&x](uint32_t weight) {
      if (x < weight) return true;
      x -= weight;
      return false;
    };
    if (is(arrivals)) {
      const uint32_t burst = random_.Percent(10) ? random_.Between(2, 30) : 1;
      for (uint32_t i = 0; i < burst && arrived_ < w.num_requests; ++i) Arrive();
    } else if (is(w.cancels)) {
      if (random_.Percent(20)) CancelOne();
    } else if (is(w.deaths)) {
      if (epoch_open_ && random_.Percent(30)) EndEpoch("rank 1 died");
    } else if (is(w.lies)) {
      if (random_.Percent(30)) Lie();
    } else if (is(w.schedules)) {
      Schedule();
    } else if (is(w.answers)) {
      ExecuteOne();
    } else if (is(w.answers)) {
      Answer();
    } else {
      StopOne();
    }
  }
  Publish();
  if (ok()) CheckBooks();
}

void Run::Arrive() {
  Ledger::Entry entry = clients_.Draw(now_ms_, &poison_);
  ++arrived_;
  // One at a time: while a suspect waits for room others go on, and a second
  // culprit among them would find everybody at a second death.
  if (options_.scenario == Scenario::kPoisoned && ledger_.KillerLives()) entry.kills_at.reset();
  const Request& r = entry.request;
  const uint64_t total = r.prompt.size() + r.sampling.max_tokens;
  const uint64_t positions = r.prompt.size() + std::max(1u, r.sampling.max_tokens) - 1;
  const bool fits =
      r.prompt.size() < config_.max_model_len && total <= config_.max_model_len &&
      (positions + config_.block_size - 1) / config_.block_size <= config_.num_kv_blocks;
  const absl::Status status = scheduler_.Add(r, now_ms_);
  Trace("arrive ", r.id.value, " prompt ", r.prompt.size(), " max ", r.sampling.max_tokens, " n ",
        r.sampling.n, " ", static_cast<int>(status.code()));
  if (absl::IsInvalidArgument(status) == fits) {
    ledger_.Violate("request ", r.id.value,
                    fits ? " fits: " : " can never fit: ", status.ToString());
  }
  if (absl::IsResourceExhausted(status)) {
    const bool full = scheduler_.Stats().waiting >= config_.max_queued_requests;
    if (!full || !GetRetryDelay(status)) ledger_.Violate("refused wrongly: ", status.ToString());
  }
  if (status.ok()) ledger_.Accept(std::move(entry));
}

void Run::CancelOne() {
  if (ledger_.live().empty()) return;
  auto it = ledger_.live().begin();
  std::advance(it, random_.Below(static_cast<uint32_t>(ledger_.live().size())));
  const RequestId id(it->first);
  Trace("cancel ", id.value);
  if (!scheduler_.Cancel(id)) ledger_.Violate("request ", id.value, " is lost");
  ledger_.Cancelled(id);
  if (scheduler_.Cancel(id)) ledger_.Violate("request ", id.value, " was cancelled twice");
}

void Run::StopOne() {
  const SequenceId id = stops_.back();
  stops_.pop_back();
  const Ledger::Entry* const entry = ledger_.Find(id.request);
  const bool open = entry != nullptr && !entry->outputs[id.index].ended;
  Trace("stop ", id.request.value, "/", id.index);
  if (scheduler_.Stop(id) != open) ledger_.Violate("stop of ", id.request.value, " went wrong");
  if (open) ++report_.stops;
  if (open) ledger_.Stopped(id);
}

void Run::Schedule() {
  const std::optional<StepPlan> plan = scheduler_.Schedule(now_ms_, &events_);
  Publish();
  if (!plan) {
    // Invariant 13.
    if (epoch_open_ && in_flight_.empty() && scheduler_.HasRequests()) {
      ledger_.Violate("requests wait and no step happens");
    }
    return;
  }
  if (!epoch_open_) ledger_.Violate("a plan without a group");
  if (static_cast<int>(in_flight_.size()) >= config_.max_plans_in_flight) {
    ledger_.Violate("too many plans in flight");
  }
  std::string spans;
  for (const Span& span : plan->spans) {
    absl::StrAppend(&spans, " ", span.slot.value, ":", span.num_tokens);
  }
  Trace("plan ", plan->step, " digest ", absl::Hex(plan->digest), " new ",
        plan->new_sequences.size(), " grown ", plan->grown_tables.size(), " finished ",
        plan->finished_slots.size(), spans);
  ledger_.CheckPlan(*plan, now_ms_);
  if (ok()) Send(*plan);
  ++report_.steps;
}

// Invariants 5 and 6: a block that a plan hands out, to be written or as part of
// a cached prefix, is written by no step that is still unacknowledged.
void Run::Send(const StepPlan& plan) {
  const auto check = [&](BlockId block) {
    for (const PlanInFlight& other : in_flight_) {
      if (other.writes.contains(block)) {
        ledger_.Violate("step ", plan.step, ": block ", block.value, " is handed out while step ",
                        other.plan.step, " may still write it");
      }
    }
  };
  for (const Slot slot : plan.finished_slots) slots_.erase(slot);
  for (const NewSequence& s : plan.new_sequences) {
    slots_[s.slot] = {s.block_ids, s.num_computed_tokens};
    std::for_each(s.block_ids.begin(), s.block_ids.end(), check);
  }
  for (const GrownTable& grown : plan.grown_tables) {
    std::vector<BlockId>& table = slots_[grown.slot].table;
    table.insert(table.end(), grown.block_ids.begin(), grown.block_ids.end());
    std::for_each(grown.block_ids.begin(), grown.block_ids.end(), check);
  }
  PlanInFlight sent{.plan = plan, .writes = {}, .killers = {}, .result = std::nullopt};
  for (const Span& span : plan.spans) {
    SlotView& slot = slots_[span.slot];
    const SequenceId id = ledger_.InSlot(span.slot);
    const uint32_t kills_at =
        id.index == 0 ? ledger_.Find(id.request)->kills_at.value_or(UINT32_MAX) : UINT32_MAX;
    for (uint32_t i = 0; i < span.num_tokens; ++i, ++slot.num_computed) {
      const uint32_t index = slot.num_computed / config_.block_size;
      if (index >= slot.table.size()) return ledger_.Violate("a span beyond its table");
      sent.writes.insert(slot.table[index]);
      if (kills_at == slot.num_computed) sent.killers.push_back(id.request);
    }
  }
  in_flight_.push_back(std::move(sent));
}

void Run::ExecuteOne() {
  const auto next = std::find_if(in_flight_.begin(), in_flight_.end(),
                                 [](const PlanInFlight& sent) { return !sent.result; });
  if (next == in_flight_.end()) return;
  if (!next->killers.empty()) {
    for (const RequestId id : next->killers) {
      if (++kills_[id] > 2) ledger_.Violate("request ", id.value, " killed a third group");
    }
    return EndEpoch("a poison request");
  }
  Trace("execute ", next->plan.step);
  absl::StatusOr<StepResult> result = worker_->Run(next->plan);
  if (!result.ok()) return ledger_.Violate("the worker refuses: ", result.status().ToString());
  next->result = *std::move(result);
}

void Run::Answer() {
  if (in_flight_.empty() || !in_flight_.front().result) return;
  const StepResult result = *std::move(in_flight_.front().result);
  in_flight_.pop_front();
  Trace("answer ", result.step);
  const absl::Status status = scheduler_.Apply(result, &events_);
  if (!status.ok()) return ledger_.Violate("an honest result: ", status.ToString());
  acknowledged_ = result.step;
}

// A result that must not be believed, and must leave no trace.
void Run::Lie() {
  if (in_flight_.empty() || !in_flight_.front().result) return;
  StepResult lie = *in_flight_.front().result;
  switch (random_.Below(8)) {
    case 0:
      ++lie.step;
      break;
    case 1:
      --lie.epoch;
      break;
    case 2:
      lie.digest ^= 1;
      break;
    case 3:
      lie.sampled.emplace_back();
      break;
    case 4:
      if (lie.sampled.empty()) return;
      lie.sampled.back().token = kVocab;
      lie.sampled.back().poisoned = false;
      break;
    case 5:
      if (lie.sampled.empty()) return;
      lie.sampled.pop_back();
      break;
    case 6:
      if (lie.sampled.empty()) return;
      ++lie.sampled.back().slot.value;
      break;
    default:
      if (lie.prompt_logprobs.empty()) return;
      lie.prompt_logprobs.back().entries.pop_back();
  }
  Trace("lie ", lie.step);
  ++report_.lies;
  const size_t before = events_.size();
  if (scheduler_.Apply(lie, &events_).ok()) ledger_.Violate("a lie was believed");
  if (events_.size() != before) ledger_.Violate("a lie had consequences");
  EndEpoch("the worker lied");
}

void Run::BeginEpoch() {
  epoch_ += random_.Between(1, 3);
  Trace("epoch ", epoch_);
  scheduler_.BeginEpoch(epoch_);
  worker_ = std::make_unique<SimWorker>(config_, epoch_, &poison_);
  epoch_open_ = true;
  acknowledged_ = 0;
}

void Run::EndEpoch(const std::string& why) {
  Trace("death: ", why);
  ++report_.deaths;
  std::optional<StepResult> late;
  if (!in_flight_.empty()) late = in_flight_.front().result;
  epoch_open_ = false;
  in_flight_.clear();
  slots_.clear();
  worker_.reset();
  ledger_.EpochEnded(acknowledged_);
  const uint64_t failed = ledger_.failed;
  scheduler_.EndEpoch(absl::UnavailableError(why), &events_);
  Publish();
  report_.quarantined += ledger_.failed - failed;
  if (options_.scenario == Scenario::kPoisoned && ledger_.failed > failed + 1) {
    ledger_.Violate("one death ended ", ledger_.failed - failed, " requests");
  }
  if (late && scheduler_.Apply(*late, &events_).ok()) ledger_.Violate("a stale result counts");
  if (scheduler_.Stats().running != 0) ledger_.Violate("something runs without a group");
}

void Run::Publish() {
  for (const SchedulerEvent& event : events_) {
    if (!ok()) break;
    Trace("event ", event.index());
    if (const auto* f = std::get_if<FailedEvent>(&event)) Trace("fail ", f->request.value);
    if (const auto* token = std::get_if<TokenEvent>(&event)) {
      const Ledger::Entry* const entry = ledger_.Find(token->sequence.request);
      const Ledger::Output* const output =
          entry == nullptr ? nullptr : &entry->outputs[token->sequence.index];
      if (output != nullptr && output->stop_at == output->delivered) {
        stops_.push_back(token->sequence);
      }
      Trace("token ", token->sequence.request.value, "/", token->sequence.index, " ", token->token);
    }
    ledger_.Take(event);
  }
  events_.clear();
}

void Run::CheckBooks() {
  const absl::Status books = scheduler_.CheckIntegrity();
  if (!books.ok()) return ledger_.Violate(books.message());
  const SchedulerStats s = scheduler_.Stats();
  if (scheduler_.plans_in_flight() != static_cast<int>(in_flight_.size())) {
    ledger_.Violate("the scheduler miscounts its plans in flight");
  }
  // Blocks come back with the acknowledgement at the latest (invariant 15).
  if (in_flight_.empty() && s.blocks_pending != 0) ledger_.Violate("blocks pending for nothing");
  if (s.running == 0 && s.blocks_active != 0) ledger_.Violate("blocks held by nobody");
  if (s.waiting + s.running != ledger_.live().size()) {
    ledger_.Violate(s.waiting, " + ", s.running, " requests, ", ledger_.live().size(),
                    " were promised an end");
  }
  if (s.completed != ledger_.completed || s.failed != ledger_.failed ||
      s.cancelled != ledger_.cancelled) {
    ledger_.Violate("the statistics count other ends than the clients");
  }
  int64_t deadline = kNoDeadline;
  for (const auto& [id, entry] : ledger_.live()) {
    deadline = std::min(deadline, entry.request.deadline_ms);
    for (const Ledger::Output& output : entry.outputs) {
      report_.most_preemptions = std::max(report_.most_preemptions, output.preemptions);
    }
  }
  if (deadline != scheduler_.NextDeadlineMs()) ledger_.Violate("another next deadline");
}

void Run::CheckEnd() {
  const SchedulerStats s = scheduler_.Stats();
  if (s.blocks_free + s.blocks_cached != config_.num_kv_blocks) ledger_.Violate("blocks leaked");
  if (!config_.enable_prefix_caching && s.blocks_cached != 0) {
    ledger_.Violate("blocks stay cached with the prefix cache off");
  }
  if (!ledger_.live().empty()) ledger_.Violate("a request never got its end");
  if (options_.scenario == Scenario::kOverloaded && s.completed + s.rejected != s.received) {
    ledger_.Violate("an accepted request did not finish");
  }
  if (options_.scenario == Scenario::kPoisoned && ledger_.innocent_failed > 0) {
    ledger_.Violate(ledger_.innocent_failed, " requests failed for the poison of others");
  }
}

}  // namespace

const char* FlagOf(Scenario scenario) {
  switch (scenario) {
    case Scenario::kMixed:
      return "";
    case Scenario::kOverloaded:
      return " --overloaded";
    case Scenario::kPoisoned:
      return " --poisoned";
  }
  return "";
}

void RunReport::Add(const RunReport& other) {
  events += other.events;
  steps += other.steps;
  received += other.received;
  completed += other.completed;
  failed += other.failed;
  cancelled += other.cancelled;
  rejected += other.rejected;
  preemptions += other.preemptions;
  deaths += other.deaths;
  lies += other.lies;
  stops += other.stops;
  cache_hits += other.cache_hits;
  quarantined += other.quarantined;
  most_preemptions = std::max(most_preemptions, other.most_preemptions);
}

RunReport Simulate(const RunOptions& options) { return Run(options).Go(); }

}  // namespace lockstep::sim
