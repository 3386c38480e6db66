// GET /health and /ready, in plain text and for everybody: for probers that have no
// certificate to show where the doors ask for one (--health-port). Anything else is
// 404 before its body is read.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_HEALTH_ROUTES_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_HEALTH_ROUTES_H_

#include <memory>
#include <optional>
#include <string>

#include "coordinator/api/http/exchange.h"
#include "coordinator/api/http/routes.h"

namespace lockstep {

class HealthRoutes : public HttpHandler {
 public:
  explicit HealthRoutes(Routes* routes);  // the door's, which answer; they outlive this

  std::shared_ptr<Exchange> Handle(HttpRequest request) override;
  std::optional<HttpReply> Screen(HttpRequest* head) override;
  HttpReply RefuseMalformed(int status, const std::string& message) override;

 private:
  Routes* const routes_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_HEALTH_ROUTES_H_
