// The text stage by itself: what it makes of an engine's calls, in whatever
// order and at whatever pace they come.
#include "coordinator/api/answer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

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
    answer->OnToken(0, 70, std::nullopt);
    answer->OnToken(1, 71, std::nullopt);
  }
  answer->OnFinished(0, FinishReason::kLength, std::nullopt, 500);
  answer->OnFinished(1, FinishReason::kLength, std::nullopt, 500);
  Settle();
  const Answer::Taken taken = answer->Take();
  EXPECT_LE(taken.events.size(), 64u + 2u);
  std::vector<size_t> tokens(2);
  std::vector<std::string> texts(2);
  for (const TextDelta& delta : Of<TextDelta>(taken.events)) {
    tokens[delta.index] += delta.token_ids.size();
    texts[delta.index] += delta.text;
  }
  EXPECT_THAT(tokens, ElementsAre(500u, 500u));
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
