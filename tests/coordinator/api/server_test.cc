// What keeps the doors from opening at all.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tests/coordinator/api/api_fixture.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;

TEST(ApiServerTest, ATakenPortIsOneLineWithTheFlag) {
  ScriptedEngine engine;
  ApiOptions options;
  options.http_port = 0;
  options.grpc_port = 0;
  ApiServer first(options, DemoModel());
  ASSERT_TRUE(first.Start(&engine).ok());
  options.grpc_port = first.grpc_port();
  const absl::Status grpc_taken = ApiServer(options, DemoModel()).Start(&engine);
  EXPECT_THAT(std::string(grpc_taken.message()),
              HasSubstr("--grpc-port " + std::to_string(first.grpc_port()) + ": 127.0.0.1:"));
  EXPECT_THAT(std::string(grpc_taken.message()), HasSubstr("Address already in use"));
  options.grpc_port = 0;
  options.http_port = first.http_port();
  const absl::Status http_taken = ApiServer(options, DemoModel()).Start(&engine);
  EXPECT_THAT(std::string(http_taken.message()),
              HasSubstr("--http-port " + std::to_string(first.http_port()) + ": "));
}

TEST(ApiServerTest, AnOpenHostNeedsInsecure) {
  ScriptedEngine engine;
  ApiOptions options;
  options.host = "0.0.0.0";
  options.http_port = 0;
  options.grpc_port = 0;
  const absl::Status refused = ApiServer(options, DemoModel()).Start(&engine);
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("--insecure"));
  options.insecure = true;
  EXPECT_TRUE(ApiServer(options, DemoModel()).Start(&engine).ok());
  options.host = "no.such.host.invalid";
  EXPECT_THAT(std::string(ApiServer(options, DemoModel()).Start(&engine).message()),
              HasSubstr("--host"));
}

}  // namespace
}  // namespace lockstep
