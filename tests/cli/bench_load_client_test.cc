// The load client against a service of our own, which answers as told.
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cli/bench/load_client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/inference.grpc.pb.h"

namespace lockstep {
namespace {

// Streams max_tokens tokens, two in each message after the first; refuses
// prompts that start with token 9, keeps those that start with 8 waiting, and
// ends those that start with 7 a token early.
class Service final : public v1::Inference::Service {
 public:
  grpc::Status GenerateStream(grpc::ServerContext* context, const v1::GenerateRequest* request,
                              grpc::ServerWriter<v1::GenerateEvent>* writer) override {
    ++calls_;
    const uint32_t first = request->token_ids().ids(0);
    if (first == 9) return {grpc::StatusCode::RESOURCE_EXHAUSTED, "full"};
    v1::GenerateEvent event;
    event.mutable_prompt()->set_prompt_tokens(
        static_cast<uint32_t>(request->token_ids().ids_size()));
    event.mutable_prompt()->set_cached_tokens(2);
    writer->Write(event);
    while (first == 8 && !context->IsCancelled()) std::this_thread::yield();
    uint32_t left = request->sampling().max_tokens() - (first == 7 ? 1 : 0);
    for (bool one = true; left > 0 && !context->IsCancelled(); one = false) {
      const uint32_t tokens = std::min(left, one ? 1u : 2u);
      v1::Chunk* const chunk = event.mutable_chunk();
      chunk->clear_token_ids();
      for (uint32_t i = 0; i < tokens; ++i) chunk->add_token_ids(i);
      writer->Write(event);
      left -= tokens;
    }
    event.mutable_finish()->set_completion_tokens(request->sampling().max_tokens());
    writer->Write(event);
    return grpc::Status::OK;
  }

  int calls() const { return calls_; }

 private:
  std::atomic<int> calls_ = 0;
};

class LoadClientTest : public ::testing::Test {
 protected:
  void SetUp() override {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
  }
  std::string Address() const { return absl::StrCat("127.0.0.1:", port_); }

  static v1::GenerateRequest Request(uint32_t first, uint32_t tokens) {
    v1::GenerateRequest request;
    request.mutable_token_ids()->add_ids(first);
    request.mutable_token_ids()->add_ids(1);
    request.mutable_token_ids()->add_ids(2);
    request.mutable_sampling()->set_max_tokens(tokens);
    return request;
  }

  Service service_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

TEST_F(LoadClientTest, NotesEveryTokenOfEveryStreamInOrder) {
  LoadClient client(Address(), 2);
  ASSERT_TRUE(client.Connect(10'000).ok());
  std::vector<v1::GenerateRequest> requests;
  for (uint32_t i = 0; i < 20; ++i) requests.push_back(Request(1, 10 + i));
  const std::vector<RequestLog> logs = client.RunAll(requests);
  ASSERT_EQ(logs.size(), 20u);
  for (uint32_t i = 0; i < 20; ++i) {
    const RequestLog& log = logs[i];
    EXPECT_TRUE(log.ok()) << log.status;
    EXPECT_EQ(log.output_tokens, 10 + i);
    EXPECT_EQ(log.prompt_tokens, 3u);
    EXPECT_EQ(log.cached_tokens, 2u);
    EXPECT_EQ(log.arrivals.front().tokens, 1u);
    EXPECT_LE(log.due_ns, log.arrivals.front().ns);
    EXPECT_LE(log.arrivals.back().ns, log.end_ns);
    for (size_t j = 1; j < log.arrivals.size(); ++j) {
      EXPECT_LE(log.arrivals[j - 1].ns, log.arrivals[j].ns);
    }
  }
}

TEST_F(LoadClientTest, ARefusalIsAStatusAndSparesTheOthers) {
  LoadClient client(Address(), 1);
  const std::vector<RequestLog> logs = client.RunAll({Request(1, 3), Request(9, 3), Request(1, 3)});
  EXPECT_TRUE(logs[0].ok());
  EXPECT_TRUE(absl::IsResourceExhausted(logs[1].status));
  EXPECT_EQ(logs[1].output_tokens, 0u);
  EXPECT_TRUE(logs[2].ok());
}

TEST_F(LoadClientTest, AnAnswerPastEndingTokensIsWholeOrAnError) {
  LoadClient client(Address(), 1);
  std::vector<v1::GenerateRequest> requests = {Request(1, 5), Request(7, 5), Request(7, 5)};
  for (size_t i : {0, 1}) requests[i].mutable_sampling()->set_ignore_eos(true);
  const std::vector<RequestLog> logs = client.RunAll(requests);
  EXPECT_TRUE(logs[0].ok());
  EXPECT_TRUE(absl::IsDataLoss(logs[1].Outcome())) << logs[1].Outcome();
  EXPECT_TRUE(logs[2].ok());  // may end where it likes
}

TEST_F(LoadClientTest, DueTimeIsTheCallersWhenGiven) {
  LoadClient client(Address(), 1);
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  RequestLog kept;
  client.Send(Request(1, 2), 12345, [&](RequestLog log) {
    std::lock_guard lock(mutex);
    kept = std::move(log);
    done = true;
    changed.notify_one();
  });
  std::unique_lock lock(mutex);
  ASSERT_TRUE(changed.wait_for(lock, std::chrono::seconds(60), [&] { return done; }));
  EXPECT_EQ(kept.due_ns, 12345);
  EXPECT_GT(kept.sent_ns, 12345);
}

TEST_F(LoadClientTest, CancelEndsStreamsThatWait) {
  LoadClient client(Address(), 2);
  std::thread canceller([&] {
    while (service_.calls() < 3) std::this_thread::yield();
    client.Cancel();
  });
  const std::vector<RequestLog> logs = client.RunAll({Request(8, 2), Request(8, 2), Request(8, 2)});
  canceller.join();
  for (const RequestLog& log : logs) EXPECT_TRUE(absl::IsCancelled(log.status)) << log.status;
  EXPECT_TRUE(absl::IsCancelled(client.RunAll({Request(1, 2)})[0].status));
}

TEST_F(LoadClientTest, GoesWithStreamsUnderWay) {
  std::atomic<int> ended = 0;
  {
    LoadClient client(Address(), 2);
    for (int i = 0; i < 4; ++i) client.Send(Request(8, 2), 0, [&](RequestLog) { ++ended; });
  }
  EXPECT_EQ(ended, 4);
}

TEST_F(LoadClientTest, ADoneCallbackMaySendTheNext) {
  LoadClient client(Address(), 2);
  std::mutex mutex;
  std::condition_variable changed;
  int left = 50;
  LoadClient::Done done = [&](RequestLog log) {
    EXPECT_TRUE(log.ok());
    std::lock_guard lock(mutex);
    if (--left > 0) client.Send(Request(1, 2), 0, done);
    changed.notify_one();
  };
  client.Send(Request(1, 2), 0, done);
  std::unique_lock lock(mutex);
  EXPECT_TRUE(changed.wait_for(lock, std::chrono::seconds(60), [&] { return left == 0; }));
}

TEST(LoadClient, NobodyThereIsUnavailable) {
  LoadClient client("127.0.0.1:1", 1);
  EXPECT_TRUE(absl::IsUnavailable(client.Connect(100)));
  const std::vector<RequestLog> logs = client.RunAll({v1::GenerateRequest()});
  EXPECT_TRUE(absl::IsUnavailable(logs[0].status)) << logs[0].status;
}

TEST(LanesFor, IsOneForThirtyTwoStreamsUpToTheProcessors) {
  EXPECT_EQ(LanesFor(1), 1);
  EXPECT_EQ(LanesFor(32), 1);
  EXPECT_LE(LanesFor(33), 2);
  EXPECT_GE(LanesFor(100000), 1);
}

}  // namespace
}  // namespace lockstep
