#include "coordinator/api/grpc_service.h"

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/api/api_error.h"
#include "coordinator/api/grpc_convert.h"
#include "coordinator/api/grpc_status.h"
#include "coordinator/api/trace.h"
#include "proto/inference.grpc.pb.h"

namespace lockstep {
namespace {

// What is left of the call's deadline, on the engine's clock.
int64_t DeadlineMs(const grpc::CallbackServerContext& context, const EngineClient& engine) {
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return kNoDeadline;
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
      deadline - std::chrono::system_clock::now());
  return engine.NowMs() + std::max<int64_t>(left.count(), 0);
}

// What every call begins with: whether it may ask, and the id it goes by.
struct Caller {
  absl::Status allowed;
  std::string request_id;
  uint64_t cache_salt = 0;  // of its API key
};

// What streaming and unary generation share. The call owns itself from Begin
// to OnDone; wakers hold it weakly, because a text thread may be late.
//
// Exactly one Finish: by whoever sets finished_.
template <typename Reactor>
class GenerateCall : public Reactor, public std::enable_shared_from_this<GenerateCall<Reactor>> {
 public:
  // The message is read here: a call that is cancelled early takes it away.
  // What may not ask is not read.
  GenerateCall(RequestPath* path, const Caller& caller, grpc::CallbackServerContext* context,
               const v1::GenerateRequest& request)
      : path_(path), context_(context), allowed_(caller.allowed) {
    if (allowed_.ok()) held_ = path->HoldMessage(request.ByteSizeLong());
    if (allowed_.ok() && held_.ok()) client_ = FromProto(request);
    client_.request_id = caller.request_id;
    client_.cache_salt = caller.cache_salt;
    client_.deadline_ms = DeadlineMs(*context, path->engine());
  }

  void Begin() {
    self_ = this->shared_from_this();
    absl::Status status = allowed_;
    if (status.ok()) status = path_->Admit();
    if (status.ok()) status = held_.status();
    if (status.ok()) {
      status = path_->RunLater([self = self_] { self->Intake(); });
    }
    if (!status.ok()) FinishOnce(status);
  }

  void OnCancel() override {
    std::shared_ptr<Answer> answer;
    {
      const std::lock_guard lock(mutex_);
      cancelled_ = true;
      answer = answer_;
    }
    if (answer != nullptr) answer->Cancel();
    FinishCancelled();
  }

  void OnDone() override { std::shared_ptr<GenerateCall> last = std::move(self_); }

 protected:
  // Takes what there is; called from any thread, possibly several at once.
  virtual void Pump() = 0;
  virtual void FinishCancelled() { FinishOnce(absl::CancelledError("the client ended the call")); }

  void FinishOnce(const absl::Status& status) {
    {
      const std::lock_guard lock(mutex_);
      if (std::exchange(finished_, true)) return;
    }
    this->Finish(ToGrpcStatus(status, context_));
  }

  std::shared_ptr<Answer> answer() {
    const std::lock_guard lock(mutex_);
    return answer_;
  }

  RequestPath* const path_;
  std::mutex mutex_;
  std::shared_ptr<Answer> answer_;  // guarded by mutex_
  bool cancelled_ = false;          // guarded by mutex_
  bool finished_ = false;           // guarded by mutex_

 private:
  void Intake() {
    {
      const std::lock_guard lock(mutex_);
      if (cancelled_) return;
    }
    absl::StatusOr<Request> request = path_->Build(client_, {});
    client_ = {};
    held_ = std::shared_ptr<void>();
    if (!request.ok()) return FinishOnce(request.status());
    held_ = path_->HoldLogprobs({&*request, 1}, RequestPath::Listed::kOnce);
    if (!held_.ok()) return FinishOnce(held_.status());
    absl::StatusOr<std::shared_ptr<Answer>> started = path_->Submit(*std::move(request));
    if (!started.ok()) return FinishOnce(started.status());
    bool gone;
    {
      const std::lock_guard lock(mutex_);
      gone = cancelled_;
      answer_ = *started;
    }
    if (gone) return (*started)->Cancel();
    (*started)->SetWaker([weak = this->weak_from_this()] {
      if (const auto call = weak.lock()) call->Pump();
    });
  }

  grpc::CallbackServerContext* const context_;  // alive until Finish
  const absl::Status allowed_;
  absl::StatusOr<std::shared_ptr<void>> held_ = std::shared_ptr<void>();
  ClientRequest client_;
  std::shared_ptr<GenerateCall> self_;
};

class StreamCall final : public GenerateCall<grpc::ServerWriteReactor<v1::GenerateEvent>> {
 public:
  using GenerateCall::GenerateCall;

  void OnWriteDone(bool ok) override {
    bool cancelled;
    {
      const std::lock_guard lock(mutex_);
      writing_ = false;
      cancelled = cancelled_ || !ok;
    }
    if (!cancelled) return Pump();
    if (const std::shared_ptr<Answer> gone = answer()) gone->Cancel();
    FinishCancelled();
  }

 private:
  void Pump() override {
    const std::shared_ptr<Answer> source = answer();
    bool write = false;
    {
      const std::lock_guard lock(mutex_);
      if (writing_ || cancelled_ || finished_) return;
      if (queue_.empty() && !terminal_) {
        Answer::Taken taken = source->Take();
        for (AnswerEvent& event : taken.events) queue_.push_back(std::move(event));
        terminal_ = std::move(taken.terminal);
      }
      if (queue_.empty() && !terminal_) return;
      if (!queue_.empty()) {
        current_ = ToProto(*source, path_->model(), std::move(queue_.front()));
        queue_.pop_front();
        write = writing_ = true;
      }
    }
    if (write) {
      StartWrite(&current_);
    } else {
      FinishOnce(*terminal_);
    }
  }

  void FinishCancelled() override {
    {
      const std::lock_guard lock(mutex_);
      if (writing_) return;  // OnWriteDone comes, and finishes
    }
    GenerateCall::FinishCancelled();
  }

  std::deque<AnswerEvent> queue_;  // guarded by mutex_, as what follows
  std::optional<absl::Status> terminal_;
  bool writing_ = false;
  v1::GenerateEvent current_;  // of the write under way
};

class UnaryCall final : public GenerateCall<grpc::ServerUnaryReactor> {
 public:
  UnaryCall(RequestPath* path, const Caller& caller, grpc::CallbackServerContext* context,
            const v1::GenerateRequest& request, v1::GenerateResponse* response)
      : GenerateCall(path, caller, context, request), response_(response) {}

 private:
  void Pump() override {
    const std::shared_ptr<Answer> source = answer();
    std::optional<absl::Status> terminal;
    {
      const std::lock_guard lock(mutex_);
      if (cancelled_ || finished_) return;
      Answer::Taken taken = source->Take();
      for (AnswerEvent& event : taken.events) {
        AddToResponse(*source, path_->model(), std::move(event), response_);
      }
      terminal = std::move(taken.terminal);
    }
    if (terminal) FinishOnce(*terminal);
  }

  v1::GenerateResponse* const response_;  // guarded by mutex_
};

class InferenceService final : public v1::Inference::CallbackService {
 public:
  InferenceService(RequestPath* path, ApiKeys* keys) : path_(path), keys_(keys) {}

  grpc::ServerWriteReactor<v1::GenerateEvent>* GenerateStream(
      grpc::CallbackServerContext* context, const v1::GenerateRequest* request) override {
    const auto call = std::make_shared<StreamCall>(path_, Meet(context, request->request_id()),
                                                   context, *request);
    call->Begin();
    return call.get();
  }

  grpc::ServerUnaryReactor* Generate(grpc::CallbackServerContext* context,
                                     const v1::GenerateRequest* request,
                                     v1::GenerateResponse* response) override {
    const auto call = std::make_shared<UnaryCall>(path_, Meet(context, request->request_id()),
                                                  context, *request, response);
    call->Begin();
    return call.get();
  }

  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override {
    return Later(context, request->ByteSizeLong(), [this, request, response] {
      absl::StatusOr<std::vector<TokenId>> ids =
          EncodePrompt(FromProto(*request), path_->model(), "text", TokenizeLimit(path_->model()));
      if (!ids.ok()) return ids.status();
      response->mutable_token_ids()->Add(ids->begin(), ids->end());
      response->set_max_model_len(path_->model().max_model_len);
      return absl::OkStatus();
    });
  }

  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override {
    return Later(context, request->ByteSizeLong(), [this, request, response]() -> absl::Status {
      const auto count = static_cast<size_t>(request->token_ids_size());
      absl::Status fits = CheckDetokenize(count, path_->model(), "token_ids");
      if (!fits.ok()) return fits;
      const std::vector<TokenId> ids(request->token_ids().begin(), request->token_ids().end());
      absl::StatusOr<std::string> text = DecodeTokens(ids, path_->model(), "token_ids");
      if (!text.ok()) return text.status();
      response->set_text(*std::move(text));
      return absl::OkStatus();
    });
  }

  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* context,
                                         const v1::GetModelInfoRequest*,
                                         v1::GetModelInfoResponse* response) override {
    const absl::Status allowed = Meet(context).allowed;
    if (allowed.ok()) *response = DescribeModel(*path_);
    grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
    reactor->Finish(ToGrpcStatus(allowed, context));
    return reactor;
  }

 private:
  // Every call begins with it. The id is the message's own, which is checked with
  // the rest of it, or the metadata's, or a fresh one; it goes back as metadata and
  // to the log beside the call's trace.
  Caller Meet(grpc::CallbackServerContext* context, const std::string& id_of_message = "") {
    const auto& metadata = context->client_metadata();
    const auto value = [&metadata](const char* name) {
      const auto found = metadata.find(name);
      if (found == metadata.end()) return std::string_view();
      return std::string_view(found->second.data(), found->second.size());
    };
    uint64_t cache_salt = 0;
    if (keys_ != nullptr) {
      absl::Status allowed = path_->Refuse(keys_->Check(value("authorization"), &cache_salt));
      if (!allowed.ok()) return {std::move(allowed), ""};
    }
    std::string id = id_of_message;
    if (id.empty()) {
      id = std::string(value("x-request-id"));
      absl::Status named = path_->Refuse(CheckIdentifier("x-request-id", id));
      if (!named.ok()) return {std::move(named), ""};
    }
    if (id.empty()) id = MakeRequestId();
    if (CheckIdentifier("request_id", id).ok()) {
      context->AddInitialMetadata("x-request-id", id);
      LogTrace(id, value("traceparent"));
    }
    return {absl::OkStatus(), std::move(id), cache_salt};
  }

  // Runs `work` on a message of `bytes` on an intake thread and finishes with what
  // it returns.
  grpc::ServerUnaryReactor* Later(grpc::CallbackServerContext* context, size_t bytes,
                                  std::function<absl::Status()> work) {
    grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
    absl::Status posted = Meet(context).allowed;
    absl::StatusOr<std::shared_ptr<void>> held = std::shared_ptr<void>();
    if (posted.ok()) held = path_->HoldMessage(bytes);
    if (posted.ok()) posted = held.status();
    if (posted.ok()) {
      posted = path_->RunLater([context, reactor, work = std::move(work), held = *held]() mutable {
        const absl::Status status = work();
        held.reset();
        reactor->Finish(ToGrpcStatus(status, context));
      });
    }
    if (!posted.ok()) reactor->Finish(ToGrpcStatus(posted, context));
    return reactor;
  }

  RequestPath* const path_;
  ApiKeys* const keys_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeInferenceService(RequestPath* path, ApiKeys* keys) {
  return std::make_unique<InferenceService>(path, keys);
}

}  // namespace lockstep
