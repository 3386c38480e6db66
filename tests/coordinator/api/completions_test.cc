// POST /v1/completions as a well-behaved client sees it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "coordinator/api/http/completion_format.h"
#include "tests/coordinator/api/api_fixture.h"

namespace lockstep {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class Completions : public ApiFixture {
 protected:
  // The choices of a stream, joined by index; checks what every stream must be.
  struct Joined {
    std::vector<std::string> texts;
    std::vector<std::vector<TokenId>> token_ids;
    std::vector<json> finish;
    json usage;
    size_t chunks = 0;
  };
  Joined Stream(json body, size_t choices = 1) {
    body["stream"] = true;
    const RawResponse response = Complete(body);
    EXPECT_EQ(response.status, 200) << response.body;
    EXPECT_EQ(response.headers.at("content-type"), "text/event-stream; charset=utf-8");
    std::vector<std::string> events = Events(response.body);
    Joined joined{std::vector<std::string>(choices), std::vector<std::vector<TokenId>>(choices),
                  std::vector<json>(choices), nullptr};
    EXPECT_FALSE(events.empty());
    if (events.empty()) return joined;
    EXPECT_EQ(events.back(), "[DONE]");
    events.pop_back();
    for (const std::string& event : events) {
      const json chunk = json::parse(event);
      EXPECT_EQ(chunk["object"], "text_completion");
      if (chunk.contains("usage") && !chunk["usage"].is_null()) joined.usage = chunk["usage"];
      for (const json& choice : chunk["choices"]) {
        ++joined.chunks;
        const size_t index = choice["index"];
        EXPECT_TRUE(joined.finish[index].is_null()) << "after its finish: " << event;
        joined.texts[index] += choice["text"].get<std::string>();
        for (const json& id : choice.value("token_ids", json::array())) {
          joined.token_ids[index].push_back(id);
        }
        if (!choice["finish_reason"].is_null()) joined.finish[index] = choice["finish_reason"];
      }
    }
    return joined;
  }
};

TEST_F(Completions, AnswersWhole) {
  AnswerWith("The lamp is green.");
  const RawResponse response =
      Complete({{"model", "demo"}, {"prompt", "Say:"}, {"max_tokens", 40}});
  ASSERT_EQ(response.status, 200) << response.body;
  EXPECT_EQ(response.headers.at("content-type"), "application/json");
  const json body = response.json();
  EXPECT_EQ(body["object"], "text_completion");
  EXPECT_EQ(body["model"], "demo");
  EXPECT_THAT(body["id"].get<std::string>(), ::testing::StartsWith("cmpl-"));
  ASSERT_EQ(body["choices"].size(), 1u);
  const json& choice = body["choices"][0];
  EXPECT_EQ(choice["text"], "The lamp is green.");
  EXPECT_EQ(choice["finish_reason"], "stop");
  EXPECT_TRUE(choice["stop_reason"].is_null());
  EXPECT_TRUE(choice["logprobs"].is_null());
  EXPECT_FALSE(choice.contains("token_ids"));
  const size_t prompt = model_.tokenizer->Encode("Say:", true)->size();
  const size_t completion = Ids(model_, "The lamp is green.").size() + 1;
  EXPECT_EQ(body["usage"]["prompt_tokens"], prompt);
  EXPECT_EQ(body["usage"]["completion_tokens"], completion);
  EXPECT_EQ(body["usage"]["total_tokens"], prompt + completion);
}

TEST_F(Completions, DefaultsAreOpenAIs) {
  AnswerWith("");
  engine_.script = [](const Request&) { return Script{.tokens = {{65}}}; };
  const json body = Complete({{"prompt", "x"}}).json();
  EXPECT_EQ(body["usage"]["completion_tokens"], 16);
  EXPECT_EQ(body["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(engine_.submitted()[0].sampling.temperature, 1.0f);
}

TEST_F(Completions, NullIsAbsent) {
  AnswerWith("a");
  const RawResponse response = Complete({{"prompt", "x"},
                                         {"stop", nullptr},
                                         {"logprobs", nullptr},
                                         {"seed", nullptr},
                                         {"logit_bias", nullptr},
                                         {"stream", nullptr},
                                         {"suffix", nullptr},
                                         {"best_of", nullptr},
                                         {"user", nullptr},
                                         {"n", nullptr},
                                         {"top_k", -1}});
  EXPECT_EQ(response.status, 200) << response.body;
}

TEST_F(Completions, AStreamIsByteExact) {
  engine_.script = [](const Request&) { return Script{.tokens = {{70, 2}}}; };
  engine_.Hold();
  RawClient client(http());
  client.Send(PostBytes("/v1/completions",
                        R"({"prompt":[5,6],"stream":true,"stream_options":{"include_usage":true},)"
                        R"("return_token_ids":true})",
                        "Content-Type: application/json\r\nx-request-id: r-1\r\n"));
  ASSERT_TRUE(engine_.WaitSubmitted(1));
  engine_.Tick(1);
  ASSERT_TRUE(client.WaitFor("\n\n"));
  engine_.Tick(1);
  const RawResponse response = client.Read();
  ASSERT_EQ(response.status, 200);
  EXPECT_EQ(response.headers.at("x-request-id"), "r-1");
  EXPECT_EQ(response.headers.at("cache-control"), "no-cache");
  const std::string created = json::parse(Events(response.body)[0])["created"].dump();
  const std::string envelope =
      R"("id":"cmpl-r-1","object":"text_completion","created":)" + created + R"(,"model":"demo",)";
  const std::string text = json(model_.tokenizer->TokenText(70)).dump();
  EXPECT_EQ(response.body,
            "data: {" + envelope + R"("choices":[{"index":0,"text":)" + text +
                R"(,"logprobs":null,"finish_reason":null,"stop_reason":null,)"
                R"("prompt_token_ids":[5,6],"token_ids":[70]}],"prompt_token_ids":[5,6],)"
                "\"usage\":null}\n\n"
                "data: {" +
                envelope +
                R"("choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"stop",)"
                "\"stop_reason\":null,\"token_ids\":[2]}],\"usage\":null}\n\n"
                "data: {" +
                envelope +
                R"("choices":[],"usage":{"prompt_tokens":2,"completion_tokens":2,)"
                "\"total_tokens\":4,\"prompt_tokens_details\":{\"cached_tokens\":0}}}\n\n"
                "data: [DONE]\n\n");
  // Each event left when it was there, and in a chunk of its own.
  EXPECT_EQ(response.chunks.size(), 2u);
}

TEST_F(Completions, StreamedEqualsWhole) {
  AnswerWith("One, two \xe2\x9c\x93 three \xf0\x9f\x90\x84!");
  const json body = {{"prompt", "Count:"}, {"max_tokens", 50}, {"return_token_ids", true}};
  const json whole = Complete(body).json()["choices"][0];
  const Joined streamed = Stream(body);
  EXPECT_EQ(streamed.texts[0], whole["text"]);
  EXPECT_EQ(streamed.texts[0], "One, two \xe2\x9c\x93 three \xf0\x9f\x90\x84!");
  EXPECT_EQ(json(streamed.token_ids[0]), whole["token_ids"]);
  EXPECT_EQ(streamed.finish[0], whole["finish_reason"]);
  // A chunk a token: the finish rides on the last one, or comes alone.
  EXPECT_GE(streamed.chunks, streamed.token_ids[0].size());
  EXPECT_LE(streamed.chunks, streamed.token_ids[0].size() + 1);
}

TEST_F(Completions, StopStringsAreCutAndEndTheSequence) {
  const std::string text = "first line\nsecond line\nthird";
  AnswerWith(text);
  const json body = {
      {"prompt", "x"}, {"max_tokens", 60}, {"stop", "cond li"}, {"return_token_ids", true}};
  const json choice = Complete(body).json()["choices"][0];
  EXPECT_EQ(choice["text"], "first line\nse");
  EXPECT_EQ(choice["finish_reason"], "stop");
  EXPECT_EQ(choice["stop_reason"], "cond li");
  // The tokens are those up to the one that completed the stop string.
  const std::vector<TokenId> all = Ids(model_, text);
  const std::vector<TokenId> kept = choice["token_ids"];
  ASSERT_LT(kept.size(), all.size());
  EXPECT_TRUE(std::equal(kept.begin(), kept.end(), all.begin()));
  EXPECT_THAT(model_.tokenizer->DecodeAnswer(kept, true), HasSubstr("cond li"));
  const std::vector<TokenId> less(kept.begin(), kept.end() - 1);
  EXPECT_THAT(model_.tokenizer->DecodeAnswer(less, true), ::testing::Not(HasSubstr("cond li")));
  EXPECT_TRUE(engine_.WaitStopped(1));
  EXPECT_TRUE(engine_.WaitIdle());
  EXPECT_TRUE(engine_.cancelled().empty());

  EXPECT_EQ(Stream(body).texts[0], "first line\nse");
  json included = body;
  included["include_stop_str_in_output"] = true;
  EXPECT_EQ(Complete(included).json()["choices"][0]["text"], "first line\nsecond li");
  EXPECT_EQ(Stream(included).texts[0], "first line\nsecond li");
}

TEST_F(Completions, AHalfStopStringAtTheEndIsText) {
  AnswerWith("all of it STO");
  const json body = {{"prompt", "x"}, {"max_tokens", 60}, {"stop", json::array({"STOP"})}};
  EXPECT_EQ(Complete(body).json()["choices"][0]["text"], "all of it STO");
  EXPECT_EQ(Stream(body).texts[0], "all of it STO");
}

TEST_F(Completions, MinTokensPutsStopStringsOff) {
  AnswerWith("a.b.c.d.e.f");
  const size_t first = Ids(model_, "a.b").size();
  const json body = {{"prompt", "x"}, {"max_tokens", 60}, {"stop", "."}, {"min_tokens", first}};
  const std::string text = Complete(body).json()["choices"][0]["text"];
  EXPECT_GE(text.size(), 3u);
  EXPECT_LT(text.size(), 11u);
}

TEST_F(Completions, StopTokenIdsAreNamed) {
  engine_.script = [](const Request&) { return Script{.tokens = {{70, 71, 72}}}; };
  const json choice = Complete({{"prompt", "x"},
                                {"stop_token_ids", {72}},
                                {"ignore_eos", true},
                                {"return_token_ids", true}})
                          .json()["choices"][0];
  EXPECT_EQ(choice["finish_reason"], "stop");
  EXPECT_EQ(choice["stop_reason"], 72);
  EXPECT_EQ(choice["token_ids"], json({70, 71, 72}));
  EXPECT_EQ(choice["text"], model_.tokenizer->DecodeAnswer(std::vector<TokenId>{70, 71}, true));
}

TEST_F(Completions, AnUnfinishedCharacterIsShownAtTheEndOnly) {
  std::vector<TokenId> tokens = Ids(model_, "\xf0\x9f\x90\x84");
  ASSERT_GT(tokens.size(), 1u) << "the demo tokenizer spells this in bytes";
  tokens.pop_back();
  const size_t count = tokens.size();
  engine_.script = [tokens](const Request&) { return Script{.tokens = {tokens}}; };
  const json body = {{"prompt", "x"}, {"max_tokens", count}};
  EXPECT_EQ(Complete(body).json()["choices"][0]["text"], "\xef\xbf\xbd");
  EXPECT_EQ(Stream(body).texts[0], "\xef\xbf\xbd");
}

TEST_F(Completions, ChoicesOfABatchAreInOrder) {
  engine_.script = [](const Request& request) {
    const TokenId base = request.prompt.back();
    return Script{.tokens = {{base + 1, 2}, {base + 2, 2}, {base + 3, 2}}};
  };
  const json body = {{"prompt", {{100}, {200}}}, {"n", 3}, {"return_token_ids", true}};
  const json whole = Complete(body).json();
  ASSERT_EQ(whole["choices"].size(), 6u);
  const std::vector<TokenId> expected = {101, 102, 103, 201, 202, 203};
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(whole["choices"][i]["index"], i);
    EXPECT_EQ(whole["choices"][i]["token_ids"], json({expected[i], 2}));
    EXPECT_EQ(whole["choices"][i]["prompt_token_ids"], json::array({i < 3 ? 100 : 200}));
  }
  EXPECT_EQ(whole["usage"]["prompt_tokens"], 2);
  EXPECT_EQ(whole["usage"]["completion_tokens"], 12);
  EXPECT_FALSE(whole.contains("prompt_token_ids"));
  const Joined streamed = Stream(body, 6);
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_THAT(streamed.token_ids[i], ElementsAre(expected[i], 2u));
    EXPECT_EQ(streamed.finish[i], "stop");
  }
}

TEST_F(Completions, TextBatchesWorkLikeSingles) {
  AnswerWith("ok");
  const json whole = Complete({{"prompt", {"a", "b", "c"}}}).json();
  ASSERT_EQ(whole["choices"].size(), 3u);
  const std::vector<Request> submitted = engine_.submitted();
  EXPECT_EQ(submitted[1].prompt, *model_.tokenizer->Encode("b", true));
  EXPECT_NE(submitted[0].external_id, submitted[1].external_id);
}

TEST_F(Completions, LogprobsHaveOpenAIsShape) {
  engine_.script = [](const Request&) { return Script{.tokens = {{70, 71, 2}}}; };
  const json logprobs =
      Complete({{"prompt", "x"}, {"logprobs", 2}}).json()["choices"][0]["logprobs"];
  const auto text = [&](TokenId id) { return model_.tokenizer->TokenText(id); };
  EXPECT_EQ(logprobs["tokens"], json({text(70), text(71), text(2)}));
  EXPECT_EQ(logprobs["token_logprobs"], json({-0.5, -0.5, -0.5}));
  EXPECT_EQ(logprobs["text_offset"], json({0, text(70).size(), text(70).size() + text(71).size()}));
  ASSERT_EQ(logprobs["top_logprobs"].size(), 3u);
  EXPECT_EQ(logprobs["top_logprobs"][0], json({{text(70), -0.5}, {text(71), -1.5}}));
}

TEST_F(Completions, TextOffsetsCountCharacters) {
  std::vector<TokenId> tokens = Ids(model_, "\xe2\x9c\x93");
  ASSERT_GT(tokens.size(), 1u) << "the demo tokenizer spells this in bytes";
  tokens.push_back(2);
  engine_.script = [tokens](const Request&) { return Script{.tokens = {tokens}}; };
  const json logprobs =
      Complete({{"prompt", "x"}, {"logprobs", 0}}).json()["choices"][0]["logprobs"];
  ASSERT_EQ(logprobs["text_offset"].size(), tokens.size());
  for (size_t i = 0; i < tokens.size(); ++i) {  // each is shown as one replacement character
    EXPECT_EQ(logprobs["text_offset"][i], i) << logprobs;
  }
}

TEST_F(Completions, ATokenThatCannotComeHasANumber) {
  CompletionRequest request;
  request.logprobs = true;
  CompletionChoice choice(0, request, model_);
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  choice.AddDelta({.text = "a",
                   .token_ids = {70},
                   .logprobs = {{.logprob = kNever, .rank = 1, .top = {{71, kNever}}}}});
  const json logprobs = json::parse(Dump(choice.Take()))["logprobs"];
  EXPECT_EQ(logprobs["token_logprobs"], json({-9999}));
  EXPECT_EQ(logprobs["top_logprobs"][0][model_.tokenizer->TokenText(71)], -9999);
}

TEST_F(Completions, ZeroLogprobsStillShowTheToken) {
  engine_.script = [](const Request&) { return Script{.tokens = {{70, 2}}}; };
  const json logprobs =
      Complete({{"prompt", "x"}, {"logprobs", 0}, {"return_tokens_as_token_ids", true}})
          .json()["choices"][0]["logprobs"];
  EXPECT_EQ(logprobs["tokens"], json({"token_id:70", "token_id:2"}));
  EXPECT_EQ(logprobs["top_logprobs"][0], json({{"token_id:70", -0.5}}));
}

TEST_F(Completions, StreamedLogprobsJoinToTheWhole) {
  engine_.script = [](const Request&) { return Script{.tokens = {{70, 71, 72, 2}}}; };
  json body = {{"prompt", "x"}, {"logprobs", 1}};
  const json whole = Complete(body).json()["choices"][0]["logprobs"];
  body["stream"] = true;
  json joined;
  for (const std::string& event : Events(Complete(body).body)) {
    if (event == "[DONE]") continue;
    const json logprobs = json::parse(event)["choices"][0]["logprobs"];
    for (const auto& [key, list] : logprobs.items()) {
      for (const json& element : list) joined[key].push_back(element);
    }
  }
  EXPECT_EQ(joined, whole);
}

TEST_F(Completions, EchoScoresAPrompt) {
  const json answer =
      Complete({{"prompt", {70, 71, 72}}, {"echo", true}, {"logprobs", 1}, {"max_tokens", 0}})
          .json();
  const json& choice = answer["choices"][0];
  EXPECT_EQ(choice["text"], model_.tokenizer->Decode(std::vector<TokenId>{70, 71, 72}, false));
  EXPECT_EQ(choice["finish_reason"], "length");
  const json& logprobs = choice["logprobs"];
  EXPECT_EQ(logprobs["token_logprobs"], json({nullptr, -0.5, -0.5}));
  EXPECT_TRUE(logprobs["top_logprobs"][0].is_null());
  EXPECT_EQ(logprobs["top_logprobs"][1].size(), 1u);
  EXPECT_EQ(logprobs["tokens"].size(), 3u);
  EXPECT_EQ(answer["usage"]["completion_tokens"], 0);
}

TEST_F(Completions, EchoLeavesThePromptLogprobsThatWereAskedFor) {
  const json choice = Complete({{"prompt", {70, 71}},
                                {"echo", true},
                                {"logprobs", 1},
                                {"prompt_logprobs", 3},
                                {"max_tokens", 0}})
                          .json()["choices"][0];
  EXPECT_EQ(choice["prompt_logprobs"][1].size(), 3u) << choice;
}

TEST_F(Completions, EchoThenContinues) {
  engine_.script = [](const Request&) { return Script{.tokens = {{80, 2}}}; };
  const json body = {{"prompt", "see: "},
                     {"echo", true},
                     {"logprobs", 0},
                     {"max_tokens", 4},
                     {"return_token_ids", true}};
  const json choice = Complete(body).json()["choices"][0];
  const size_t prompt = model_.tokenizer->Encode("see: ", true)->size();
  EXPECT_EQ(choice["text"], "see: " + model_.tokenizer->TokenText(80));
  EXPECT_EQ(choice["logprobs"]["tokens"].size(), prompt + 2);
  // The bos that the tokenizer added has no characters in the text.
  ASSERT_TRUE(model_.tokenizer->IsSpecial(model_.tokenizer->Encode("see: ", true)->front()));
  EXPECT_EQ(choice["logprobs"]["text_offset"][1], 0);
  EXPECT_EQ(choice["logprobs"]["text_offset"][prompt], 5);
  EXPECT_EQ(choice["token_ids"], json({80, 2}));
  EXPECT_EQ(Stream(body).texts[0], choice["text"]);
}

TEST_F(Completions, PromptLogprobsAreAFieldOfTheirOwn) {
  engine_.script = [](const Request&) { return Script{.tokens = {{80, 2}}}; };
  const json choice = Complete({{"prompt", {70, 71}}, {"prompt_logprobs", 2}}).json()["choices"][0];
  const json& list = choice["prompt_logprobs"];
  ASSERT_EQ(list.size(), 2u);
  EXPECT_TRUE(list[0].is_null());
  EXPECT_EQ(list[1]["71"]["logprob"], -0.5);
  EXPECT_EQ(list[1]["71"]["rank"], 1);
  EXPECT_EQ(list[1]["71"]["decoded_token"], model_.tokenizer->TokenText(71));
  EXPECT_EQ(list[1]["72"]["rank"], 2);
  EXPECT_TRUE(choice["logprobs"].is_null());
}

TEST_F(Completions, ContinuousUsageCountsUp) {
  engine_.script = [](const Request&) { return Script{.tokens = {{80, 81, 2}}}; };
  const RawResponse response =
      Complete({{"prompt", {70}},
                {"stream", true},
                {"stream_options", {{"include_usage", true}, {"continuous_usage_stats", true}}}});
  uint64_t last = 0;
  for (const std::string& event : Events(response.body)) {
    if (event == "[DONE]") continue;
    const uint64_t now = json::parse(event)["usage"]["completion_tokens"];
    EXPECT_GE(now, last);
    last = now;
  }
  EXPECT_EQ(last, 3u);
}

TEST_F(Completions, MaxCompletionTokensIsMaxTokens) {
  const json body = {{"prompt", "x"}, {"max_completion_tokens", 3}, {"ignore_eos", true}};
  EXPECT_EQ(Complete(body).json()["usage"]["completion_tokens"], 3);
}

TEST_F(Completions, CachedTokensAreReported) {
  engine_.script = [](const Request&) { return Script{.tokens = {{80, 2}}, .cached_tokens = 16}; };
  const auto cached = [this](const json& prompt) {
    return Complete({{"prompt", prompt}}).json()["usage"]["prompt_tokens_details"]["cached_tokens"];
  };
  EXPECT_EQ(cached("x"), 16);
  EXPECT_EQ(cached({"x", "y", "z"}), 48);
}

TEST_F(Completions, FailuresBeforeTheFirstByteHaveTheirStatus) {
  const std::vector<std::pair<absl::Status, int>> cases = {
      {absl::ResourceExhaustedError("the queue is full"), 429},
      {absl::InvalidArgumentError("can never fit"), 400},
      {absl::UnavailableError("rank 1 died"), 503},
      {absl::DeadlineExceededError("late"), 504},
      {absl::InternalError("NaN logits"), 500},
  };
  for (const auto& [status, code] : cases) {
    engine_.script = [status = status](const Request&) {
      return Script{.fail_after = 0, .failure = status};
    };
    for (const bool stream : {false, true}) {
      const RawResponse response = Complete({{"prompt", "x"}, {"stream", stream}});
      EXPECT_EQ(response.status, code) << response.body;
      EXPECT_EQ(response.error()["message"], std::string(status.message()));
      EXPECT_EQ(response.headers.contains("retry-after"), code == 429 || code == 503);
    }
  }
}

TEST_F(Completions, AFailureAfterTheFirstByteEndsTheStream) {
  engine_.script = [](const Request&) {
    return Script{
        .tokens = {{80}}, .fail_after = 2, .failure = absl::UnavailableError("rank 1 died")};
  };
  engine_.Hold();
  RawClient client(http());
  client.Send(PostBytes("/v1/completions", R"({"prompt":"x","stream":true})"));
  ASSERT_TRUE(engine_.WaitSubmitted(1));
  engine_.Tick(1);
  ASSERT_TRUE(client.WaitFor("\n\n"));
  engine_.Release();
  const RawResponse response = client.Read();
  EXPECT_EQ(response.status, 200);
  const std::vector<std::string> events = Events(response.body);
  const json last = json::parse(events.back());
  EXPECT_EQ(last["error"]["message"], "rank 1 died");
  EXPECT_EQ(last["error"]["type"], "service_unavailable_error");
  EXPECT_THAT(events, ::testing::Not(::testing::Contains("[DONE]")));
  EXPECT_EQ(client.ReadToEnd(), "");  // and closes
}

// 429 would send the client to try the same again, for ever.
TEST_F(Completions, ABatchThatCanNeverFitIsInvalid) {
  engine_.SetRoom(/*max_num_seqs=*/4, /*max_queued_requests=*/64);
  json prompts = json::array();
  for (int i = 0; i < 68; ++i) prompts.push_back({i + 5});
  EXPECT_EQ(Complete({{"prompt", prompts}, {"max_tokens", 1}, {"n", 2}}).status, 200);
  ASSERT_EQ(engine_.submitted().size(), 68u);
  prompts.push_back({5});
  const RawResponse response = Complete({{"prompt", prompts}, {"max_tokens", 1}});
  EXPECT_EQ(response.status, 400);
  EXPECT_EQ(response.error()["param"], "prompt");
  EXPECT_EQ(response.error()["message"],
            "prompt: 69 prompts are more than this server takes at once; allowed: 68 "
            "(--max-num-seqs 4 + --max-queued-requests 64)");
  EXPECT_EQ(engine_.submitted().size(), 68u);
}

TEST_F(Completions, OneFailingPromptFailsTheBatchAndCancelsTheRest) {
  engine_.script = [](const Request& request) {
    if (request.prompt[0] == 9) {
      return Script{.fail_after = 0, .failure = absl::ResourceExhaustedError("full")};
    }
    return Script{.tokens = {{80}}};
  };
  engine_.Hold();
  RawClient client(http());
  client.Send(PostBytes("/v1/completions", R"({"prompt":[[8],[9]],"max_tokens":60})"));
  ASSERT_TRUE(engine_.WaitSubmitted(2));
  engine_.Tick(1);
  EXPECT_EQ(client.Read().status, 429);
  EXPECT_TRUE(engine_.WaitCancelled(1));
  EXPECT_TRUE(engine_.WaitIdle());
}

TEST_F(Completions, ARefusalAtTheInboxCancelsWhatWasSubmitted) {
  engine_.on_submit = [](const Request& request) {
    return request.prompt[0] == 9 ? absl::ResourceExhaustedError("inbox full") : absl::OkStatus();
  };
  engine_.Hold();
  EXPECT_EQ(Post(http(), "/v1/completions", R"({"prompt":[[8],[9]]})").status, 429);
  EXPECT_TRUE(engine_.WaitCancelled(1));
}

}  // namespace
}  // namespace lockstep
