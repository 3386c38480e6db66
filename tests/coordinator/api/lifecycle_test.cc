// Connections over time: clients that leave, wait, drip, pipeline or never
// read; draining and stopping.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <deque>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "coordinator/api/http/http_server.h"
#include "tests/coordinator/api/api_fixture.h"

namespace lockstep {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using Clock = std::chrono::steady_clock;

class Lifecycle : public ApiFixture {
 protected:
  std::string Streaming(uint32_t max_tokens = 60) const {
    return PostBytes("/v1/completions",
                     json({{"prompt", {5}}, {"stream", true}, {"max_tokens", max_tokens}}).dump());
  }
  std::string Waiting() const { return PostBytes("/v1/completions", R"({"prompt":[5]})"); }
};

TEST_F(Lifecycle, AClientThatLeavesAStreamIsCancelled) {
  engine_.Hold();
  for (const bool reset : {false, true}) {
    RawClient client(http());
    client.Send(Streaming());
    ASSERT_TRUE(engine_.WaitSubmitted(reset ? 2 : 1));
    engine_.Tick(1);
    ASSERT_TRUE(client.WaitFor("data: "));
    // No token is on its way: it is the leaving itself that is noticed.
    reset ? client.Reset() : client.Close();
    EXPECT_TRUE(engine_.WaitCancelled(reset ? 2 : 1));
    EXPECT_TRUE(engine_.WaitIdle());
  }
}

TEST_F(Lifecycle, AClientThatLeavesWhileWaitingIsCancelled) {
  engine_.Hold();
  RawClient client(http());
  client.Send(Waiting());
  ASSERT_TRUE(engine_.WaitSubmitted(1));
  client.Close();
  EXPECT_TRUE(engine_.WaitCancelled(1));
}

// None of the answers would end by itself.
TEST_F(Lifecycle, LeavingAtEveryChunkIsNoticed) {
  engine_.Hold();
  engine_.script = [](const Request&) {
    Script script;
    for (TokenId token = 70; token < 130; ++token) script.tokens[0].push_back(token);
    return script;
  };
  const std::string request = PostBytes(
      "/v1/completions", R"({"prompt":[5],"stream":true,"max_tokens":60,"return_token_ids":true})");
  for (uint32_t chunks = 0; chunks < 59; ++chunks) {
    RawClient client(http());
    client.Send(request);
    ASSERT_TRUE(engine_.WaitSubmitted(chunks + 1));
    engine_.Tick(chunks);
    if (chunks > 0) {
      ASSERT_TRUE(client.WaitFor("\"token_ids\":[" + std::to_string(69 + chunks) + "]"));
    }
    chunks % 2 == 0 ? client.Close() : client.Reset();
    ASSERT_TRUE(engine_.WaitCancelled(chunks + 1)) << chunks;
  }
  EXPECT_TRUE(engine_.WaitIdle());
}

TEST_F(Lifecycle, ABatchOfALeavingClientIsCancelledWhole) {
  engine_.Hold();
  RawClient client(http());
  client.Send(PostBytes("/v1/completions", R"({"prompt":[[5],[6],[7]],"n":2})"));
  ASSERT_TRUE(engine_.WaitSubmitted(3));
  client.Close();
  EXPECT_TRUE(engine_.WaitCancelled(3));
}

TEST_F(Lifecycle, ConnectionsAreKept) {
  AnswerWith("hi");
  RawClient client(http());
  for (int i = 0; i < 3; ++i) {
    client.Send("GET /version HTTP/1.1\r\nHost: x\r\n\r\n");
    const RawResponse version = client.Read();
    EXPECT_EQ(version.status, 200);
    EXPECT_EQ(version.headers.at("connection"), "keep-alive");
    client.Send(Streaming());
    EXPECT_THAT(client.Read().body, HasSubstr("[DONE]"));
    client.Send(PostBytes("/v1/completions", "not json"));
    EXPECT_EQ(client.Read().status, 400);
  }
  client.Send("GET /version HTTP/1.1\r\nConnection: close\r\n\r\n");
  EXPECT_EQ(client.Read().headers.at("connection"), "close");
  EXPECT_EQ(client.ReadToEnd(), "");
}

TEST_F(Lifecycle, PipelinedRequestsAreAnsweredInOrder) {
  AnswerWith("hi");
  RawClient client(http());
  const auto get = [](const std::string& id) {
    return "GET /health HTTP/1.1\r\nx-request-id: " + id + "\r\n\r\n";
  };
  std::string all = get("0");
  for (int i = 1; i < 20; ++i) all += i % 3 == 0 ? Streaming() : get(std::to_string(i));
  client.Send(all);
  for (int i = 0; i < 20; ++i) {
    const RawResponse response = client.Read();
    ASSERT_EQ(response.status, 200) << i;
    if (i % 3 == 0 && i > 0) {
      EXPECT_THAT(response.body, HasSubstr("[DONE]"));
    } else {
      EXPECT_EQ(response.headers.at("x-request-id"), std::to_string(i));
    }
  }
}

TEST_F(Lifecycle, ARequestSentBehindARunningStreamWaits) {
  engine_.Hold();
  engine_.script = [](const Request&) { return Script{.tokens = {{70, 2}}}; };
  RawClient client(http());
  client.Send(Streaming());
  ASSERT_TRUE(engine_.WaitSubmitted(1));
  engine_.Tick(1);
  ASSERT_TRUE(client.WaitFor("data: "));
  client.Send("GET /version HTTP/1.1\r\n\r\n");
  engine_.Tick(1);
  EXPECT_THAT(client.Read().body, HasSubstr("[DONE]"));
  EXPECT_TRUE(client.Read().json().contains("version"));
  EXPECT_TRUE(engine_.cancelled().empty());
}

TEST_F(Lifecycle, BytesMayComeOneByOne) {
  AnswerWith("hi");
  RawClient client(http());
  for (const char c : PostBytes("/v1/completions", R"({"prompt":"x"})")) {
    client.Send(std::string(1, c));
  }
  EXPECT_EQ(client.Read().status, 200);
}

TEST_F(Lifecycle, ChunkedBodiesAndExpectContinue) {
  AnswerWith("hi");
  RawClient client(http());
  client.Send(
      "POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
      "Transfer-Encoding: chunked\r\n\r\n5\r\n{\"pro\r\n3;ext=1\r\nmpt\r\n6\r\n\":\"x\"}\r\n"
      "0\r\nTrailer: y\r\n\r\n");
  EXPECT_EQ(client.Read().status, 200);
  client.Send(
      "POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
      "Expect: 100-continue\r\nContent-Length: 14\r\n\r\n");
  ASSERT_TRUE(client.WaitFor("HTTP/1.1 100 Continue\r\n\r\n"));
  client.Send(R"({"prompt":"x"})");
  EXPECT_EQ(client.Read().status, 200);
}

TEST_F(Lifecycle, Http10IsAnsweredAndClosed) {
  AnswerWith("hi");
  RawClient plain(http());
  plain.Send("GET /version HTTP/1.0\r\n\r\n");
  EXPECT_EQ(plain.Read().status, 200);
  EXPECT_EQ(plain.ReadToEnd(), "");
  engine_.Hold();
  RawClient stream(http());
  std::string request = Streaming();
  request.replace(request.find("HTTP/1.1"), 8, "HTTP/1.0");
  stream.Send(request);
  ASSERT_TRUE(engine_.WaitSubmitted(1));
  engine_.Tick(1);
  ASSERT_TRUE(stream.WaitFor("data: "));
  engine_.Release();
  const RawResponse response = stream.Read();
  EXPECT_FALSE(response.headers.contains("transfer-encoding"));
  EXPECT_EQ(Events(response.body).back(), "[DONE]");
}

TEST_F(Lifecycle, HeadHasNoBody) {
  RawClient client(http());
  client.Send("HEAD /health HTTP/1.1\r\n\r\nGET /version HTTP/1.1\r\n\r\n");
  const RawResponse head = client.Read(/*head_only=*/true);
  EXPECT_EQ(head.status, 200);
  EXPECT_NE(head.headers.at("content-length"), "0");
  EXPECT_TRUE(client.Read().json().contains("version"));
}

TEST_F(Lifecycle, HealthAndReadyTellTheTruth) {
  const auto codes = [&] {
    return std::pair(Get(http(), "/health").status, Get(http(), "/ready").status);
  };
  EXPECT_EQ(codes(), std::pair(200, 200));
  for (const EngineState state :
       {EngineState::kLoading, EngineState::kRecovering, EngineState::kDraining}) {
    engine_.SetState(state, absl::UnavailableError("rank 1"));
    EXPECT_EQ(codes(), std::pair(200, 503));
  }
  engine_.SetState(EngineState::kFailed, absl::UnavailableError("rank 1 did not come back"));
  EXPECT_EQ(codes(), std::pair(503, 503));
  EXPECT_EQ(Get(http(), "/health").error()["message"],
            "the server has failed: rank 1 did not come back");
  EXPECT_EQ(Complete({{"prompt", "x"}}).status, 503);
}

TEST_F(Lifecycle, RecoveringRequestsWait) {
  engine_.SetState(EngineState::kRecovering, absl::UnavailableError("rank 1"));
  EXPECT_EQ(Complete({{"prompt", "x"}}).status, 200);
}

TEST_F(Lifecycle, LeavingIsNotReadyAndServesStill) {
  AnswerWith("hi");
  server_->BeginLeaving();
  const RawResponse ready = Get(http(), "/ready");
  EXPECT_EQ(ready.status, 503);
  EXPECT_EQ(ready.error()["message"], "the server is about to end; send requests elsewhere");
  EXPECT_EQ(ready.headers.at("retry-after"), "1");
  EXPECT_EQ(Get(http(), "/health").status, 200);
  EXPECT_EQ(Complete({{"prompt", "x"}}).status, 200);
  server_->BeginDrain();
  EXPECT_EQ(Complete({{"prompt", "x"}}).status, 503);
}

TEST_F(Lifecycle, DrainingRefusesNewWorkAndFinishesOld) {
  engine_.Hold();
  AnswerWith("to the end");
  RawClient running(http());
  running.Send(Streaming());
  ASSERT_TRUE(engine_.WaitSubmitted(1));
  engine_.Tick(1);
  ASSERT_TRUE(running.WaitFor("data: "));
  server_->BeginDrain();
  for (const bool stream : {false, true}) {
    const RawResponse refused = Complete({{"prompt", "x"}, {"stream", stream}});
    EXPECT_EQ(refused.status, 503);
    EXPECT_EQ(refused.headers.at("retry-after"), "1");
    EXPECT_EQ(refused.error()["message"], "the server is draining");
  }
  EXPECT_EQ(Get(http(), "/health").status, 200);
  EXPECT_EQ(Get(http(), "/ready").status, 503);
  EXPECT_EQ(Get(http(), "/metrics").status, 200);
  engine_.Release();
  EXPECT_EQ(Events(running.Read().body).back(), "[DONE]");
}

TEST_F(Lifecycle, DrainingDoesNotHideThatTheServerHasFailed) {
  server_->BeginDrain();
  EXPECT_EQ(Get(http(), "/health").status, 200);
  engine_.SetState(EngineState::kFailed, absl::UnavailableError("rank 1 did not come back"));
  EXPECT_EQ(Get(http(), "/health").status, 503);
}

TEST_F(Lifecycle, StopLetsLastBytesOutAndCancelsTheRest) {
  engine_.Hold();
  RawClient running(http());
  running.Send(Streaming());
  RawClient idle(http());
  idle.Send("GET /version HTTP/1.1\r\n\r\n");
  EXPECT_EQ(idle.Read().status, 200);
  ASSERT_TRUE(engine_.WaitSubmitted(1));
  server_->Stop(50);
  EXPECT_TRUE(engine_.WaitCancelled(1));
  EXPECT_TRUE(running.ReadToEnd().has_value());
  EXPECT_EQ(idle.ReadToEnd(), "");
}

TEST_F(Lifecycle, ManyClientsAtOnce) {
  AnswerWith("a few words for everybody");
  std::atomic<int> good = 0;
  constexpr int kThreads = 16;
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 10; ++i) {
        RawClient client(http());
        client.Send(Streaming());
        std::string text;
        for (const std::string& event : Events(client.Read().body)) {
          if (event != "[DONE]") text += json::parse(event)["choices"][0]["text"];
        }
        if (text == "a few words for everybody") ++good;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, 160);
}

// Clients that never read cost the memory of their answers, once, and nobody else
// anything. The answers are more than sockets hold, the clients more than the
// server's threads.
TEST_F(Lifecycle, ClientsThatNeverReadHoldUpNobody) {
  model_.max_model_len = 100'000;
  Open();
  engine_.Hold();
  std::deque<RawClient> deaf;
  for (uint32_t i = 0; i < 4; ++i) {
    deaf.emplace_back(http()).Send(PostBytes(
        "/v1/completions", R"({"prompt":[5],"stream":true,"max_tokens":90000,"logprobs":10})"));
    ASSERT_TRUE(engine_.WaitSubmitted(i + 1));
  }
  engine_.Tick(90'000);
  EXPECT_TRUE(engine_.WaitIdle());
  engine_.Release();
  for (int i = 0; i < 16; ++i) ASSERT_EQ(Complete({{"prompt", "x"}}).status, 200) << i;
  // Nor is anything of them lost.
  EXPECT_EQ(Events(deaf.front().Read().body).back(), "[DONE]");
}

// The server alone, with short times.
class SlowClients : public ::testing::Test, public HttpHandler {
 protected:
  std::shared_ptr<Exchange> Handle(HttpRequest request) override {
    if (request.path == "/endless") return std::make_shared<Endless>(&abandoned_);
    if (request.path == "/whole") return std::make_shared<WholeStream>();
    return std::make_shared<ReadyExchange>(HttpReply{.headers = {}, .body = request.body});
  }
  HttpReply RefuseMalformed(int status, const std::string& message) override {
    return {.status = status, .headers = {}, .body = message};
  }

  // A stream that is complete before anybody asks for its first part.
  class WholeStream : public Exchange {
   public:
    std::optional<Part> Next() override {
      return Part{.head = HttpReply{.headers = {}, .body = "data: [DONE]\n\n"},
                  .body = {},
                  .last = true,
                  .stream = true};
    }
    void SetWaker(std::function<void()>) override {}
    void Abandon() override {}
  };

  // Always has more to say.
  class Endless : public Exchange {
   public:
    explicit Endless(std::atomic<int>* abandoned) : abandoned_(abandoned) {}
    std::optional<Part> Next() override {
      const bool first = !std::exchange(begun_, true);
      Part part{.head = {}, .body = std::string(1 << 20, 'x')};
      if (first) part.head = HttpReply{.content_type = "text/plain", .headers = {}, .body = {}};
      return part;
    }
    void SetWaker(std::function<void()>) override {}
    void Abandon() override { ++*abandoned_; }

   private:
    std::atomic<int>* const abandoned_;
    bool begun_ = false;
  };

  void Open(HttpServerOptions options) {
    options.port = 0;
    server_ = std::make_unique<HttpServer>(options, this);
    ASSERT_TRUE(server_->Start().ok());
  }
  int port() const { return server_->port(); }

  std::atomic<int> abandoned_ = 0;
  std::unique_ptr<HttpServer> server_;
};

TEST_F(SlowClients, AStreamIsFramedAsOneHoweverFastItCame) {
  Open({});
  RawClient client(port());
  for (int i = 0; i < 2; ++i) {  // the connection is kept
    client.Send("GET /whole HTTP/1.1\r\n\r\n");
    const RawResponse response = client.Read();
    EXPECT_EQ(response.headers.at("transfer-encoding"), "chunked");
    EXPECT_FALSE(response.headers.contains("content-length"));
    EXPECT_EQ(response.body, "data: [DONE]\n\n");
  }
  RawClient old(port());
  old.Send("GET /whole HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
  const RawResponse response = old.Read();
  EXPECT_FALSE(response.headers.contains("transfer-encoding"));
  EXPECT_FALSE(response.headers.contains("content-length"));
  EXPECT_EQ(response.headers.at("connection"), "close");
  EXPECT_EQ(response.body, "data: [DONE]\n\n");
}

// One after another they are more than may be held at once.
TEST_F(SlowClients, LargeBodiesGiveTheirPlacesBack) {
  Open({});
  const std::string body(1 << 20, 'x');
  for (int i = 0; i < 40; ++i) ASSERT_EQ(Post(port(), "/", body).status, 200) << i;
}

TEST_F(SlowClients, ADrippedHeaderTimesOut) {
  Open({.header_timeout_ms = 200});
  RawClient client(port());
  client.Send("GET / HTTP/1.1\r\n");
  const Clock::time_point began = Clock::now();
  while (!client.Readable(5) && Clock::now() - began < std::chrono::seconds(20)) {
    client.Send("X: y\r\n");
  }
  EXPECT_EQ(client.Read().status, 408);
  EXPECT_LT(Clock::now() - began, std::chrono::seconds(10));
}

TEST_F(SlowClients, ADrippedBodyTimesOut) {
  Open({.body_timeout_ms = 200});
  RawClient client(port());
  client.Send("POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\nabc");
  EXPECT_EQ(client.Read().status, 408);
}

TEST_F(SlowClients, AnIdleConnectionIsClosedWithoutAWord) {
  Open({.idle_timeout_ms = 100});
  RawClient silent(port());
  EXPECT_EQ(silent.ReadToEnd(), "");
  RawClient once(port());
  once.Send("GET / HTTP/1.1\r\n\r\n");
  EXPECT_EQ(once.Read().status, 200);
  EXPECT_EQ(once.ReadToEnd(), "");
}

TEST_F(SlowClients, AClientThatNeverReadsIsGivenUp) {
  Open({.write_timeout_ms = 200});
  RawClient deaf(port());
  deaf.Send("GET /endless HTTP/1.1\r\n\r\n");
  const Clock::time_point deadline = Clock::now() + std::chrono::seconds(20);
  while (abandoned_ == 0 && Clock::now() < deadline) std::this_thread::yield();
  EXPECT_EQ(abandoned_, 1);
}

TEST_F(SlowClients, ConnectionsBeyondTheCapAreTurnedAway) {
  Open({.max_connections = 2});
  RawClient one(port()), two(port());
  for (RawClient* client : {&one, &two}) {
    client->Send("GET /endless HTTP/1.1\r\n\r\n");
    EXPECT_TRUE(client->WaitFor("xxx"));
  }
  RawClient three(port());
  EXPECT_EQ(three.Read().status, 503);
  one.Close();
  // The place is free as soon as the server has seen it.
  const Clock::time_point deadline = Clock::now() + std::chrono::seconds(20);
  int status = 503;
  while (status != 200 && Clock::now() < deadline) status = Get(port(), "/").status;
  EXPECT_EQ(status, 200);
}

TEST_F(SlowClients, WhoIsIdleGivesUpItsPlace) {
  Open({.max_connections = 2});
  RawClient busy(port()), idle(port());
  busy.Send("GET /endless HTTP/1.1\r\n\r\n");
  ASSERT_TRUE(busy.WaitFor("xxx"));
  idle.Send("GET / HTTP/1.1\r\n\r\n");
  EXPECT_EQ(idle.Read().status, 200);
  // It is idle as soon as the server has seen that it asks nothing more.
  const Clock::time_point deadline = Clock::now() + std::chrono::seconds(20);
  int status = 503;
  while (status != 200 && Clock::now() < deadline) status = Get(port(), "/").status;
  EXPECT_EQ(status, 200);
  EXPECT_EQ(idle.ReadToEnd(), "");
  EXPECT_EQ(abandoned_, 0);
}

TEST_F(SlowClients, StopEndsEverything) {
  Open({});
  RawClient endless(port()), idle(port()), half(port());
  endless.Send("GET /endless HTTP/1.1\r\n\r\n");
  ASSERT_TRUE(endless.WaitFor("xxx"));
  half.Send("GET / HT");
  server_->Stop(0);
  EXPECT_TRUE(idle.ReadToEnd().has_value());
  EXPECT_EQ(half.Read().status, 0);
}

}  // namespace
}  // namespace lockstep
