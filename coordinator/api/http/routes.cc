#include "coordinator/api/http/routes.h"

#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "common/version.h"
#include "coordinator/api/api_error.h"
#include "coordinator/api/client_request.h"
#include "coordinator/api/http/completion_exchange.h"
#include "coordinator/api/http/http_error.h"
#include "coordinator/api/http/token_bodies.h"

namespace lockstep {
namespace {

constexpr std::string_view kModelPrefix = "/v1/models/";

const char* StateName(EngineState state) {
  switch (state) {
    case EngineState::kLoading:
      return "loading";
    case EngineState::kReady:
      return "ready";
    case EngineState::kRecovering:
      return "recovering";
    case EngineState::kDraining:
      return "draining";
    case EngineState::kFailed:
      break;
  }
  return "failed";
}

bool IsJson(const std::string& content_type) {
  const std::string type = content_type.substr(0, content_type.find(';'));
  return absl::AsciiStrToLower(absl::StripAsciiWhitespace(type)) == "application/json";
}

// A reply that an intake thread makes.
class LaterExchange : public Exchange {
 public:
  std::optional<Part> Next() override {
    const std::lock_guard lock(mutex_);
    if (!reply_) return {};
    return Part{.head = std::exchange(reply_, std::nullopt), .body = {}, .last = true};
  }
  void SetWaker(std::function<void()> waker) override {
    const std::lock_guard lock(mutex_);
    waker_ = std::move(waker);
  }
  void Abandon() override { SetWaker(nullptr); }

  void Fulfil(HttpReply reply) {
    std::function<void()> waker;
    {
      const std::lock_guard lock(mutex_);
      reply_ = std::move(reply);
      waker = waker_;
    }
    if (waker) waker();
  }

 private:
  std::mutex mutex_;
  std::optional<HttpReply> reply_;  // guarded by mutex_, as what follows
  std::function<void()> waker_;
};

}  // namespace

struct Routes::Route {
  using Handler = std::shared_ptr<Exchange> (Routes::*)(HttpRequest&&, const std::string&);
  std::string_view path;
  std::string_view method;
  Handler handler;
};

const Routes::Route Routes::kRoutes[] = {
    {"/v1/completions", "POST", &Routes::Completions},
    {"/v1/chat/completions", "POST", &Routes::Chat},
    {"/tokenize", "POST", &Routes::Tokenize},
    {"/detokenize", "POST", &Routes::Detokenize},
    {"/v1/models", "GET", &Routes::Models},
    {kModelPrefix, "GET", &Routes::Model},
    {"/health", "GET", &Routes::Health},
    {"/ready", "GET", &Routes::ReadyState},
    {"/metrics", "GET", &Routes::MetricsText},
    {"/version", "GET", &Routes::Version},
};

Routes::Routes(RequestPath* path) : path_(path), started_(std::time(nullptr)) {}

std::shared_ptr<Exchange> Routes::Handle(HttpRequest request) {
  const absl::Status named = CheckIdentifier("x-request-id", request.request_id);
  const std::string id =
      named.ok() && !request.request_id.empty() ? request.request_id : MakeRequestId();
  if (!named.ok()) return Reply(ErrorReply(path_->Refuse(named)), id);

  const Route* route = nullptr;
  for (const Route& each : kRoutes) {
    const bool prefix = each.path == kModelPrefix && request.path.starts_with(kModelPrefix);
    if (prefix || request.path == each.path) route = &each;
  }
  if (route == nullptr) {
    return Reply(ErrorReply(404, absl::StrCat("no such route: ", Echo(request.path))), id);
  }
  const bool head = route->method == "GET" && request.method == "HEAD";
  if (request.method != route->method && !head) {
    HttpReply reply =
        ErrorReply(405, absl::StrCat(Echo(request.method), " is not allowed on ",
                                     Echo(request.path), "; use ", std::string(route->method)));
    reply.headers.emplace_back("Allow", route->method == "GET" ? "GET, HEAD" : "POST");
    return Reply(std::move(reply), id);
  }
  if (route->method == "POST" && !IsJson(request.content_type)) {
    return Reply(ErrorReply(415, absl::StrCat("content type '", Echo(request.content_type),
                                              "' is not supported; send application/json")),
                 id);
  }
  return (this->*route->handler)(std::move(request), id);
}

HttpReply Routes::RefuseMalformed(int status, const std::string& message) {
  return FinishHead(ErrorReply(status, message), MakeRequestId());
}

HttpReply Routes::FinishHead(HttpReply reply, const std::string& request_id) const {
  reply.headers.emplace_back("x-request-id", request_id);
  path_->metrics().HttpResponse(reply.status);
  return reply;
}

std::shared_ptr<Exchange> Routes::Reply(HttpReply reply, const std::string& request_id) {
  return std::make_shared<ReadyExchange>(FinishHead(std::move(reply), request_id));
}

std::shared_ptr<Exchange> Routes::Later(
    HttpRequest&& request, const std::string& request_id,
    std::function<absl::StatusOr<std::string>(const std::string& body)> work) {
  auto exchange = std::make_shared<LaterExchange>();
  auto shared = std::make_shared<HttpRequest>(std::move(request));
  const absl::Status posted =
      path_->RunLater([this, exchange, shared, request_id, work = std::move(work)] {
        absl::StatusOr<std::string> body = work(shared->body);
        *shared = {};
        HttpReply reply{.headers = {}, .body = {}};
        if (body.ok()) {
          reply.body = *std::move(body);
        } else {
          reply = ErrorReply(path_->Refuse(body.status()));
        }
        exchange->Fulfil(FinishHead(std::move(reply), request_id));
      });
  if (!posted.ok()) return Reply(ErrorReply(posted), request_id);
  return exchange;
}

std::shared_ptr<Exchange> Routes::Generate(const GenerationApi& api, HttpRequest&& request,
                                           const std::string& request_id) {
  auto exchange = std::make_shared<CompletionExchange>(
      path_, api, std::move(request), request_id,
      [this, request_id](HttpReply reply) { return FinishHead(std::move(reply), request_id); });
  exchange->Begin();
  return exchange;
}

std::shared_ptr<Exchange> Routes::Completions(HttpRequest&& request,
                                              const std::string& request_id) {
  return Generate(CompletionsApi(), std::move(request), request_id);
}

std::shared_ptr<Exchange> Routes::Chat(HttpRequest&& request, const std::string& request_id) {
  return Generate(ChatApi(), std::move(request), request_id);
}

std::shared_ptr<Exchange> Routes::Tokenize(HttpRequest&& request, const std::string& request_id) {
  return Later(std::move(request), request_id,
               [this](const std::string& body) { return TokenizeBody(body, path_->model()); });
}

std::shared_ptr<Exchange> Routes::Detokenize(HttpRequest&& request, const std::string& request_id) {
  return Later(std::move(request), request_id,
               [this](const std::string& body) { return DetokenizeBody(body, path_->model()); });
}

std::string Routes::ModelJson() const {
  nlohmann::ordered_json json;
  json["id"] = path_->model().name;
  json["object"] = "model";
  json["created"] = started_;
  json["owned_by"] = "lockstep";
  json["root"] = path_->model().name;
  json["parent"] = nullptr;
  json["max_model_len"] = path_->model().max_model_len;
  return json.dump();
}

std::shared_ptr<Exchange> Routes::Models(HttpRequest&&, const std::string& request_id) {
  const std::string body = absl::StrCat("{\"object\":\"list\",\"data\":[", ModelJson(), "]}");
  return Reply({.headers = {}, .body = body}, request_id);
}

std::shared_ptr<Exchange> Routes::Model(HttpRequest&& request, const std::string& request_id) {
  const std::string asked = request.path.substr(kModelPrefix.size());
  if (asked != path_->model().name) {
    return Reply(ErrorReply(UnknownModelError(asked, path_->model().name)), request_id);
  }
  return Reply({.headers = {}, .body = ModelJson()}, request_id);
}

std::shared_ptr<Exchange> Routes::Health(HttpRequest&&, const std::string& request_id) {
  const EngineInfo info = path_->Info();
  if (info.state == EngineState::kFailed) {
    return Reply(ErrorReply(RefusalOf(info)), request_id);
  }
  const std::string body =
      absl::StrCat("{\"status\":\"ok\",\"state\":\"", StateName(info.state), "\"}");
  return Reply({.headers = {}, .body = body}, request_id);
}

std::shared_ptr<Exchange> Routes::ReadyState(HttpRequest&&, const std::string& request_id) {
  const EngineInfo info = path_->Info();
  if (info.state == EngineState::kReady) {
    return Reply({.headers = {}, .body = "{\"status\":\"ready\"}"}, request_id);
  }
  absl::Status why = RefusalOf(info);
  if (why.ok()) {
    why = absl::UnavailableError(absl::StrCat("recovering: ", info.failure.message()));
  }
  return Reply(ErrorReply(why), request_id);
}

std::shared_ptr<Exchange> Routes::MetricsText(HttpRequest&&, const std::string& request_id) {
  HttpReply reply{.content_type = "text/plain; version=0.0.4; charset=utf-8",
                  .headers = {},
                  .body = path_->metrics().Expose(path_->Info(), path_->engine().Stats())};
  return Reply(std::move(reply), request_id);
}

std::shared_ptr<Exchange> Routes::Version(HttpRequest&&, const std::string& request_id) {
  return Reply({.headers = {}, .body = absl::StrCat("{\"version\":\"", kVersion, "\"}")},
               request_id);
}

}  // namespace lockstep
