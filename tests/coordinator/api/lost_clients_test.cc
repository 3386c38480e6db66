// Clients whose connection dies without a word, in the middle of an answer: each
// door notices and cancels. And the pings that may and may not come from clients.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <future>
#include <memory>
#include <string>

#include "proto/inference.grpc.pb.h"
#include "tests/coordinator/api/api_fixture.h"
#include "tests/coordinator/api/frozen_relay.h"

namespace lockstep {
namespace {

using nlohmann::json;

constexpr size_t kPingFrameBytes = 17;

enum class Loss { kFrozen, kVanished };

class LostClients : public ApiFixture {
 protected:
  void SetUp() override { engine_.Hold(); }

  void Lose(Loss how) { how == Loss::kFrozen ? relay_->Freeze() : relay_->Vanish(); }

  std::unique_ptr<FrozenRelay> relay_;
};

class LostGrpcClients : public LostClients {
 protected:
  // A stream through the relay that has had its first token.
  void Begin(const grpc::ChannelArguments& arguments = {}) {
    Open();
    relay_ = std::make_unique<FrozenRelay>(server_->grpc_port());
    stub_ = v1::Inference::NewStub(
        grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(relay_->port()),
                                  grpc::InsecureChannelCredentials(), arguments));
    v1::GenerateRequest request;
    request.set_text("x");
    request.mutable_sampling()->set_max_tokens(40);
    reader_ = stub_->GenerateStream(&context_, request);
    ASSERT_TRUE(engine_.WaitSubmitted(1));
    engine_.Tick(1);
    ASSERT_TRUE(reader_->Read(&event_));  // the prompt's
    ASSERT_TRUE(reader_->Read(&event_));
  }

  // Reads meanwhile, as clients do: a client's library answers pings when it is polled.
  std::future<bool> ReadOn() {
    return std::async(std::launch::async, [this] { return reader_->Read(&event_); });
  }

  std::unique_ptr<v1::Inference::Stub> stub_;
  grpc::ClientContext context_;
  v1::GenerateEvent event_;
  std::unique_ptr<grpc::ClientReader<v1::GenerateEvent>> reader_;
};

class EveryLoss : public LostGrpcClients, public ::testing::WithParamInterface<Loss> {};

TEST_P(EveryLoss, OfAStreamsClientIsNoticedByPings) {
  options_.grpc_pings = {.interval_ms = 100, .timeout_ms = 1500};
  Begin();
  std::future<bool> more = ReadOn();
  // An idle stream whose client answers is let live, however long.
  ASSERT_TRUE(relay_->WaitFromServer(relay_->from_server() + 6 * kPingFrameBytes));
  EXPECT_TRUE(engine_.cancelled().empty());
  engine_.Tick(1);
  EXPECT_TRUE(more.get());

  more = ReadOn();
  Lose(GetParam());
  EXPECT_TRUE(engine_.WaitCancelled(1));
  EXPECT_TRUE(engine_.WaitIdle());
  context_.TryCancel();
  EXPECT_FALSE(more.get());
}

INSTANTIATE_TEST_SUITE_P(Lost, EveryLoss, ::testing::Values(Loss::kFrozen, Loss::kVanished),
                         [](const auto& each) {
                           return each.param == Loss::kFrozen ? "Frozen" : "Vanished";
                         });

// The channel's own keepalive, as clients behind balancers set it.
TEST_F(LostGrpcClients, OrdinaryPingsOfAClientCutNothing) {
  options_.grpc_pings.client_interval_ms = 100;
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 200);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  Begin(arguments);
  std::future<bool> more = ReadOn();
  ASSERT_TRUE(relay_->WaitFromClient(relay_->from_client() + 6 * kPingFrameBytes));
  engine_.Tick(1);
  EXPECT_TRUE(more.get());
  context_.TryCancel();
  EXPECT_TRUE(engine_.WaitIdle());
}

// HTTP/2 by hand: a connection without calls, and pings on it.
class ClientPings : public LostClients {
 protected:
  void Connect() {
    Open();
    client_ = std::make_unique<RawClient>(server_->grpc_port());
    client_->Send(std::string("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") +
                  std::string("\0\0\0\x04\0\0\0\0\0", 9));  // SETTINGS, none
  }
  static std::string PingFrame(char flags, const std::string& eight) {
    return std::string("\0\0\x08\x06", 4) + flags + std::string(4, '\0') + eight;
  }

  std::unique_ptr<RawClient> client_;
};

TEST_F(ClientPings, TooManyEndTheConnectionAndSayWhy) {
  Connect();
  for (int i = 0; i < 8; ++i) client_->Send(PingFrame(0, "eagerly!"));
  // GOAWAY: the last stream's id, the code, the reason.
  EXPECT_TRUE(client_->WaitFor(std::string("\0\0\0\x0btoo_many_pings", 18)));
}

TEST_F(ClientPings, AtTheIntervalThatIsAllowedAreAnswered) {
  options_.grpc_pings.client_interval_ms = 100;
  Connect();
  for (int i = 0; i < 8; ++i) {
    const std::string eight = "number " + std::to_string(i);
    client_->Send(PingFrame(0, eight));
    ASSERT_TRUE(client_->WaitFor(PingFrame(1, eight))) << i;
    EXPECT_FALSE(client_->Readable(110)) << i;  // no GOAWAY follows
  }
}

class LostHttpClients : public LostClients {
 protected:
  void Begin(const json& body) {
    Open();
    relay_ = std::make_unique<FrozenRelay>(http());
    client_ = std::make_unique<RawClient>(relay_->port());
    client_->Send(PostBytes("/v1/completions", body.dump()));
    ASSERT_TRUE(engine_.WaitSubmitted(1));
  }

  std::unique_ptr<RawClient> client_;
};

// Whoever still acknowledges and reads nothing is noticed when no room is left.
TEST_F(LostHttpClients, AFrozenStreamIsCutOffOnceItTakesNothing) {
  options_.write_timeout_ms = 300;
  model_.max_model_len = 100'000;
  // Text alone would be joined until the client takes it, and stay small.
  Begin({{"prompt", {5}}, {"stream", true}, {"max_tokens", 90'000}, {"logprobs", 10}});
  engine_.Tick(1);
  ASSERT_TRUE(client_->WaitFor("data: "));
  Lose(Loss::kFrozen);
  engine_.Tick(20'000);
  EXPECT_TRUE(engine_.WaitCancelled(1));
  EXPECT_TRUE(engine_.WaitIdle());
}

// Its pings are never acknowledged, though the kernel takes each of them.
TEST_F(LostHttpClients, AStreamWhoseClientVanishedIsCutOff) {
  options_.write_timeout_ms = 2000;
  options_.ping_interval_ms = 100;
  Begin({{"prompt", {5}}, {"stream", true}, {"max_tokens", 40}});
  engine_.Tick(1);
  ASSERT_TRUE(client_->WaitFor(": ping\n\n"));
  Lose(Loss::kVanished);
  EXPECT_TRUE(engine_.WaitCancelled(1));
  EXPECT_TRUE(engine_.WaitIdle());
}

// Nothing is under way to be acknowledged: TCP itself has to ask.
TEST_F(LostHttpClients, AWaitingClientThatVanishedIsCancelled) {
  options_.write_timeout_ms = 2000;
  Begin({{"prompt", {5}}, {"max_tokens", 40}});
  Lose(Loss::kVanished);
  EXPECT_TRUE(engine_.WaitCancelled(1));
  EXPECT_TRUE(engine_.WaitIdle());
}

TEST_F(LostHttpClients, AWaitingClientThatLivesIsLetWait) {
  options_.write_timeout_ms = 1000;
  Begin({{"prompt", {5}}, {"max_tokens", 40}});
  EXPECT_FALSE(client_->Readable(2500));  // several of TCP's questions
  EXPECT_TRUE(engine_.cancelled().empty());
  engine_.Release();
  EXPECT_EQ(client_->Read().status, 200);
}

}  // namespace
}  // namespace lockstep
