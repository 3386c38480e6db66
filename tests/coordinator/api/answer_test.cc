// The text stage by itself: what it makes of an engine's calls, in whatever
// order and at whatever pace they come.
#include "coordinator/api/answer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/coordinator/api/api_testing.h"

namespace lockstep {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

// Takes requests and says nothing: the test makes the engine's calls.
class SilentEngine : public EngineClient {
 public:
  absl::StatusOr<RequestId> Submit(Request, std::shared_ptr<RequestSink> sink) override {
    if (during_submit) during_submit(sink.get());
    return RequestId(7);
  }
  void Cancel(RequestId request) override {
    const std::lock_guard lock(mutex_);
    cancelled_.push_back(request);
  }
  void Stop(SequenceId sequence) override {
    const std::lock_guard lock(mutex_);
    stopped_.push_back(sequence);
  }
  int64_t NowMs() const override { return 0; }
  EngineInfo Info() const override { return {}; }
  SchedulerStats Stats() const override { return {}; }

  std::vector<RequestId> cancelled() {
    const std::lock_guard lock(mutex_);
    return cancelled_;
  }
  std::vector<SequenceId> stopped() {
    const std::lock_guard lock(mutex_);
    return stopped_;
  }

  std::function<void(RequestSink*)> during_submit;

 private:
  std::mutex mutex_;
  std::vector<RequestId> cancelled_;
  std::vector<SequenceId> stopped_;
};

class AnswerTest : public ::testing::Test {
 protected:
  Request Ask(uint32_t n = 1) {
    Request request;
    request.prompt = {5, 6, 7};
    request.sampling.n = n;
    request.sampling.max_tokens = 1000;
    request.ending_ids = {2};
    return request;
  }
  std::shared_ptr<Answer> Start(Request request) {
    absl::StatusOr<std::shared_ptr<Answer>> answer =
        Answer::Start({&engine_, &model_, &metrics_, pool_}, std::move(request));
    EXPECT_TRUE(answer.ok()) << answer.status();
    return *answer;
  }
  // Afterwards every call made so far has been heard: one thread, first come.
  void Settle() {
    std::promise<void> done;
    pool_->Post([&] { done.set_value(); });
    done.get_future().wait();
  }
  // The calls that `make` makes are heard together.
  void AtOnce(const std::function<void()>& make) {
    std::promise<void> go;
    pool_->Post([&] { go.get_future().wait(); });
    make();
    go.set_value();
    Settle();
  }
  double Metric(const std::string& name, const std::string& labels = "") {
    const std::string series =
        absl::StrCat("\nvllm:", name, "{engine=\"0\"", labels, ",model_name=\"demo\"} ");
    const std::string text = metrics_.Expose({}, {});
    const size_t at = text.find(series);
    EXPECT_NE(at, std::string::npos) << series;
    return at == std::string::npos ? -1 : std::stod(text.substr(at + series.size()));
  }
  double Finished(const std::string& reason) {
    return Metric("request_success_total", absl::StrCat(",finished_reason=\"", reason, "\""));
  }

  ServedModel model_ = DemoModel();
  SilentEngine engine_;
  Metrics metrics_{{.model_name = "demo"}};
  std::shared_ptr<WorkPool> pool_ = std::make_shared<WorkPool>(1);
};

template <typename T>
std::vector<T> Of(const std::vector<AnswerEvent>& events) {
  std::vector<T> found;
  for (const AnswerEvent& event : events) {
    if (const T* each = std::get_if<T>(&event)) found.push_back(*each);
  }
  return found;
}

TEST_F(AnswerTest, WhatNobodyTookMerges) {
  const auto answer = Start(Ask(2));
  answer->OnStarted(0);
  for (int i = 0; i < 500; ++i) {
    answer->OnToken(0, 70, TokenLogprobs{.logprob = static_cast<float>(-i), .rank = 1, .top = {}});
    answer->OnToken(1, 71, std::nullopt);
  }
  answer->OnFinished(0, FinishReason::kLength, std::nullopt, 500);
  answer->OnFinished(1, FinishReason::kLength, std::nullopt, 500);
  Settle();
  const Answer::Taken taken = answer->Take();
  EXPECT_LE(taken.events.size(), 64u + 2u);
  std::vector<size_t> tokens(2);
  std::vector<std::string> texts(2);
  std::vector<float> logprobs;
  for (const TextDelta& delta : Of<TextDelta>(taken.events)) {
    tokens[delta.index] += delta.token_ids.size();
    texts[delta.index] += delta.text;
    for (const TokenLogprobs& each : delta.logprobs) logprobs.push_back(each.logprob);
  }
  EXPECT_THAT(tokens, ElementsAre(500u, 500u));
  ASSERT_EQ(logprobs.size(), 500u);
  for (size_t i = 0; i < logprobs.size(); ++i) EXPECT_EQ(logprobs[i], -static_cast<float>(i));
  EXPECT_EQ(texts[0], model_.tokenizer->DecodeAnswer(std::vector<TokenId>(500, 70), true));
  EXPECT_EQ(Of<SequenceEnd>(taken.events).size(), 2u);
  ASSERT_TRUE(taken.terminal.has_value());
  EXPECT_TRUE(taken.terminal->ok());
}

TEST_F(AnswerTest, AStopStringFoundBeforeTheIdIsKnownStillStops) {
  Request request = Ask();
  request.sampling.stop = {model_.tokenizer->TokenText(70)};
  engine_.during_submit = [this](RequestSink* sink) {
    sink->OnStarted(0);
    sink->OnToken(0, 70, std::nullopt);
    pool_->Stop();  // the text thread was faster than Submit's return
  };
  const auto answer = Start(request);
  EXPECT_THAT(engine_.stopped(), ElementsAre(SequenceId{RequestId(7), 0}));
  const Answer::Taken taken = answer->Take();
  EXPECT_EQ(Of<SequenceEnd>(taken.events).at(0).stop_string, model_.tokenizer->TokenText(70));
}

TEST_F(AnswerTest, CallsUnderWayAfterAStopAreIgnored) {
  Request request = Ask(2);
  request.sampling.stop = {model_.tokenizer->TokenText(70)};
  const auto answer = Start(request);
  answer->OnStarted(0);
  answer->OnToken(0, 70, std::nullopt);
  answer->OnToken(0, 71, std::nullopt);
  answer->OnToken(1, 72, std::nullopt);
  answer->OnFinished(0, FinishReason::kLength, std::nullopt, 2);
  answer->OnToken(1, 2, std::nullopt);
  answer->OnFinished(1, FinishReason::kStop, 2, 2);
  answer->OnFailed(absl::UnavailableError("too late"));
  Settle();
  const Answer::Taken taken = answer->Take();
  const std::vector<SequenceEnd> ends = Of<SequenceEnd>(taken.events);
  ASSERT_EQ(ends.size(), 2u);
  EXPECT_EQ(ends[0].completion_tokens, 1u);
  EXPECT_EQ(ends[1].ending_token, 2u);
  EXPECT_TRUE(taken.terminal->ok());
  EXPECT_EQ(engine_.stopped().size(), 1u);
}

// Tokens of one character each: those of "a", "b" and so on.
constexpr TokenId kA = 70, kB = 71, kC = 72;

TEST_F(AnswerTest, WhatWasHeldBackIsItsOwnSequences) {
  Request request = Ask(2);
  request.sampling.stop = {"abcd"};
  const auto answer = Start(request);
  AtOnce([&] {
    answer->OnStarted(0);
    answer->OnToken(0, kA, std::nullopt);  // may yet become the stop string
    answer->OnToken(1, kC, std::nullopt);
    answer->OnFinished(0, FinishReason::kLength, std::nullopt, 1);
  });
  std::vector<std::string> texts(2);
  for (const TextDelta& delta : Of<TextDelta>(answer->Take().events)) {
    texts[delta.index] += delta.text;
  }
  EXPECT_THAT(texts, ElementsAre("a", "c"));
}

// A longer stop string hid it until nothing more could come.
TEST_F(AnswerTest, AStopStringFoundAtTheEndIsAStop) {
  for (const bool ending_token : {false, true}) {
    Request request = Ask();
    request.sampling.stop = {"abcd", "bc"};
    const auto answer = Start(request);
    answer->OnStarted(0);
    for (const TokenId token : {kA, kB, kC}) answer->OnToken(0, token, std::nullopt);
    if (ending_token) {
      answer->OnToken(0, 2, std::nullopt);
      answer->OnFinished(0, FinishReason::kStop, 2, 4);
    } else {
      answer->OnFinished(0, FinishReason::kLength, std::nullopt, 3);
    }
    Settle();
    const Answer::Taken taken = answer->Take();
    std::string text;
    for (const TextDelta& delta : Of<TextDelta>(taken.events)) text += delta.text;
    EXPECT_EQ(text, "a");
    const SequenceEnd end = Of<SequenceEnd>(taken.events).at(0);
    EXPECT_EQ(end.reason, FinishReason::kStop);
    EXPECT_EQ(end.stop_string, "bc");
    EXPECT_EQ(end.ending_token, std::nullopt);
  }
}

TEST_F(AnswerTest, StopStringsCountFromTheTokenAfterMinTokens) {
  Request request = Ask();
  request.sampling.stop = {"a"};
  request.sampling.min_tokens = 2;
  const auto answer = Start(request);
  answer->OnStarted(0);
  for (int i = 0; i < 4; ++i) answer->OnToken(0, kA, std::nullopt);
  Settle();
  const Answer::Taken taken = answer->Take();
  std::string text;
  for (const TextDelta& delta : Of<TextDelta>(taken.events)) text += delta.text;
  EXPECT_EQ(text, "aa");
  EXPECT_EQ(Of<SequenceEnd>(taken.events).at(0).completion_tokens, 3u);
}

TEST_F(AnswerTest, AFailureCountsTheSequencesThatStillRan) {
  const auto answer = Start(Ask(3));
  answer->OnStarted(0);
  answer->OnToken(0, kA, std::nullopt);
  answer->OnFinished(0, FinishReason::kLength, std::nullopt, 1);
  answer->OnFailed(absl::UnavailableError("gone"));
  Settle();
  EXPECT_EQ(Finished("length"), 1);
  EXPECT_EQ(Finished("error"), 2);
}

TEST_F(AnswerTest, TheFirstTokensTimeIsSinceTheArrival) {
  const auto answer = Start(Ask());
  const auto now = [] { return std::chrono::steady_clock::now(); };
  for (const auto began = now(); now() < began + std::chrono::milliseconds(2);) {
  }  // it waits in the queue
  answer->OnStarted(0);
  answer->OnToken(0, kA, std::nullopt);
  Settle();
  const double queue = Metric("request_queue_time_seconds_sum");
  EXPECT_GE(queue, 0.002);
  EXPECT_NEAR(Metric("time_to_first_token_seconds_sum"),
              queue + Metric("request_prefill_time_seconds_sum"), 1e-9);
}

TEST_F(AnswerTest, PromptLogprobsMayComeTwiceAndInPieces) {
  Request request = Ask();
  request.sampling.prompt_logprobs = 0;
  const auto answer = Start(request);
  const auto entry = [](float value) {
    return TokenLogprobs{.logprob = value, .rank = 1, .top = {}};
  };
  answer->OnStarted(3);
  answer->OnPromptLogprobs(1, {entry(-1)});
  Settle();
  EXPECT_THAT(answer->Take().events, IsEmpty());        // the prompt is not whole yet
  answer->OnPromptLogprobs(1, {entry(-1), entry(-2)});  // computed again after a preemption
  answer->OnPromptLogprobs(7, {entry(-9)});             // beyond the prompt: nothing
  answer->OnToken(0, 70, std::nullopt);
  Settle();
  const std::vector<PromptInfo> infos = Of<PromptInfo>(answer->Take().events);
  ASSERT_EQ(infos.size(), 1u);
  EXPECT_EQ(infos[0].cached_tokens, 3u);
  ASSERT_EQ(infos[0].logprobs.size(), 3u);
  EXPECT_FALSE(infos[0].logprobs[0]);
  EXPECT_EQ(infos[0].logprobs[1]->logprob, -1);
  EXPECT_EQ(infos[0].logprobs[2]->logprob, -2);
}

TEST_F(AnswerTest, TheWakerRingsOnceATake) {
  const auto answer = Start(Ask());
  int calls = 0;
  std::mutex mutex;
  answer->SetWaker([&] {
    const std::lock_guard lock(mutex);
    ++calls;
  });
  answer->OnStarted(0);
  Settle();
  for (int i = 0; i < 10; ++i) answer->OnToken(0, 70, std::nullopt);
  Settle();
  EXPECT_EQ(calls, 1);
  answer->Take();
  answer->OnToken(0, 70, std::nullopt);
  Settle();
  EXPECT_EQ(calls, 2);
}

TEST_F(AnswerTest, AWakerSetLateRingsAtOnce) {
  const auto answer = Start(Ask());
  answer->OnStarted(0);
  Settle();
  int calls = 0;
  answer->SetWaker([&] { ++calls; });
  EXPECT_EQ(calls, 1);
}

TEST_F(AnswerTest, AfterCancelNothingIsSaid) {
  const auto answer = Start(Ask());
  answer->OnStarted(0);
  Settle();
  answer->Cancel();
  answer->Cancel();
  answer->OnToken(0, 70, std::nullopt);
  answer->OnFailed(absl::UnavailableError("gone"));
  Settle();
  EXPECT_THAT(engine_.cancelled(), ElementsAre(RequestId(7)));
  const Answer::Taken taken = answer->Take();
  EXPECT_THAT(taken.events, IsEmpty());
  EXPECT_FALSE(taken.terminal.has_value());
}

TEST_F(AnswerTest, AnEndedAnswerIsNotCancelled) {
  const auto answer = Start(Ask());
  answer->OnFailed(absl::ResourceExhaustedError("full"));
  Settle();
  answer->Cancel();
  EXPECT_THAT(engine_.cancelled(), IsEmpty());
}

}  // namespace
}  // namespace lockstep
