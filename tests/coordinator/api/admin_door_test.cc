// The admin door: its own address, on this host alone, and nowhere else.
#include "coordinator/api/admin_door.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <chrono>
#include <memory>
#include <string>

#include "proto/admin.grpc.pb.h"
#include "proto/health.grpc.pb.h"
#include "tests/coordinator/api/api_fixture.h"
#include "tests/coordinator/api/tls_testing.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class FakeWatch : public GroupWatch {
 public:
  std::vector<DeviceFigures> Devices() override { return {}; }
  absl::StatusOr<std::string> Profile(uint32_t steps, int64_t,
                                      const std::function<bool()>&) override {
    if (steps == 0) return absl::InvalidArgumentError("steps: expected 1 or more");
    return std::string(3 << 20, 'j');
  }
};

std::shared_ptr<grpc::Channel> Channel(const std::string& address) {
  return grpc::CreateChannel(address, grpc::InsecureChannelCredentials());
}

grpc::Status Profile(const std::string& address, std::string* json, uint32_t steps = 1) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  context.AddMetadata("authorization", "Bearer secret");
  v1::ProfileRequest request;
  request.set_steps(steps);
  const auto stub = v1::Admin::NewStub(Channel(address));
  const auto reader = stub->Profile(&context, request);
  for (v1::ProfileReply reply; reader->Read(&reply);) *json += reply.json();
  return reader->Finish();
}

class AdminDoorTest : public ApiFixture {
 protected:
  void SetUp() override {
    options_.http_port = options_.grpc_port = 0;
    options_.admin_address = "127.0.0.1:0";
    server_ = std::make_unique<ApiServer>(options_, model_);
    server_->Watch(&watch_);
    ASSERT_TRUE(server_->Start(&engine_).ok());
  }
  std::string Error(const std::string& address) {
    std::string message(AdminDoor(&watch_).Start(address).message());
    EXPECT_THAT(message, Not(HasSubstr("\n")));
    return message;
  }

  FakeWatch watch_;
};

TEST_F(AdminDoorTest, AnswersOnItsOwnAddressAndNotOnThePublicOne) {
  std::string json;
  EXPECT_TRUE(Profile(server_->admin_address(), &json).ok());
  EXPECT_EQ(json.size(), 3u << 20);
  EXPECT_EQ(Profile(server_->admin_address(), &json, 0).error_message(),
            "steps: expected 1 or more");
  const std::string open = "127.0.0.1:" + std::to_string(server_->grpc_port());
  EXPECT_EQ(Profile(open, &json).error_code(), grpc::StatusCode::UNIMPLEMENTED);
  // Nor does it offer anything else.
  grpc::ClientContext context;
  grpc::health::v1::HealthCheckResponse health;
  EXPECT_EQ(grpc::health::v1::Health::NewStub(Channel(server_->admin_address()))
                ->Check(&context, {}, &health)
                .error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
  server_->Stop(0);
  EXPECT_EQ(server_->admin_address(), "");
}

TEST_F(AdminDoorTest, AUnixSocketIsForThisUserAlone) {
  const CertificateFolder folder;  // any folder of its own
  const std::string path = folder.Path("admin");
  AdminDoor door(&watch_);
  ASSERT_TRUE(door.Start("unix:" + path).ok());
  struct stat found;
  ASSERT_EQ(stat(path.c_str(), &found), 0);
  EXPECT_EQ(found.st_mode & 0777u, 0600u);
  std::string json;
  EXPECT_TRUE(Profile("unix:" + path, &json).ok());
  EXPECT_THAT(Error("unix:" + path), HasSubstr("in use by another process"));
}

TEST_F(AdminDoorTest, WhatCannotBeListenedOnIsNamed) {
  for (const char* far : {"0.0.0.0:0", "[::]:0", "192.0.2.1:1", ":5"}) {
    EXPECT_THAT(Error(far), HasSubstr("never leaves this host")) << far;
  }
  for (const char* bad : {"127.0.0.1", "127.0.0.1:x", "127.0.0.1:65536", "localhost:-1"}) {
    EXPECT_THAT(Error(bad), HasSubstr("expected HOST:PORT or unix:PATH")) << bad;
  }
  EXPECT_THAT(Error("unix:"), HasSubstr("--admin-address unix:"));
  EXPECT_THAT(Error(server_->admin_address()), HasSubstr("--admin-address"));
}

}  // namespace
}  // namespace lockstep
