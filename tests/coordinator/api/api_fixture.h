// Both doors, open on free ports over a scripted engine.
#ifndef LOCKSTEP_TESTS_COORDINATOR_API_API_FIXTURE_H_
#define LOCKSTEP_TESTS_COORDINATOR_API_API_FIXTURE_H_

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "coordinator/api/server.h"
#include "tests/coordinator/api/api_testing.h"
#include "tests/coordinator/api/raw_http.h"
#include "tests/coordinator/api/scripted_engine.h"

namespace lockstep {

class ApiFixture : public ::testing::Test {
 protected:
  void Open(bool reflection = false) {
    options_.http_port = 0;
    options_.grpc_port = 0;
    options_.reflection = reflection;
    server_ = std::make_unique<ApiServer>(options_, model_);
    const absl::Status started = server_->Start(&engine_);
    ASSERT_TRUE(started.ok()) << started;
  }
  void SetUp() override { Open(); }

  // Answers with `text`, then the model's own ending.
  void AnswerWith(const std::string& text) {
    std::vector<TokenId> tokens = Ids(model_, text);
    tokens.push_back(2);
    engine_.script = [tokens](const Request&) { return Script{.tokens = {tokens}}; };
  }

  int http() const { return server_->http_port(); }
  RawResponse Complete(const nlohmann::json& body) {
    return Post(http(), "/v1/completions", body.dump());
  }

  ApiOptions options_;  // of the next Open, as is model_
  ServedModel model_ = DemoModel();
  ScriptedEngine engine_;
  std::unique_ptr<ApiServer> server_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_COORDINATOR_API_API_FIXTURE_H_
