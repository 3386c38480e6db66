// The text stage: one request's way from the engine's tokens to what a client
// reads. Both doors pull from it; neither sees a raw token before its text.
//
//   engine thread --calls--> queue --> text thread --> events --Take--> door
//
// The engine thread only appends. A text thread (one at a time for a request,
// so order is kept) detokenises, looks for stop strings, and ends a sequence in
// the engine when it finds one. The queue is bounded by the request's own
// max_tokens; what a slow client has not taken merges.
//
// Events: PromptInfo first, then TextDeltas, then one SequenceEnd a sequence;
// then exactly one terminal status. Joined deltas equal the whole answer.
#ifndef LOCKSTEP_COORDINATOR_API_ANSWER_H_
#define LOCKSTEP_COORDINATOR_API_ANSWER_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/api/metrics.h"
#include "coordinator/api/served_model.h"
#include "coordinator/api/work_pool.h"
#include "coordinator/engine_client.h"
#include "coordinator/request.h"

namespace lockstep {

struct PromptInfo {
  uint32_t cached_tokens = 0;
  // One a prompt token when prompt_logprobs were asked for; the first has none.
  std::vector<std::optional<TokenLogprobs>> logprobs;
};
struct TextDelta {
  uint32_t index = 0;
  std::string text;  // whole UTF-8 characters; may be empty
  std::vector<TokenId> token_ids;
  std::vector<TokenLogprobs> logprobs;  // one a token, when asked for
};
struct SequenceEnd {
  uint32_t index = 0;
  FinishReason reason = FinishReason::kStop;
  uint32_t completion_tokens = 0;
  std::optional<std::string> stop_string;  // which one matched
  std::optional<TokenId> ending_token;     // or which token
};
using AnswerEvent = std::variant<PromptInfo, TextDelta, SequenceEnd>;

// What answers are made of and reported to. All outlive the answers, but for
// the pool, which they share.
struct AnswerContext {
  EngineClient* engine = nullptr;
  const ServedModel* model = nullptr;
  Metrics* metrics = nullptr;
  std::shared_ptr<WorkPool> text_pool;
};

class Answer : public RequestSink, public std::enable_shared_from_this<Answer> {
 public:
  // Submits the request. The status of a refusal at the inbox comes back here,
  // that of a later refusal or failure as the terminal status.
  static absl::StatusOr<std::shared_ptr<Answer>> Start(const AnswerContext& context,
                                                       Request request);

  // Door's side. `waker` is called when there is something to take: at once if
  // there is already, and once after each Take that left nothing; from a text
  // thread, so it must not block. Not called after Cancel returned, but for a
  // call under way.
  void SetWaker(std::function<void()> waker);
  struct Taken {
    std::vector<AnswerEvent> events;
    std::optional<absl::Status> terminal;  // after these events; nothing follows
  };
  Taken Take();
  // The client is gone: the engine forgets the request at once.
  void Cancel();

  const std::string& external_id() const { return external_id_; }
  const std::vector<TokenId>& prompt() const { return prompt_; }
  const SamplingParams& sampling() const { return sampling_; }

  // RequestSink, for the engine thread.
  void OnStarted(uint32_t cached_tokens) override;
  void OnPromptLogprobs(uint32_t first_position, std::vector<TokenLogprobs> entries) override;
  void OnToken(uint32_t index, TokenId token, std::optional<TokenLogprobs> logprobs) override;
  void OnFinished(uint32_t index, FinishReason reason, std::optional<TokenId> ending_token,
                  uint32_t completion_tokens) override;
  void OnFailed(const absl::Status& status) override;
  void OnRejected(const absl::Status& status) override;

  ~Answer() override;

 private:
  struct Raw;
  struct Sequence;
  struct Output;

  Answer(const AnswerContext& context, const Request& request);
  void Bind(RequestId id);
  void Push(Raw raw);
  void Process();
  void Handle(Raw& raw, Output* out);
  bool IsEnding(TokenId token) const;
  bool IsLast(const Sequence& sequence, TokenId token) const;
  void HandleToken(Raw& raw, Output* out);
  void HandleFinished(const Raw& raw, Output* out);
  void EndSequence(Sequence* sequence, SequenceEnd end, Output* out);
  void GiveUp(RequestOutcome outcome);
  void ReleasePrompt(Output* out);
  void Publish(Output out);
  void StopInEngine(uint32_t index);

  const AnswerContext context_;
  const std::string external_id_;
  const std::vector<TokenId> prompt_;
  const SamplingParams sampling_;
  const std::vector<TokenId> ending_ids_;
  const int64_t arrival_ns_;

  std::mutex mutex_;  // guards up to the next comment
  std::deque<Raw> raw_;
  bool processing_ = false;
  std::deque<AnswerEvent> ready_;
  std::optional<absl::Status> terminal_;
  bool waker_armed_ = true;
  bool cancelled_ = false;
  std::function<void()> waker_;
  std::optional<RequestId> id_;  // known when Submit has returned
  std::vector<uint32_t> stops_before_id_;

  // Of the text thread that processes.
  std::vector<Sequence> sequences_;
  std::optional<PromptInfo> prompt_info_;
  bool prompt_released_ = false;
  bool over_ = false;
  uint32_t unfinished_ = 0;
  int64_t started_ns_ = 0, first_token_ns_ = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_ANSWER_H_
