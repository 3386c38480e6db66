// Hundreds of streams at once through both doors, and every answer compared with
// the one that its request got when it was alone: none lost, none mixed up.
//
//   load_test                                             64 streams, 5 s
//   LOCKSTEP_LOAD_STREAMS=512 LOCKSTEP_LOAD_SECONDS=60 load_test
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cli/bench/load_client.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/integration/test_server.h"
#include "tests/load/http_streams.h"
#include "tests/load/load_options.h"

namespace lockstep {
namespace {

using std::chrono::steady_clock;

constexpr int kCases = 48;

// One request as each door takes it, and its answer when nobody else asked.
struct Case {
  v1::GenerateRequest request;
  std::string body;
  std::string text;
  std::vector<uint32_t> token_ids;
};

// Every second one greedy, the others sampled from a seed of their own.
Case MakeCase(int i) {
  Case made;
  const std::string prompt = absl::StrCat("Story ", i, " of ", i * 37 % 101, ": once");
  const int max_tokens = 8 + i * 5 % 41;
  made.request.set_text(prompt);
  v1::SamplingParams& sampling = *made.request.mutable_sampling();
  sampling.set_max_tokens(static_cast<uint32_t>(max_tokens));
  sampling.set_ignore_eos(true);
  sampling.set_temperature(i % 2 == 0 ? 0.0f : 1.0f);
  sampling.set_seed(1000 + i);
  made.body = nlohmann::json{{"prompt", prompt},        {"max_tokens", max_tokens},
                             {"ignore_eos", true},      {"temperature", i % 2 == 0 ? 0 : 1},
                             {"seed", 1000 + i},        {"stream", true},
                             {"return_token_ids", true}}
                  .dump();
  return made;
}

// Streams that start over until the time is up, each answer checked.
class Load {
 public:
  Load(TestServer* served, const std::vector<Case>* cases, int streams)
      : cases_(*cases),
        grpc_(served->server().address(), LanesFor(streams)),
        http_(served->server().http_port(), HttpStreams::Reading::kKeep),
        streams_(streams) {}

  void Run(double seconds) {
    until_ = steady_clock::now() + std::chrono::duration_cast<steady_clock::duration>(
                                       std::chrono::duration<double>(seconds));
    live_ = streams_;
    for (int i = 0; i < streams_; ++i) Next(i);
  }
  // False: some stream has not ended.
  bool AwaitEnd(int seconds) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, Bound(seconds), [&] { return live_ == 0; });
  }

  std::atomic<int64_t> sent = 0, right = 0, different = 0, lost = 0, tokens = 0;
  // What the first wrong answer was.
  std::string Complaint() {
    const std::lock_guard lock(mutex_);
    return complaint_;
  }

 private:
  void Next(int stream) {
    if (steady_clock::now() >= until_) {
      const std::lock_guard lock(mutex_);
      if (--live_ == 0) changed_.notify_all();
      return;
    }
    // Neighbours in time ask for different things.
    const Case& asked = cases_[static_cast<size_t>(sent++ * 7 % kCases)];
    if (stream % 2 == 0) {
      auto answer = std::make_shared<HttpAnswer>();
      grpc_.Send(
          asked.request, 0,
          [this, stream, &asked, answer](const RequestLog& log) {
            Judge(asked, log.status.ok() && answer->whole, *answer, log.status.ToString());
            Next(stream);
          },
          [answer](const v1::GenerateEvent& event) {
            answer->text += event.chunk().text();
            answer->token_ids.insert(answer->token_ids.end(), event.chunk().token_ids().begin(),
                                     event.chunk().token_ids().end());
            answer->whole = answer->whole || event.has_finish();
          });
    } else if (!http_.Send(asked.body, [this, stream, &asked](const std::string& bytes) {
                 const HttpAnswer answer = ReadAnswer(bytes);
                 Judge(asked, answer.whole, answer, bytes.substr(0, 400));
                 Next(stream);
               })) {
      Judge(asked, false, {}, "no connection");
      const std::lock_guard lock(mutex_);
      if (--live_ == 0) changed_.notify_all();
    }
  }

  void Judge(const Case& asked, bool whole, const HttpAnswer& answer, const std::string& seen) {
    const bool same = answer.token_ids == asked.token_ids && answer.text == asked.text;
    if (whole && same) {
      ++right;
      tokens += static_cast<int64_t>(answer.token_ids.size());
      return;
    }
    ++(whole ? different : lost);
    const std::lock_guard lock(mutex_);
    if (complaint_.empty()) {
      complaint_ = absl::StrCat(asked.body, "\nexpected: ", asked.text, "\n     got: ", answer.text,
                                "\n", seen);
    }
  }

  const std::vector<Case>& cases_;
  steady_clock::time_point until_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int live_ = 0;  // guarded by mutex_, as what follows
  std::string complaint_;
  LoadClient grpc_;
  HttpStreams http_;
  const int streams_;
};

TEST(LoadTest, ManyStreamsGetTheAnswersTheyWouldGetAlone) {
  const int streams = LoadStreams(64);
  const double seconds = LoadSeconds(5);
  const auto served = TestServer::Start(
      DemoModel(), 2,
      {"--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", std::to_string(streams),
       "--max-queued-requests", std::to_string(2 * streams)});
  ASSERT_NE(served, nullptr);
  std::vector<Case> cases;
  for (int i = 0; i < kCases; ++i) {
    Case& made = cases.emplace_back(MakeCase(i));
    const auto alone = served->client().Generate(made.request);
    ASSERT_TRUE(alone.ok()) << alone.status();
    made.text = alone->completions(0).text();
    made.token_ids.assign(alone->completions(0).token_ids().begin(),
                          alone->completions(0).token_ids().end());
  }
  const size_t before = ProcessMemory(served->CoordinatorPid(), "VmRSS:");

  Load load(served.get(), &cases, streams);
  const auto began = steady_clock::now();
  load.Run(seconds);
  double most_running = 0;
  while (std::chrono::duration<double>(steady_clock::now() - began).count() < seconds) {
    most_running = std::max(most_running, served->Metric("lockstep_requests{state=\"running\"}"));
    load.AwaitEnd(1);
  }
  const bool ended = load.AwaitEnd(120);
  const double took = std::chrono::duration<double>(steady_clock::now() - began).count();
  std::printf(
      "%d streams for %.1f s: %lld answers, %lld right, %lld different, %lld lost; %.0f tokens/s; "
      "most running at once %.0f; coordinator %zu MiB before, %zu MiB at most\n",
      streams, took, static_cast<long long>(load.sent), static_cast<long long>(load.right),
      static_cast<long long>(load.different), static_cast<long long>(load.lost),
      static_cast<double>(load.tokens) / took, most_running, before >> 20,
      ProcessMemory(served->CoordinatorPid(), "VmHWM:") >> 20);

  ASSERT_TRUE(ended) << "streams hang\n" << served->server().Log();
  EXPECT_EQ(load.right, load.sent) << load.Complaint();
  EXPECT_GE(load.sent, streams);
  EXPECT_GE(most_running, streams / 2) << "that was no load";
  EXPECT_TRUE(Eventually([&] {
    return served->Metric("lockstep_kv_blocks{state=\"active\"}") == 0 &&
           served->Metric("lockstep_kv_blocks{state=\"pending\"}") == 0;
  }));
  EXPECT_EQ(served->Info().epoch(), 1u) << "a worker had to be replaced";
}

}  // namespace
}  // namespace lockstep
