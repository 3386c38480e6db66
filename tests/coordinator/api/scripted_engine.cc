#include "tests/coordinator/api/scripted_engine.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace lockstep {
namespace {

constexpr auto kPatience = std::chrono::seconds(20);

}  // namespace

TokenLogprobs ScriptedLogprobs(TokenId token, int32_t alternatives) {
  TokenLogprobs entry{.logprob = -0.5f, .rank = 1, .top = {}};
  for (int32_t i = 0; i < alternatives; ++i) {
    entry.top.emplace_back(token + static_cast<TokenId>(i), -0.5f - static_cast<float>(i));
  }
  return entry;
}

ScriptedEngine::ScriptedEngine() {
  info_.state = EngineState::kReady;
  info_.whole = true;
  info_.epoch = 1;
  info_.num_kv_blocks = 100;
  info_.max_num_seqs = 16;
  info_.max_queued_requests = 1000;
  thread_ = std::thread([this] { Run(); });
}

ScriptedEngine::~ScriptedEngine() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void ScriptedEngine::Hold() {
  const std::lock_guard lock(mutex_);
  ticks_left_ = 0;
}

void ScriptedEngine::Tick(uint32_t count) {
  {
    const std::lock_guard lock(mutex_);
    ticks_left_ = ticks_left_.value_or(0) + count;
  }
  changed_.notify_all();
}

void ScriptedEngine::Release() {
  {
    const std::lock_guard lock(mutex_);
    ticks_left_.reset();
  }
  changed_.notify_all();
}

void ScriptedEngine::SetState(EngineState state, absl::Status failure) {
  const std::lock_guard lock(mutex_);
  info_.state = state;
  // As with the real one, what draining hides is as it was.
  if (state != EngineState::kDraining) info_.whole = state == EngineState::kReady;
  info_.failure = std::move(failure);
}

void ScriptedEngine::SetRoom(uint32_t max_num_seqs, uint32_t max_queued_requests) {
  const std::lock_guard lock(mutex_);
  info_.max_num_seqs = max_num_seqs;
  info_.max_queued_requests = max_queued_requests;
}

void ScriptedEngine::SetStats(const SchedulerStats& stats) {
  const std::lock_guard lock(mutex_);
  stats_ = stats;
}

void ScriptedEngine::SetRanks(std::vector<RankReport> ranks) {
  const std::lock_guard lock(mutex_);
  info_.ranks = std::move(ranks);
}

std::vector<Request> ScriptedEngine::submitted() const {
  const std::lock_guard lock(mutex_);
  return submitted_;
}

std::vector<RequestId> ScriptedEngine::cancelled() const {
  const std::lock_guard lock(mutex_);
  return cancelled_;
}

std::vector<SequenceId> ScriptedEngine::stopped() const {
  const std::lock_guard lock(mutex_);
  return stopped_;
}

template <typename Condition>
bool ScriptedEngine::WaitFor(Condition condition) const {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, kPatience, condition);
}

bool ScriptedEngine::WaitSubmitted(size_t count) const {
  return WaitFor([&] { return submitted_.size() >= count; });
}

bool ScriptedEngine::WaitCancelled(size_t count) const {
  return WaitFor([&] { return cancelled_.size() >= count; });
}

bool ScriptedEngine::WaitStopped(size_t count) const {
  return WaitFor([&] { return stopped_.size() >= count; });
}

bool ScriptedEngine::WaitIdle() const {
  return WaitFor([&] { return live_.empty(); });
}

absl::StatusOr<RequestId> ScriptedEngine::Submit(Request request,
                                                 std::shared_ptr<RequestSink> sink) {
  if (on_submit) {
    if (absl::Status status = on_submit(request); !status.ok()) return status;
  }
  Live live{.request = request,
            .sink = std::move(sink),
            .script = script(request),
            .ended = {},
            .counts = {}};
  live.ended.resize(request.sampling.n);
  live.counts.resize(request.sampling.n);
  RequestId id;
  {
    const std::lock_guard lock(mutex_);
    id = RequestId(next_id_++);
    live.request.id = id;
    submitted_.push_back(live.request);
    live_.emplace(id, std::move(live));
  }
  changed_.notify_all();
  return id;
}

void ScriptedEngine::Cancel(RequestId request) {
  {
    const std::lock_guard lock(mutex_);
    cancelled_.push_back(request);
    live_.erase(request);
  }
  changed_.notify_all();
}

void ScriptedEngine::Stop(SequenceId sequence) {
  {
    const std::lock_guard lock(mutex_);
    stopped_.push_back(sequence);
    const auto found = live_.find(sequence.request);
    if (found != live_.end()) {
      found->second.ended[sequence.index] = true;
      const std::vector<bool>& ended = found->second.ended;
      if (std::all_of(ended.begin(), ended.end(), [](bool e) { return e; })) live_.erase(found);
    }
  }
  changed_.notify_all();
}

int64_t ScriptedEngine::NowMs() const {
  return std::chrono::duration_cast<std::chrono::milliseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

EngineInfo ScriptedEngine::Info() const {
  const std::lock_guard lock(mutex_);
  return info_;
}

SchedulerStats ScriptedEngine::Stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

// Sinks are called under the mutex: they only append, as the contract says.
void ScriptedEngine::Run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    const auto runnable = [this] { return !live_.empty() && ticks_left_ != 0u; };
    const auto next_deadline = [this] {
      int64_t next = NowMs() + 1000;
      for (const auto& [id, live] : live_) next = std::min(next, live.request.deadline_ms);
      return std::chrono::milliseconds(std::max<int64_t>(next - NowMs(), 0));
    };
    changed_.wait_for(lock, next_deadline(), [&] { return closing_ || runnable(); });
    if (closing_) return;
    const bool tick = runnable();
    if (tick && ticks_left_) --*ticks_left_;
    for (auto it = live_.begin(); it != live_.end();) {
      Live& live = it->second;
      bool goes_on = true;
      if (live.request.deadline_ms <= NowMs()) {
        live.sink->OnFailed(absl::DeadlineExceededError("the request's deadline has passed"));
        goes_on = false;
      } else if (tick) {
        goes_on = Advance(&live);
      }
      it = goes_on ? std::next(it) : live_.erase(it);
    }
    changed_.notify_all();
    if (tick && !ticks_left_) {  // lets Stop and Cancel in between
      lock.unlock();
      std::this_thread::yield();
      lock.lock();
    }
  }
}

bool ScriptedEngine::Advance(Live* live) {
  const SamplingParams& sampling = live->request.sampling;
  if (live->script.fail_after == live->ticks) {
    if (live->script.rejected) {
      live->sink->OnRejected(live->script.failure);
    } else {
      live->sink->OnFailed(live->script.failure);
    }
    return false;
  }
  ++live->ticks;
  if (!std::exchange(live->started, true)) {
    live->sink->OnStarted(live->script.cached_tokens);
    if (sampling.prompt_logprobs >= 0 && live->request.prompt.size() > 1) {
      std::vector<TokenLogprobs> entries;
      for (size_t i = 1; i < live->request.prompt.size(); ++i) {
        entries.push_back(ScriptedLogprobs(live->request.prompt[i], sampling.prompt_logprobs));
      }
      live->sink->OnPromptLogprobs(1, std::move(entries));
    }
    if (sampling.max_tokens == 0) {
      for (uint32_t i = 0; i < sampling.n; ++i) {
        live->sink->OnFinished(i, FinishReason::kLength, std::nullopt, 0);
      }
      return false;
    }
  }
  bool any = false;
  for (uint32_t i = 0; i < sampling.n; ++i) {
    if (live->ended[i]) continue;
    const std::vector<std::vector<TokenId>>& lists = live->script.tokens;
    const std::vector<TokenId>& list = lists[std::min<size_t>(i, lists.size() - 1)];
    const uint32_t at = live->counts[i]++;
    const TokenId token = list.empty() ? 65 : list[std::min<size_t>(at, list.size() - 1)];
    std::optional<TokenLogprobs> logprobs;
    if (sampling.logprobs >= 0) logprobs = ScriptedLogprobs(token, sampling.logprobs);
    live->sink->OnToken(i, token, std::move(logprobs));
    const std::vector<TokenId>& endings = live->request.ending_ids;
    if (std::binary_search(endings.begin(), endings.end(), token)) {
      live->ended[i] = true;
      live->sink->OnFinished(i, FinishReason::kStop, token, live->counts[i]);
    } else if (live->counts[i] >= sampling.max_tokens) {
      live->ended[i] = true;
      live->sink->OnFinished(i, FinishReason::kLength, std::nullopt, live->counts[i]);
    } else {
      any = true;
    }
  }
  return any;
}

}  // namespace lockstep
