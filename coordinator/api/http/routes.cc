#include "coordinator/api/http/routes.h"

#include <algorithm>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/version.h"
#include "coordinator/api/api_error.h"
#include "coordinator/api/client_request.h"
#include "coordinator/api/http/completion_exchange.h"
#include "coordinator/api/http/http_error.h"
#include "coordinator/api/http/token_bodies.h"
#include "coordinator/api/trace.h"

namespace lockstep {
namespace {

constexpr std::string_view kModelPrefix = "/v1/models/";
constexpr size_t kWantedHeadersBytes = 1'024;

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

// "authorization, x-stainless-os": names of headers alone (RFC 9110, 5.6.2), so that
// an answer that repeats them says nothing else.
bool IsHeaderList(const std::string& list) {
  if (list.size() > kWantedHeadersBytes) return false;
  const auto token = [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) ||
           std::string_view("!#$%&'*+-.^_`|~").find(c) != std::string_view::npos;
  };
  const std::vector<std::string> names = absl::StrSplit(list, ',');
  return std::all_of(names.begin(), names.end(), [&](const std::string& each) {
    const auto name = absl::StripAsciiWhitespace(each);
    return !name.empty() && std::all_of(name.begin(), name.end(), token);
  });
}

// "org/m" of "org%2Fm"; nothing where an escape is malformed.
std::optional<std::string> PercentDecoded(std::string_view text) {
  const auto digit = [&text](size_t i) {
    const auto c = static_cast<unsigned char>(i < text.size() ? text[i] : '\0');
    if (!absl::ascii_isxdigit(c)) return -1;
    return absl::ascii_isdigit(c) ? c - '0' : absl::ascii_tolower(c) - 'a' + 10;
  };
  std::string decoded;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      decoded += text[i];
      continue;
    }
    const int high = digit(i + 1), low = digit(i + 2);
    if (high < 0 || low < 0) return {};
    decoded += static_cast<char>(high * 16 + low);
    i += 2;
  }
  return decoded;
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
  using Handler = std::shared_ptr<Exchange> (Routes::*)(HttpRequest&&, const Caller&);
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
    {"/tokenizer_info", "GET", &Routes::TokenizerInfo},
};

Routes::Routes(RequestPath* path, ApiKeys* keys, std::vector<std::string> allowed_origins)
    : path_(path),
      keys_(keys),
      allowed_origins_(std::move(allowed_origins)),
      started_(std::time(nullptr)) {}

Routes::Caller Routes::CallerOf(const HttpRequest& request) const {
  Caller caller;
  const bool named =
      !request.request_id.empty() && CheckIdentifier("x-request-id", request.request_id).ok();
  caller.request_id = named ? request.request_id : MakeRequestId();
  for (const std::string& allowed : allowed_origins_) {
    if (!request.origin.empty() && (allowed == "*" || allowed == request.origin)) {
      caller.allow_origin = allowed;
    }
  }
  return caller;
}

// What a browser asks before it lets a page send more than a plain form.
bool Routes::IsPreflight(const HttpRequest& head) const {
  return head.method == "OPTIONS" && !CallerOf(head).allow_origin.empty();
}

HttpReply Routes::Preflight(const HttpRequest& head) {
  HttpReply reply{.content_type = "text/plain", .headers = {}, .body = {}};
  reply.headers = {{"Access-Control-Allow-Methods", "GET, POST"},
                   // Client libraries add headers of their own, which nothing here reads.
                   {"Access-Control-Allow-Headers",
                    IsHeaderList(head.wanted_headers)
                        ? head.wanted_headers
                        : "authorization, content-type, traceparent, x-request-id"},
                   {"Access-Control-Max-Age", "600"}};
  return reply;
}

std::optional<HttpReply> Routes::Screen(HttpRequest* head) {
  if (keys_ == nullptr) return {};
  const bool open = head->method == "GET" || head->method == "HEAD";
  for (const std::string_view path : {"/health", "/ready", "/metrics"}) {
    if (open && head->path == path) return {};
  }
  // A browser sends no key with its question, and learns nothing from the answer.
  if (IsPreflight(*head)) return {};
  const absl::Status allowed = path_->Refuse(keys_->Check(head->authorization, &head->cache_salt));
  if (allowed.ok()) return {};
  return FinishHead(ErrorReply(allowed), CallerOf(*head));
}

std::shared_ptr<Exchange> Routes::Handle(HttpRequest request) {
  const Caller caller = CallerOf(request);
  const absl::Status named = CheckIdentifier("x-request-id", request.request_id);
  if (!named.ok()) return Reply(ErrorReply(path_->Refuse(named)), caller);
  if (IsPreflight(request)) return Reply(Preflight(request), caller);
  LogTrace(caller.request_id, request.traceparent);

  const Route* route = nullptr;
  for (const Route& each : kRoutes) {
    const bool prefix = each.path == kModelPrefix && request.path.starts_with(kModelPrefix);
    if (prefix || request.path == each.path) route = &each;
  }
  if (route == nullptr) {
    return Reply(ErrorReply(404, absl::StrCat("no such route: ", Echo(request.path))), caller);
  }
  const bool head = route->method == "GET" && request.method == "HEAD";
  if (request.method != route->method && !head) {
    HttpReply reply =
        ErrorReply(405, absl::StrCat(Echo(request.method), " is not allowed on ",
                                     Echo(request.path), "; use ", std::string(route->method)));
    reply.headers.emplace_back("Allow", route->method == "GET" ? "GET, HEAD" : "POST");
    return Reply(std::move(reply), caller);
  }
  if (route->method == "POST" && !IsJson(request.content_type)) {
    return Reply(ErrorReply(415, absl::StrCat("content type '", Echo(request.content_type),
                                              "' is not supported; send application/json")),
                 caller);
  }
  return (this->*route->handler)(std::move(request), caller);
}

HttpReply Routes::RefuseMalformed(int status, const std::string& message) {
  return FinishHead(ErrorReply(status, message), CallerOf({}));
}

HttpReply Routes::FinishHead(HttpReply reply, const Caller& caller) const {
  reply.headers.emplace_back("x-request-id", caller.request_id);
  if (!caller.allow_origin.empty()) {
    reply.headers.emplace_back("Access-Control-Allow-Origin", caller.allow_origin);
    reply.headers.emplace_back("Access-Control-Expose-Headers", "retry-after, x-request-id");
  }
  // What is in the answer depends on who asks.
  if (!allowed_origins_.empty()) reply.headers.emplace_back("Vary", "Origin");
  path_->metrics().HttpResponse(reply.status);
  return reply;
}

std::shared_ptr<Exchange> Routes::Reply(HttpReply reply, const Caller& caller) {
  return std::make_shared<ReadyExchange>(FinishHead(std::move(reply), caller));
}

std::shared_ptr<Exchange> Routes::Later(
    HttpRequest&& request, const Caller& caller,
    std::function<absl::StatusOr<std::string>(const std::string& body)> work) {
  auto exchange = std::make_shared<LaterExchange>();
  auto shared = std::make_shared<HttpRequest>(std::move(request));
  const absl::Status posted =
      path_->RunLater([this, exchange, shared, caller, work = std::move(work)] {
        absl::StatusOr<std::string> body = work(shared->body);
        *shared = {};
        HttpReply reply{.headers = {}, .body = {}};
        if (body.ok()) {
          reply.body = *std::move(body);
        } else {
          reply = ErrorReply(path_->Refuse(body.status()));
        }
        exchange->Fulfil(FinishHead(std::move(reply), caller));
      });
  if (!posted.ok()) return Reply(ErrorReply(posted), caller);
  return exchange;
}

std::shared_ptr<Exchange> Routes::Generate(const GenerationApi& api, HttpRequest&& request,
                                           const Caller& caller) {
  auto exchange = std::make_shared<CompletionExchange>(
      path_, api, std::move(request), caller.request_id,
      [this, caller](HttpReply reply) { return FinishHead(std::move(reply), caller); });
  exchange->Begin();
  return exchange;
}

std::shared_ptr<Exchange> Routes::Completions(HttpRequest&& request, const Caller& caller) {
  return Generate(CompletionsApi(), std::move(request), caller);
}

std::shared_ptr<Exchange> Routes::Chat(HttpRequest&& request, const Caller& caller) {
  return Generate(ChatApi(), std::move(request), caller);
}

std::shared_ptr<Exchange> Routes::Tokenize(HttpRequest&& request, const Caller& caller) {
  return Later(std::move(request), caller,
               [this](const std::string& body) { return TokenizeBody(body, path_->model()); });
}

std::shared_ptr<Exchange> Routes::Detokenize(HttpRequest&& request, const Caller& caller) {
  return Later(std::move(request), caller,
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

std::shared_ptr<Exchange> Routes::Models(HttpRequest&&, const Caller& caller) {
  const std::string body = absl::StrCat("{\"object\":\"list\",\"data\":[", ModelJson(), "]}");
  return Reply({.headers = {}, .body = body}, caller);
}

std::shared_ptr<Exchange> Routes::Model(HttpRequest&& request, const Caller& caller) {
  const std::string escaped = request.path.substr(kModelPrefix.size());
  const std::string asked = PercentDecoded(escaped).value_or(escaped);
  if (asked != path_->model().name) {
    return Reply(ErrorReply(UnknownModelError(asked, path_->model().name)), caller);
  }
  return Reply({.headers = {}, .body = ModelJson()}, caller);
}

std::shared_ptr<Exchange> Routes::Health(HttpRequest&&, const Caller& caller) {
  const EngineInfo info = path_->Info();
  if (info.state == EngineState::kFailed) {
    return Reply(ErrorReply(RefusalOf(info)), caller);
  }
  const std::string body =
      absl::StrCat("{\"status\":\"ok\",\"state\":\"", StateName(info.state), "\"}");
  return Reply({.headers = {}, .body = body}, caller);
}

std::shared_ptr<Exchange> Routes::ReadyState(HttpRequest&&, const Caller& caller) {
  const EngineInfo info = path_->Info();
  if (path_->IsReady()) {
    return Reply({.headers = {}, .body = "{\"status\":\"ready\"}"}, caller);
  }
  absl::Status why = RefusalOf(info);
  if (why.ok() && info.state == EngineState::kReady) {
    why = absl::UnavailableError("the server is about to end; send requests elsewhere");
  } else if (why.ok()) {
    why = absl::UnavailableError(absl::StrCat("recovering: ", info.failure.message()));
  }
  return Reply(ErrorReply(why), caller);
}

std::shared_ptr<Exchange> Routes::MetricsText(HttpRequest&&, const Caller& caller) {
  HttpReply reply{.content_type = "text/plain; version=0.0.4; charset=utf-8",
                  .headers = {},
                  .body = path_->metrics().Expose(path_->Info(), path_->engine().Stats())};
  return Reply(std::move(reply), caller);
}

std::shared_ptr<Exchange> Routes::Version(HttpRequest&&, const Caller& caller) {
  return Reply({.headers = {}, .body = absl::StrCat("{\"version\":\"", kVersion, "\"}")}, caller);
}

std::shared_ptr<Exchange> Routes::TokenizerInfo(HttpRequest&&, const Caller& caller) {
  return Reply({.headers = {}, .body = TokenizerInfoBody(path_->model())}, caller);
}

}  // namespace lockstep
