// The routes of the HTTP door, over the request path:
//   POST /v1/completions, /v1/chat/completions, /tokenize, /detokenize
//   GET  /v1/models, /v1/models/NAME, /health, /ready, /metrics, /version,
//        /tokenizer_info
// Anything else is 404, another method 405, both in OpenAI's error shape. With
// API keys every path needs one but /health, /ready and /metrics.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_ROUTES_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_ROUTES_H_

#include <ctime>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/api/api_keys.h"
#include "coordinator/api/http/exchange.h"
#include "coordinator/api/http/generation_api.h"
#include "coordinator/api/request_path.h"

namespace lockstep {

class Routes : public HttpHandler {
 public:
  // `path` outlives the routes, as does `keys` (null: everybody may ask). Pages of
  // `allowed_origins` may read the answers; "*" allows all, none is the default.
  Routes(RequestPath* path, ApiKeys* keys, std::vector<std::string> allowed_origins);

  std::shared_ptr<Exchange> Handle(HttpRequest request) override;
  std::optional<HttpReply> Screen(HttpRequest* head) override;
  HttpReply RefuseMalformed(int status, const std::string& message) override;

 private:
  struct Route;
  static const Route kRoutes[];
  // What every reply to one request says.
  struct Caller {
    std::string request_id;
    std::string allow_origin;  // "": no cross-origin headers
  };
  Caller CallerOf(const HttpRequest& request) const;
  bool IsPreflight(const HttpRequest& head) const;
  static HttpReply Preflight(const HttpRequest& head);

  std::shared_ptr<Exchange> Completions(HttpRequest&& request, const Caller& caller);
  std::shared_ptr<Exchange> Chat(HttpRequest&& request, const Caller& caller);
  std::shared_ptr<Exchange> Generate(const GenerationApi& api, HttpRequest&& request,
                                     const Caller& caller);
  std::shared_ptr<Exchange> Tokenize(HttpRequest&& request, const Caller& caller);
  std::shared_ptr<Exchange> Detokenize(HttpRequest&& request, const Caller& caller);
  std::shared_ptr<Exchange> Models(HttpRequest&& request, const Caller& caller);
  std::shared_ptr<Exchange> Model(HttpRequest&& request, const Caller& caller);
  std::shared_ptr<Exchange> Health(HttpRequest&& request, const Caller& caller);
  std::shared_ptr<Exchange> ReadyState(HttpRequest&& request, const Caller& caller);
  std::shared_ptr<Exchange> MetricsText(HttpRequest&& request, const Caller& caller);
  std::shared_ptr<Exchange> Version(HttpRequest&& request, const Caller& caller);

  std::shared_ptr<Exchange> TokenizerInfo(HttpRequest&& request, const Caller& caller);

  std::string ModelJson() const;
  std::shared_ptr<Exchange> Reply(HttpReply reply, const Caller& caller);
  // Runs `work` on the body, on an intake thread; what it returns is the answer.
  std::shared_ptr<Exchange> Later(
      HttpRequest&& request, const Caller& caller,
      std::function<absl::StatusOr<std::string>(const std::string& body)> work);
  HttpReply FinishHead(HttpReply reply, const Caller& caller) const;

  RequestPath* const path_;
  ApiKeys* const keys_;
  const std::vector<std::string> allowed_origins_;
  const std::time_t started_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_ROUTES_H_
