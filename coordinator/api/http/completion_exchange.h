// POST /v1/completions or /v1/chat/completions from body to last byte: parsed and tokenised on an
// intake thread, one Answer a prompt, pulled when the connection can write.
// Errors before the first byte get their status; later ones end the stream.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_COMPLETION_EXCHANGE_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_COMPLETION_EXCHANGE_H_

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/api/http/completion_format.h"
#include "coordinator/api/http/completion_request.h"
#include "coordinator/api/http/exchange.h"
#include "coordinator/api/http/generation_api.h"
#include "coordinator/api/request_path.h"

namespace lockstep {

class CompletionExchange : public Exchange,
                           public std::enable_shared_from_this<CompletionExchange> {
 public:
  // Every head goes through `finish_head` (request id, counters).
  using FinishHead = std::function<HttpReply(HttpReply)>;
  CompletionExchange(RequestPath* path, const GenerationApi& api, HttpRequest request,
                     std::string request_id, FinishHead finish_head);
  ~CompletionExchange() override;

  void Begin();

  std::optional<Part> Next() override;
  void SetWaker(std::function<void()> waker) override;
  void Abandon() override;
  std::string IdleBytes() const override { return ": ping\n\n"; }
  bool EndsWithClient() const override { return true; }

 private:
  void Intake();
  absl::Status Start(std::vector<std::shared_ptr<Answer>>* answers);
  void Ready(absl::Status status, const std::vector<std::shared_ptr<Answer>>& answers);
  void Wake();
  void CancelAll();

  // Of the puller.
  bool TakeIntake();
  absl::Status Pull(std::string* stream);
  void Handle(size_t prompt, const AnswerEvent& event, std::string* stream);
  void AppendChunks(ChoiceBuilder* choice, std::string* stream);
  void AppendChunk(OrderedJson choice, std::string* stream);
  Part FailPart(const absl::Status& status);
  Part StreamPart(std::string stream, bool last);
  Part WholePart();

  RequestPath* const path_;
  const GenerationApi& api_;
  const std::string request_id_;
  const FinishHead finish_head_;
  const CompletionEnvelope envelope_;
  HttpRequest http_;           // until Intake
  CompletionRequest request_;  // of Intake, then of the puller

  std::mutex mutex_;  // guards up to the next comment
  std::function<void()> waker_;
  bool ready_ = false, abandoned_ = false;
  absl::Status intake_status_;
  std::vector<std::shared_ptr<Answer>> answers_;

  // Of the puller.
  bool taken_ = false, head_sent_ = false, over_ = false;
  std::vector<std::shared_ptr<Answer>> live_;  // null once terminal
  size_t unfinished_ = 0;
  std::vector<std::unique_ptr<ChoiceBuilder>> choices_;
  Usage usage_;
  std::shared_ptr<void> held_logprobs_;    // of Intake; the places of what the answer lists
  std::vector<std::string> prompt_texts_;  // for echo
  OrderedJson prompt_token_ids_;           // of the answer's top level
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_COMPLETION_EXCHANGE_H_
