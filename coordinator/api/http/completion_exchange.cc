#include "coordinator/api/http/completion_exchange.h"

#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "coordinator/api/http/http_error.h"

namespace lockstep {
namespace {

std::string ServerSentEvent(const std::string& data) {
  return absl::StrCat("data: ", data, "\n\n");
}

}  // namespace

CompletionExchange::CompletionExchange(RequestPath* path, const GenerationApi& api,
                                       HttpRequest request, std::string request_id,
                                       FinishHead finish_head)
    : path_(path),
      api_(api),
      request_id_(std::move(request_id)),
      finish_head_(std::move(finish_head)),
      envelope_(api.id_prefix + request_id_, path->model().name),
      http_(std::move(request)) {}

CompletionExchange::~CompletionExchange() { CancelAll(); }

void CompletionExchange::Begin() {
  absl::Status status = path_->Admit();
  if (status.ok()) {
    status = path_->RunLater([self = shared_from_this()] { self->Intake(); });
  }
  if (!status.ok()) Ready(status, {});
}

void CompletionExchange::Intake() {
  {
    const std::lock_guard lock(mutex_);
    if (abandoned_) return;
  }
  std::vector<std::shared_ptr<Answer>> answers;
  absl::Status status = Start(&answers);
  http_ = {};
  if (!status.ok()) {
    for (const auto& answer : answers) answer->Cancel();
    answers.clear();
  }
  Ready(std::move(status), answers);
}

// All or nothing: every prompt is judged before the first is submitted.
absl::Status CompletionExchange::Start(std::vector<std::shared_ptr<Answer>>* answers) {
  absl::StatusOr<CompletionRequest> read = api_.read(http_.body);
  if (!read.ok()) return path_->Refuse(read.status());
  request_ = *std::move(read);
  absl::Status fits = path_->CheckBatch(request_.prompts.size());
  if (!fits.ok()) return fits;
  std::vector<Request> requests;
  for (size_t i = 0; i < request_.prompts.size(); ++i) {
    ClientRequest& client = request_.prompts[i];
    client.request_id = request_id_;
    client.cache_salt = http_.cache_salt;
    absl::StatusOr<Request> request = path_->Build(client, api_.defaults);
    if (!request.ok()) return request.status();
    if (request_.prompts.size() > 1) absl::StrAppend(&request->external_id, "-", i);
    requests.push_back(*std::move(request));
  }
  absl::StatusOr<std::shared_ptr<void>> held =
      path_->HoldLogprobs(requests, RequestPath::Listed::kWithEachChoice);
  if (!held.ok()) return held.status();
  held_logprobs_ = *std::move(held);
  for (Request& request : requests) {
    absl::StatusOr<std::shared_ptr<Answer>> answer = path_->Submit(std::move(request));
    if (!answer.ok()) return answer.status();
    answers->push_back(*std::move(answer));
  }
  return absl::OkStatus();
}

void CompletionExchange::Ready(absl::Status status,
                               const std::vector<std::shared_ptr<Answer>>& answers) {
  bool gone;
  {
    const std::lock_guard lock(mutex_);
    ready_ = true;
    intake_status_ = std::move(status);
    gone = abandoned_;
    if (!gone) answers_ = answers;
  }
  for (const auto& answer : answers) {
    if (gone) {
      answer->Cancel();
    } else {
      answer->SetWaker([weak = weak_from_this()] {
        if (const auto self = weak.lock()) self->Wake();
      });
    }
  }
  Wake();
}

void CompletionExchange::SetWaker(std::function<void()> waker) {
  const std::lock_guard lock(mutex_);
  waker_ = std::move(waker);
}

void CompletionExchange::Wake() {
  std::function<void()> waker;
  {
    const std::lock_guard lock(mutex_);
    waker = waker_;
  }
  if (waker) waker();
}

void CompletionExchange::Abandon() {
  {
    const std::lock_guard lock(mutex_);
    abandoned_ = true;
    waker_ = nullptr;
  }
  CancelAll();
}

void CompletionExchange::CancelAll() {
  std::vector<std::shared_ptr<Answer>> answers;
  {
    const std::lock_guard lock(mutex_);
    answers.swap(answers_);
  }
  // For one that has ended this is nothing.
  for (const auto& answer : answers) answer->Cancel();
}

bool CompletionExchange::TakeIntake() {
  if (taken_) return true;
  {
    const std::lock_guard lock(mutex_);
    if (!ready_) return false;
    live_ = answers_;
  }
  taken_ = true;
  unfinished_ = live_.size();
  for (size_t i = 0; i < live_.size(); ++i) {
    for (uint32_t k = 0; k < request_.n; ++k) {
      const uint32_t index = static_cast<uint32_t>(i) * request_.n + k;
      choices_.push_back(api_.make_choice(index, request_, path_->model()));
    }
    usage_.prompt_tokens += live_[i]->prompt().size();
    if (!request_.echo) continue;
    const auto* text = std::get_if<std::string>(&request_.prompts[i].prompt);
    prompt_texts_.push_back(text != nullptr
                                ? *text
                                : path_->model().tokenizer->Decode(live_[i]->prompt(),
                                                                   /*skip_special_tokens=*/false));
  }
  if (request_.return_token_ids && live_.size() == 1) prompt_token_ids_ = live_[0]->prompt();
  for (ClientRequest& client : request_.prompts) client = {};
  return true;
}

std::optional<Exchange::Part> CompletionExchange::Next() {
  if (over_ || !TakeIntake()) return {};
  {
    const std::lock_guard lock(mutex_);
    if (!intake_status_.ok()) {
      over_ = true;
      return Part{.head = finish_head_(ErrorReply(intake_status_)), .body = {}, .last = true};
    }
  }
  std::string stream;
  const absl::Status status = Pull(&stream);
  if (!status.ok()) return FailPart(status);
  const bool last = unfinished_ == 0;
  if (last) over_ = true;
  if (!request_.stream) return last ? std::optional(WholePart()) : std::nullopt;
  if (stream.empty() && !last) return {};
  return StreamPart(std::move(stream), last);
}

absl::Status CompletionExchange::Pull(std::string* stream) {
  for (size_t i = 0; i < live_.size(); ++i) {
    if (live_[i] == nullptr) continue;
    const Answer::Taken taken = live_[i]->Take();
    for (const AnswerEvent& event : taken.events) Handle(i, event, stream);
    if (request_.stream) {
      for (uint32_t k = 0; k < request_.n; ++k) {
        ChoiceBuilder* const choice = choices_[i * request_.n + k].get();
        if (choice->HasDelta()) AppendChunks(choice, stream);
      }
    }
    if (!taken.terminal) continue;
    if (!taken.terminal->ok()) return *taken.terminal;
    live_[i] = nullptr;
    --unfinished_;
  }
  return absl::OkStatus();
}

void CompletionExchange::Handle(size_t prompt, const AnswerEvent& event, std::string* stream) {
  const std::unique_ptr<ChoiceBuilder>* const choices = &choices_[prompt * request_.n];
  const Answer& answer = *live_[prompt];
  if (const auto* info = std::get_if<PromptInfo>(&event)) {
    usage_.cached_tokens += info->cached_tokens;
    const std::string text = request_.echo ? prompt_texts_[prompt] : std::string();
    for (uint32_t k = 0; k < request_.n; ++k) choices[k]->AddPrompt(answer, *info, text);
  } else if (const auto* delta = std::get_if<TextDelta>(&event)) {
    // One chunk a token; what comes last waits, to take the finish reason along.
    if (request_.stream && choices[delta->index]->HasDelta()) {
      AppendChunks(choices[delta->index].get(), stream);
    }
    usage_.completion_tokens += delta->token_ids.size();
    choices[delta->index]->AddDelta(*delta);
  } else {
    const auto& end = std::get<SequenceEnd>(event);
    choices[end.index]->AddEnd(end, answer.sampling());
  }
}

void CompletionExchange::AppendChunks(ChoiceBuilder* choice, std::string* stream) {
  if (std::optional<OrderedJson> opening = choice->TakeOpening()) {
    AppendChunk(*std::move(opening), stream);
  }
  AppendChunk(choice->Take(), stream);
}

void CompletionExchange::AppendChunk(OrderedJson choice, std::string* stream) {
  OrderedJson choices = OrderedJson::array();
  choices.push_back(std::move(choice));
  OrderedJson chunk = envelope_.Make(api_.chunk_object, std::move(choices));
  if (!prompt_token_ids_.is_null()) {
    chunk["prompt_token_ids"] = std::exchange(prompt_token_ids_, nullptr);
  }
  if (request_.continuous_usage_stats) {
    chunk["usage"] = UsageJson(usage_);
  } else if (request_.include_usage) {
    chunk["usage"] = nullptr;
  }
  *stream += ServerSentEvent(Dump(chunk));
}

Exchange::Part CompletionExchange::FailPart(const absl::Status& status) {
  over_ = true;
  CancelAll();
  if (!head_sent_) {
    return {.head = finish_head_(ErrorReply(status)), .body = {}, .last = true};
  }
  return {.head = {}, .body = ServerSentEvent(ErrorJson(status)), .last = true, .close = true};
}

Exchange::Part CompletionExchange::StreamPart(std::string stream, bool last) {
  if (last) {
    if (request_.include_usage) {
      OrderedJson chunk = envelope_.Make(api_.chunk_object, OrderedJson::array());
      chunk["usage"] = UsageJson(usage_);
      stream += ServerSentEvent(Dump(chunk));
    }
    stream += ServerSentEvent("[DONE]");
  }
  if (std::exchange(head_sent_, true)) {
    return {.head = {}, .body = std::move(stream), .last = last};
  }
  HttpReply head{.content_type = "text/event-stream; charset=utf-8",
                 .headers = {{"Cache-Control", "no-cache"}},
                 .body = std::move(stream)};
  return {.head = finish_head_(std::move(head)), .body = {}, .last = last, .stream = true};
}

Exchange::Part CompletionExchange::WholePart() {
  OrderedJson choices = OrderedJson::array();
  for (const auto& choice : choices_) choices.push_back(choice->Take());
  OrderedJson whole = envelope_.Make(api_.object, std::move(choices));
  if (!prompt_token_ids_.is_null()) whole["prompt_token_ids"] = std::move(prompt_token_ids_);
  whole["usage"] = UsageJson(usage_);
  HttpReply head{.headers = {}, .body = Dump(whole)};
  return {.head = finish_head_(std::move(head)), .body = {}, .last = true};
}

}  // namespace lockstep
