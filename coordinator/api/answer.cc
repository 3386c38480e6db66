#include "coordinator/api/answer.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "coordinator/text/detokenizer.h"
#include "coordinator/text/stop_matcher.h"

namespace lockstep {
namespace {

// Beyond so many events not yet taken, deltas of a sequence merge.
constexpr size_t kMaxReadyEvents = 64;

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

double Seconds(int64_t from_ns, int64_t to_ns) {
  return static_cast<double>(to_ns - from_ns) * 1e-9;
}

}  // namespace

// A call of the engine's, as it was made.
struct Answer::Raw {
  enum class Kind { kStarted, kPromptLogprobs, kToken, kFinished, kFailed, kRejected, kCancelled };
  Kind kind;
  int64_t at_ns = NowNs();
  uint32_t index = 0;
  uint32_t number = 0;  // cached tokens, or first position
  TokenId token = 0;
  std::optional<TokenLogprobs> logprobs = {};
  std::vector<TokenLogprobs> prompt_logprobs = {};
  FinishReason reason = FinishReason::kStop;
  std::optional<TokenId> ending_token = {};
  absl::Status status = {};
};

struct Answer::Sequence {
  Detokenizer detokenizer;
  StopMatcher matcher;
  uint32_t tokens = 0;
  bool ended = false;
  // The delta of a token after which the end must follow: they go out together,
  // however the threads run.
  std::optional<TextDelta> last_delta = {};
  int64_t first_ns = 0, last_ns = 0;
};

struct Answer::Output {
  std::vector<AnswerEvent> events;
  std::optional<absl::Status> terminal;
};

absl::StatusOr<std::shared_ptr<Answer>> Answer::Start(const AnswerContext& context,
                                                      Request request) {
  std::shared_ptr<Answer> answer(new Answer(context, request));
  const absl::StatusOr<RequestId> id = context.engine->Submit(std::move(request), answer);
  if (!id.ok()) return id.status();
  answer->Bind(*id);
  return answer;
}

Answer::Answer(const AnswerContext& context, const Request& request)
    : context_(context),
      external_id_(request.external_id),
      prompt_(request.prompt),
      sampling_(request.sampling),
      ending_ids_(request.ending_ids),
      arrival_ns_(NowNs()),
      unfinished_(request.sampling.n) {
  for (uint32_t i = 0; i < sampling_.n; ++i) {
    sequences_.push_back({Detokenizer(context_.model->tokenizer, sampling_.skip_special_tokens),
                          StopMatcher(sampling_.stop, sampling_.include_stop_str_in_output)});
  }
}

Answer::~Answer() = default;

void Answer::SetWaker(std::function<void()> waker) {
  std::function<void()> call;
  {
    const std::lock_guard lock(mutex_);
    if (cancelled_) return;
    waker_ = std::move(waker);
    if (!ready_.empty() || terminal_) {
      waker_armed_ = false;
      call = waker_;
    }
  }
  if (call) call();
}

Answer::Taken Answer::Take() {
  Taken taken;
  const std::lock_guard lock(mutex_);
  taken.events.assign(std::make_move_iterator(ready_.begin()),
                      std::make_move_iterator(ready_.end()));
  ready_.clear();
  taken.terminal = terminal_;
  waker_armed_ = true;
  return taken;
}

void Answer::Cancel() {
  std::optional<RequestId> id;
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(cancelled_, true)) return;
    id = id_;
    ready_.clear();
    waker_ = nullptr;
    if (terminal_) return;
  }
  if (id) context_.engine->Cancel(*id);
  Push({.kind = Raw::Kind::kCancelled});
}

void Answer::Bind(RequestId id) {
  std::vector<uint32_t> stops;
  {
    const std::lock_guard lock(mutex_);
    id_ = id;
    stops.swap(stops_before_id_);
  }
  for (const uint32_t index : stops) context_.engine->Stop({id, index});
}

void Answer::StopInEngine(uint32_t index) {
  RequestId id;
  {
    const std::lock_guard lock(mutex_);
    if (!id_) {
      stops_before_id_.push_back(index);
      return;
    }
    id = *id_;
  }
  context_.engine->Stop({id, index});
}

void Answer::OnStarted(uint32_t cached_tokens) {
  Push({.kind = Raw::Kind::kStarted, .number = cached_tokens});
}

void Answer::OnPromptLogprobs(uint32_t first_position, std::vector<TokenLogprobs> entries) {
  Push({.kind = Raw::Kind::kPromptLogprobs,
        .number = first_position,
        .prompt_logprobs = std::move(entries)});
}

void Answer::OnToken(uint32_t index, TokenId token, std::optional<TokenLogprobs> logprobs) {
  Push(
      {.kind = Raw::Kind::kToken, .index = index, .token = token, .logprobs = std::move(logprobs)});
}

void Answer::OnFinished(uint32_t index, FinishReason reason, std::optional<TokenId> ending_token,
                        uint32_t completion_tokens) {
  Push({.kind = Raw::Kind::kFinished,
        .index = index,
        .number = completion_tokens,
        .reason = reason,
        .ending_token = ending_token});
}

void Answer::OnFailed(const absl::Status& status) {
  Push({.kind = Raw::Kind::kFailed, .status = status});
}

void Answer::OnRejected(const absl::Status& status) {
  Push({.kind = Raw::Kind::kRejected, .status = status});
}

void Answer::Push(Raw raw) {
  {
    const std::lock_guard lock(mutex_);
    if (cancelled_ && raw.kind != Raw::Kind::kCancelled) return;
    raw_.push_back(std::move(raw));
    if (std::exchange(processing_, true)) return;
  }
  context_.text_pool->Post([self = shared_from_this()] { self->Process(); });
}

void Answer::Process() {
  std::deque<Raw> batch;
  for (;;) {
    batch.clear();
    {
      const std::lock_guard lock(mutex_);
      batch.swap(raw_);
      if (batch.empty()) {
        processing_ = false;
        return;
      }
    }
    Output out;
    for (Raw& raw : batch) {
      if (!over_) Handle(raw, &out);
    }
    Publish(std::move(out));
  }
}

void Answer::Handle(Raw& raw, Output* out) {
  switch (raw.kind) {
    case Raw::Kind::kStarted:
      if (prompt_info_) return;
      prompt_info_ = PromptInfo{.cached_tokens = raw.number, .logprobs = {}};
      started_ns_ = raw.at_ns;
      context_.metrics->RequestStarted(static_cast<uint32_t>(prompt_.size()),
                                       Seconds(arrival_ns_, raw.at_ns));
      if (sampling_.prompt_logprobs >= 0) {
        prompt_info_->logprobs.resize(prompt_.size());
      } else {
        ReleasePrompt(out);
      }
      return;
    case Raw::Kind::kPromptLogprobs:
      // After a preemption or a replay the same positions may come again.
      if (!prompt_info_ || prompt_released_) return;
      for (size_t i = 0; i < raw.prompt_logprobs.size(); ++i) {
        const size_t position = raw.number + i;
        if (position == 0 || position >= prompt_info_->logprobs.size()) continue;
        prompt_info_->logprobs[position] = std::move(raw.prompt_logprobs[i]);
      }
      return;
    case Raw::Kind::kToken:
      return HandleToken(raw, out);
    case Raw::Kind::kFinished:
      return HandleFinished(raw, out);
    case Raw::Kind::kFailed:
      out->terminal = raw.status;
      // The client's own deadline is no fault of ours.
      return GiveUp(absl::IsDeadlineExceeded(raw.status) ? RequestOutcome::kAbort
                                                         : RequestOutcome::kError);
    case Raw::Kind::kRejected:  // counted as that, by whoever refused it
      out->terminal = raw.status;
      over_ = true;
      return;
    case Raw::Kind::kCancelled:
      return GiveUp(RequestOutcome::kAbort);
  }
}

// The prompt's log-probabilities are complete when the first token comes.
void Answer::ReleasePrompt(Output* out) {
  if (prompt_released_ || !prompt_info_) return;
  prompt_released_ = true;
  out->events.emplace_back(std::move(*prompt_info_));
}

bool Answer::IsEnding(TokenId token) const {
  return std::binary_search(ending_ids_.begin(), ending_ids_.end(), token);
}

bool Answer::IsLast(const Sequence& sequence, TokenId token) const {
  return sequence.tokens >= sampling_.max_tokens ||
         (IsEnding(token) && sequence.tokens > sampling_.min_tokens);
}

void Answer::HandleToken(Raw& raw, Output* out) {
  Sequence& sequence = sequences_[raw.index];
  if (sequence.ended) return;  // under way when its stop string was found
  ReleasePrompt(out);
  ++sequence.tokens;
  context_.metrics->TokensDelivered(1);
  if (first_token_ns_ == 0) {
    first_token_ns_ = raw.at_ns;
    context_.metrics->FirstToken(Seconds(arrival_ns_, raw.at_ns), Seconds(started_ns_, raw.at_ns));
  }
  if (sequence.tokens == 1) {
    sequence.first_ns = raw.at_ns;
  } else {
    context_.metrics->NextToken(Seconds(sequence.last_ns, raw.at_ns));
  }
  sequence.last_ns = raw.at_ns;

  TextDelta delta{.index = raw.index, .text = {}, .token_ids = {raw.token}, .logprobs = {}};
  if (raw.logprobs) delta.logprobs.push_back(*std::move(raw.logprobs));
  std::optional<size_t> matched;
  // The ending token is one of the answer's tokens and none of its text.
  if (!IsEnding(raw.token)) {
    std::string text = sequence.detokenizer.Push(raw.token);
    if (sequence.tokens > sampling_.min_tokens) {
      StopMatcher::Output found = sequence.matcher.Push(text);
      text = std::move(found.text);
      matched = found.matched;
    }
    delta.text = std::move(text);
  }
  if (!matched && IsLast(sequence, raw.token)) {
    sequence.last_delta = std::move(delta);
    return;
  }
  out->events.emplace_back(std::move(delta));
  if (!matched) return;
  StopInEngine(raw.index);
  EndSequence(&sequence,
              {.index = raw.index,
               .reason = FinishReason::kStop,
               .completion_tokens = sequence.tokens,
               .stop_string = sampling_.stop[*matched],
               .ending_token = {}},
              out);
}

void Answer::HandleFinished(const Raw& raw, Output* out) {
  Sequence& sequence = sequences_[raw.index];
  if (sequence.ended) return;
  ReleasePrompt(out);
  if (sequence.last_delta) out->events.emplace_back(*std::exchange(sequence.last_delta, {}));
  // What was held back: an unfinished character, the beginning of a stop string.
  std::string rest = sequence.detokenizer.Finish();
  StopMatcher::Output found = sequence.matcher.Push(rest);
  std::string text = std::move(found.text);
  if (!found.matched) {
    found = sequence.matcher.Flush();
    text += found.text;
  }
  if (!text.empty()) {
    TextDelta* last = nullptr;
    for (AnswerEvent& event : out->events) {
      auto* delta = std::get_if<TextDelta>(&event);
      if (delta != nullptr && delta->index == raw.index) last = delta;
    }
    if (last != nullptr) {
      last->text += text;
    } else {
      out->events.emplace_back(
          TextDelta{.index = raw.index, .text = text, .token_ids = {}, .logprobs = {}});
    }
  }
  SequenceEnd end{.index = raw.index,
                  .reason = raw.reason,
                  .completion_tokens = sequence.tokens,
                  .stop_string = {},
                  .ending_token = raw.ending_token};
  if (found.matched) {
    end.reason = FinishReason::kStop;
    end.stop_string = sampling_.stop[*found.matched];
    end.ending_token.reset();
  }
  EndSequence(&sequence, std::move(end), out);
}

void Answer::EndSequence(Sequence* sequence, SequenceEnd end, Output* out) {
  sequence->ended = true;
  context_.metrics->SequenceFinished(
      end.reason == FinishReason::kStop ? RequestOutcome::kStop : RequestOutcome::kLength,
      sequence->tokens, Seconds(sequence->first_ns, sequence->last_ns));
  out->events.emplace_back(std::move(end));
  if (--unfinished_ > 0) return;
  over_ = true;
  const int64_t now = NowNs();
  context_.metrics->RequestFinished(Seconds(arrival_ns_, now),
                                    first_token_ns_ == 0 ? 0 : Seconds(first_token_ns_, now));
  out->terminal = absl::OkStatus();
}

void Answer::GiveUp(RequestOutcome outcome) {
  over_ = true;
  for (const Sequence& sequence : sequences_) {
    if (!sequence.ended) context_.metrics->SequenceFinished(outcome, 0, 0);
  }
}

void Answer::Publish(Output out) {
  if (out.events.empty() && !out.terminal) return;
  std::function<void()> call;
  {
    const std::lock_guard lock(mutex_);
    if (cancelled_) return;
    for (AnswerEvent& event : out.events) {
      auto* delta = std::get_if<TextDelta>(&event);
      TextDelta* into = nullptr;
      if (delta != nullptr && ready_.size() >= kMaxReadyEvents) {
        for (auto it = ready_.rbegin(); it != ready_.rend() && into == nullptr; ++it) {
          auto* pending = std::get_if<TextDelta>(&*it);
          if (pending != nullptr && pending->index == delta->index) into = pending;
        }
      }
      if (into == nullptr) {
        ready_.push_back(std::move(event));
        continue;
      }
      into->text += delta->text;
      into->token_ids.insert(into->token_ids.end(), delta->token_ids.begin(),
                             delta->token_ids.end());
      std::move(delta->logprobs.begin(), delta->logprobs.end(), std::back_inserter(into->logprobs));
    }
    if (out.terminal) terminal_ = std::move(out.terminal);
    if (waker_ && std::exchange(waker_armed_, false)) call = waker_;
  }
  if (call) call();
}

}  // namespace lockstep
