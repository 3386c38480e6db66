#include "coordinator/api/request_path.h"

#include <malloc.h>

#include "absl/strings/str_cat.h"
#include "coordinator/api/api_error.h"
#include "coordinator/api/limits.h"
#include "coordinator/retry_delay.h"

namespace lockstep {
namespace {

constexpr int kIntakeThreads = 2;
constexpr size_t kIntakeCapacity = 4096;
constexpr size_t kSmallMessageBytes = 512 * 1024;
constexpr uint64_t kFewLogprobs = 4 * 1024;

absl::Status Full(const std::string& message) {
  absl::Status status = absl::ResourceExhaustedError(message);
  SetRetryDelay(&status, 1);
  return status;
}

// A part of `most`, given back with the last copy; null where the others leave none.
std::shared_ptr<void> Hold(const std::shared_ptr<std::atomic<uint64_t>>& all, uint64_t part,
                           uint64_t most) {
  const bool fits = all->fetch_add(part) + part <= most;
  std::shared_ptr<void> held(all.get(), [all, part](void*) {
    *all -= part;
    malloc_trim(0);  // what came of it was many times its size
  });
  return fits ? held : nullptr;
}

}  // namespace

RequestPath::RequestPath(EngineClient* engine, const ServedModel* model, Metrics* metrics,
                         int text_threads)
    : engine_(engine),
      model_(model),
      metrics_(metrics),
      text_pool_(std::make_shared<WorkPool>(text_threads)),
      intake_pool_(kIntakeThreads) {}

EngineInfo RequestPath::Info() const {
  EngineInfo info = engine_->Info();
  if (draining_ && info.state != EngineState::kFailed) info.state = EngineState::kDraining;
  return info;
}

absl::Status RequestPath::Admit() { return Refuse(RefusalOf(Info())); }

absl::Status RequestPath::RunLater(std::function<void()> work) {
  if (intake_pool_.TryPost(std::move(work), kIntakeCapacity)) return absl::OkStatus();
  return Refuse(
      Full(absl::StrCat("the server is full: ", kIntakeCapacity, " requests await validation")));
}

absl::StatusOr<std::shared_ptr<void>> RequestPath::HoldMessage(size_t bytes) {
  if (bytes <= kSmallMessageBytes) return std::shared_ptr<void>();
  std::shared_ptr<void> held = Hold(held_bytes_, bytes, limits::kBodyBytesInFlight);
  if (held != nullptr) return held;
  return Refuse(Full("too many large messages at once"));
}

absl::StatusOr<std::shared_ptr<void>> RequestPath::HoldLogprobs(absl::Span<const Request> requests,
                                                                Listed listed) {
  uint64_t entries = 0;
  for (const Request& request : requests) {
    const SamplingParams& sampling = request.sampling;
    if (sampling.prompt_logprobs < 0) continue;
    const uint64_t of_a_token = uint64_t{1} + sampling.prompt_logprobs;
    const uint64_t times = listed == Listed::kOnce ? 1 : sampling.n;
    entries += request.prompt.size() * of_a_token * times;
  }
  if (entries <= kFewLogprobs) return std::shared_ptr<void>();
  if (entries > limits::kPromptLogprobs) {
    return Refuse(FieldError(
        "prompt", absl::StrCat(entries,
                               " log-probabilities of prompts are too many for an answer; "
                               "allowed: ",
                               limits::kPromptLogprobs,
                               "; ask for fewer alternatives or prompts at a time")));
  }
  std::shared_ptr<void> held = Hold(held_logprobs_, entries, limits::kPromptLogprobsInFlight);
  if (held != nullptr) return held;
  return Refuse(Full("too many log-probabilities of prompts at once"));
}

absl::Status RequestPath::CheckBatch(size_t prompts) {
  if (prompts <= 1) return absl::OkStatus();  // as most are: one is always taken
  const EngineInfo info = Info();
  // Admission counts requests, one a prompt, whatever their n.
  const uint64_t most = uint64_t{info.max_num_seqs} + info.max_queued_requests;
  if (prompts <= most) return absl::OkStatus();
  return Refuse(FieldError(
      "prompt", absl::StrCat(prompts, " prompts are more than this server takes at once; allowed: ",
                             most, " (--max-num-seqs ", info.max_num_seqs,
                             " + --max-queued-requests ", info.max_queued_requests, ")")));
}

absl::StatusOr<Request> RequestPath::Build(const ClientRequest& client,
                                           const DoorDefaults& defaults) {
  absl::StatusOr<Request> request = BuildRequest(client, *model_, defaults, engine_->NowMs());
  if (!request.ok()) return Refuse(request.status());
  return request;
}

absl::StatusOr<std::shared_ptr<Answer>> RequestPath::Submit(Request request) {
  const AnswerContext context{engine_, model_, metrics_, text_pool_};
  absl::StatusOr<std::shared_ptr<Answer>> answer = Answer::Start(context, std::move(request));
  if (!answer.ok()) return Refuse(answer.status());
  return answer;
}

absl::Status RequestPath::Refuse(absl::Status status) {
  if (!status.ok()) metrics_->Rejected(status);
  return status;
}

void RequestPath::Stop() {
  intake_pool_.Stop();
  text_pool_->Stop();
}

void RequestPath::SetStartup(Phases phases) {
  metrics_->SetStartup(phases);
  const std::lock_guard lock(mutex_);
  startup_ = std::move(phases);
}

RequestPath::Phases RequestPath::startup() const {
  const std::lock_guard lock(mutex_);
  return startup_;
}

}  // namespace lockstep
