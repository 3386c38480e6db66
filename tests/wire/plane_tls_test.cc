// The workers' plane under TLS: both real ends, every pair of certificates that
// must not pass, and certificates that are renewed while a stream is open.
#include "wire/plane_tls.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/group/attach_server.h"
#include "tests/coordinator/api/tls_testing.h"
#include "worker/grpc_plane.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using worker::v1::CoordinatorMessage;
using worker::v1::WorkerMessage;

constexpr auto kPatience = std::chrono::seconds(30);
constexpr char kCoordinator[] = "DNS:lockstep-coordinator";
constexpr char kWorker[] = "DNS:lockstep-worker";

// Counts who is let in and what is said.
class Listener : public AttachServer::Handler {
 public:
  void OnOpen(StreamId) override {
    const std::lock_guard lock(mutex_);
    ++opened_;
  }
  void OnMessage(StreamId, const WorkerMessage&) override {
    const std::lock_guard lock(mutex_);
    ++heard_;
    changed_.notify_all();
  }
  void OnGarbage(StreamId) override {}
  void OnClosed(StreamId) override {}

  bool WaitHeard(int count) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kPatience, [&] { return heard_ >= count; });
  }
  int opened() {
    const std::lock_guard lock(mutex_);
    return opened_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int opened_ = 0, heard_ = 0;
};

class PlaneTlsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    files_.MakeAuthority("ca");
    files_.MakeAuthority("other");
    files_.MakeCertificate("coordinator", "ca", 1, kCoordinator);
    files_.MakeCertificate("worker", "ca", 1, kWorker);
  }

  TlsFiles Files(const std::string& name, const std::string& authority = "ca") const {
    return {files_.Path(name + ".pem"), files_.Path(name + ".key"),
            files_.Path(authority + ".pem")};
  }
  void Listen(const TlsFiles& tls, const std::string& address = "127.0.0.1:0") {
    server_.reset();
    auto server = AttachServer::Listen(address, &listener_, tls);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }
  absl::StatusOr<std::shared_ptr<PlaneStream>> Dial(const TlsFiles& tls) {
    return MakeGrpcPlane(server_->address(), false, tls)->Dial([] { return false; });
  }
  // Says one thing and is heard.
  bool Speaks(PlaneStream* stream) {
    WorkerMessage message;
    message.mutable_heartbeat();
    return stream->Write(message) && listener_.WaitHeard(++said_);
  }
  bool Passes(const TlsFiles& tls) {
    const auto stream = Dial(tls);
    return stream.ok() && Speaks(stream->get());
  }
  // Why a worker with these is not let in: one line, and nobody was.
  std::string Refusal(const TlsFiles& tls) {
    const int before = listener_.opened();
    const auto stream = Dial(tls);
    std::string why(stream.status().message());
    if (stream.ok()) {
      CoordinatorMessage message;
      EXPECT_FALSE((*stream)->Read(&message));
      why = (*stream)->Ending();
    }
    EXPECT_THAT(why, Not(HasSubstr("\n")));
    EXPECT_EQ(listener_.opened(), before) << why;
    return why;
  }

  CertificateFolder files_;
  Listener listener_;
  int said_ = 0;
  std::unique_ptr<AttachServer> server_;  // before listener_ goes
};

TEST_F(PlaneTlsTest, TheRightCertificatesPassOverTcpAndUnixSockets) {
  for (const std::string& address :
       {std::string("127.0.0.1:0"), absl::StrCat("unix:", files_.Path("plane"))}) {
    Listen(Files("coordinator"), address);
    EXPECT_TRUE(Passes(Files("worker"))) << address;
  }
}

TEST_F(PlaneTlsTest, OneCertificateMayHaveBothRoles) {
  files_.MakeCertificate("both", "ca", 1, absl::StrCat(kCoordinator, ",", kWorker));
  Listen(Files("both"));
  EXPECT_TRUE(Passes(Files("both")));
}

TEST_F(PlaneTlsTest, WorkersWithoutTheRightCertificateAreRefused) {
  files_.MakeCertificate("stranger", "other", 1, kWorker);
  files_.MakeCertificate("late", "ca", -1, kWorker);
  files_.MakeCertificate("door", "ca");  // of a good authority, for something else
  Listen(Files("coordinator"));
  EXPECT_THAT(Refusal({}), HasSubstr("it may want --worker-ssl-certfile"));
  EXPECT_THAT(Refusal(Files("stranger")), HasSubstr("do not fit"));
  EXPECT_THAT(Refusal(Files("late")), HasSubstr("expired"));
  EXPECT_THAT(Refusal(Files("door")), HasSubstr("it needs lockstep-worker"));
  EXPECT_THAT(Refusal(Files("coordinator")), HasSubstr("it needs lockstep-worker"));
  EXPECT_TRUE(Passes(Files("worker")));
}

TEST_F(PlaneTlsTest, CoordinatorsWithoutTheRightCertificateAreRefused) {
  files_.MakeCertificate("impostor", "other", 1, kCoordinator);
  for (const char* name : {"impostor", "worker"}) {
    Listen(Files(name));
    EXPECT_THAT(Refusal(Files("worker")), HasSubstr("do not fit")) << name;
  }
  Listen({});  // in plain text
  EXPECT_THAT(Refusal(Files("worker")), HasSubstr("do not fit"));
}

TEST_F(PlaneTlsTest, RenewedCertificatesCountAndOpenStreamsGoOn) {
  Listen(Files("coordinator"));
  const auto stream = Dial(Files("worker"));
  ASSERT_TRUE(stream.ok()) << stream.status();
  ASSERT_TRUE(Speaks(stream->get()));
  // Everything anew, the authority included.
  files_.MakeAuthority("next");
  files_.MakeCertificate("next_coordinator", "next", 1, kCoordinator);
  files_.MakeCertificate("next_worker", "next", 1, kWorker);
  files_.Replace("next_coordinator", "coordinator");
  files_.Replace("next_worker", "worker");
  files_.Replace("next", "ca");
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  bool renewed = false;
  while (!renewed && std::chrono::steady_clock::now() < deadline) {
    const auto next = Dial(Files("worker"));
    renewed = next.ok() && Speaks(next->get());
  }
  EXPECT_TRUE(renewed);
  EXPECT_TRUE(Speaks(stream->get()));
}

TEST_F(PlaneTlsTest, WhatCannotServeIsNamed) {
  const auto error = [&](const TlsFiles& tls) {
    return std::string(AttachServer::Listen("127.0.0.1:0", &listener_, tls).status().message());
  };
  TlsFiles tls = Files("coordinator");
  tls.client_ca.clear();
  EXPECT_THAT(error(tls), HasSubstr("needs --worker-ssl-ca-certs"));
  tls = Files("coordinator");
  tls.key = files_.Path("worker.key");
  EXPECT_THAT(error(tls), HasSubstr("is not the key of --worker-ssl-certfile"));
  tls.key.clear();
  EXPECT_THAT(error(tls), HasSubstr("--worker-ssl-certfile: needs --worker-ssl-keyfile"));
  Listen(Files("coordinator"));
  EXPECT_THAT(Refusal(Files("none")), HasSubstr("--worker-ssl-certfile " + files_.Path("none")));
}

}  // namespace
}  // namespace lockstep
