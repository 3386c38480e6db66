// The routes of the HTTP door, over the request path:
//   POST /v1/completions, /v1/chat/completions, /tokenize, /detokenize
//   GET  /v1/models, /v1/models/NAME, /health, /ready, /metrics, /version
// Anything else is 404, another method 405, both in OpenAI's error shape.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_ROUTES_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_ROUTES_H_

#include <ctime>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "coordinator/api/http/exchange.h"
#include "coordinator/api/http/generation_api.h"
#include "coordinator/api/request_path.h"

namespace lockstep {

class Routes : public HttpHandler {
 public:
  explicit Routes(RequestPath* path);  // outlives the routes

  std::shared_ptr<Exchange> Handle(HttpRequest request) override;
  HttpReply RefuseMalformed(int status, const std::string& message) override;

 private:
  struct Route;
  static const Route kRoutes[];

  std::shared_ptr<Exchange> Completions(HttpRequest&& request, const std::string& request_id);
  std::shared_ptr<Exchange> Chat(HttpRequest&& request, const std::string& request_id);
  std::shared_ptr<Exchange> Generate(const GenerationApi& api, HttpRequest&& request,
                                     const std::string& request_id);
  std::shared_ptr<Exchange> Tokenize(HttpRequest&& request, const std::string& request_id);
  std::shared_ptr<Exchange> Detokenize(HttpRequest&& request, const std::string& request_id);
  std::shared_ptr<Exchange> Models(HttpRequest&& request, const std::string& request_id);
  std::shared_ptr<Exchange> Model(HttpRequest&& request, const std::string& request_id);
  std::shared_ptr<Exchange> Health(HttpRequest&& request, const std::string& request_id);
  std::shared_ptr<Exchange> ReadyState(HttpRequest&& request, const std::string& request_id);
  std::shared_ptr<Exchange> MetricsText(HttpRequest&& request, const std::string& request_id);
  std::shared_ptr<Exchange> Version(HttpRequest&& request, const std::string& request_id);

  std::string ModelJson() const;
  std::shared_ptr<Exchange> Reply(HttpReply reply, const std::string& request_id);
  // Runs `work` on the body, on an intake thread; what it returns is the answer.
  std::shared_ptr<Exchange> Later(
      HttpRequest&& request, const std::string& request_id,
      std::function<absl::StatusOr<std::string>(const std::string& body)> work);
  HttpReply FinishHead(HttpReply reply, const std::string& request_id) const;

  RequestPath* const path_;
  const std::time_t started_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_ROUTES_H_
