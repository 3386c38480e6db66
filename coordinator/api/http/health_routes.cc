#include "coordinator/api/http/health_routes.h"

#include <utility>

namespace lockstep {

HealthRoutes::HealthRoutes(Routes* routes) : routes_(routes) {}

std::shared_ptr<Exchange> HealthRoutes::Handle(HttpRequest request) {
  return routes_->Handle(std::move(request));
}

std::optional<HttpReply> HealthRoutes::Screen(HttpRequest* head) {
  const bool asks = head->method == "GET" || head->method == "HEAD";
  if (asks && (head->path == "/health" || head->path == "/ready")) return {};
  return routes_->RefuseMalformed(404, "this port answers GET /health and GET /ready alone");
}

HttpReply HealthRoutes::RefuseMalformed(int status, const std::string& message) {
  return routes_->RefuseMalformed(status, message);
}

}  // namespace lockstep
