// The limits table, at, below and above every limit, and what a request
// becomes once it has passed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "coordinator/api/api_error.h"
#include "coordinator/api/bounded_encode.h"
#include "coordinator/api/client_request.h"
#include "coordinator/api/limits.h"
#include "tests/coordinator/api/api_testing.h"

namespace lockstep {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

const ServedModel& Model() {
  static const auto& model = *new ServedModel(DemoModel());
  return model;
}

ClientRequest Valid() {
  ClientRequest request;
  request.prompt = std::vector<TokenId>{5, 6, 7};
  return request;
}

absl::StatusOr<Request> Build(const ClientRequest& request, DoorDefaults defaults = {}) {
  return BuildRequest(request, Model(), defaults, /*now_ms=*/1000);
}

struct Case {
  const char* name;
  const char* field;
  bool accepted;
  std::function<void(ClientRequest*)> set;
};

template <typename T>
std::function<void(ClientRequest*)> Sampling(std::optional<T> ClientSampling::*field, T value) {
  return [=](ClientRequest* r) { r->sampling.*field = value; };
}
std::function<void(ClientRequest*)> Real(std::optional<double> ClientSampling::*field,
                                         double value) {
  return Sampling<double>(field, value);
}
std::function<void(ClientRequest*)> Whole(std::optional<int64_t> ClientSampling::*field,
                                          int64_t value) {
  return Sampling<int64_t>(field, value);
}

std::vector<Case> Cases() {
  using S = ClientSampling;
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  std::vector<Case> cases;
  const auto add = [&](const char* name, const char* field, bool accepted,
                       std::function<void(ClientRequest*)> set) {
    cases.push_back({name, field, accepted, std::move(set)});
  };
  const auto real = [&](const char* field, std::optional<double> S::*member, double low,
                        bool low_ok, double high) {
    add("low", field, low_ok, Real(member, low));
    add("just above low", field, true, Real(member, low + 1e-3));
    add("below low", field, false, Real(member, low - 1e-3));
    add("high", field, true, Real(member, high));
    add("just below high", field, true, Real(member, high - 1e-3));
    add("above high", field, false, Real(member, high + 1e-3));
    add("NaN", field, false, Real(member, nan));
    add("infinity", field, false, Real(member, inf));
    add("minus infinity", field, false, Real(member, -inf));
  };
  real("temperature", &S::temperature, 0, true, 2);
  real("top_p", &S::top_p, 0, false, 1);
  real("min_p", &S::min_p, 0, true, 1);
  real("repetition_penalty", &S::repetition_penalty, 0, false, 2);
  real("presence_penalty", &S::presence_penalty, -2, true, 2);
  real("frequency_penalty", &S::frequency_penalty, -2, true, 2);
  add("zero as a float", "top_p", false, Real(&S::top_p, 1e-60));

  const auto whole = [&](const char* field, std::optional<int64_t> S::*member, int64_t low,
                         int64_t high) {
    add("low", field, true, Whole(member, low));
    add("below low", field, false, Whole(member, low - 1));
    add("high", field, true, Whole(member, high));
    add("above high", field, false, Whole(member, high + 1));
    add("least", field, false, Whole(member, std::numeric_limits<int64_t>::min()));
    add("most", field, false, Whole(member, std::numeric_limits<int64_t>::max()));
  };
  whole("n", &S::n, 1, 16);
  whole("logprobs", &S::logprobs, 0, 20);
  whole("prompt_logprobs", &S::prompt_logprobs, 0, 20);
  whole("max_tokens", &S::max_tokens, 0, 61);  // 64 of context less 3 of prompt
  whole("top_k", &S::top_k, 0, 0xFFFFFFFFll);
  whole("min_tokens", &S::min_tokens, 0, 61);

  const auto stops = [](size_t count, size_t bytes) {
    return [=](ClientRequest* r) { r->sampling.stop.assign(count, std::string(bytes, 'x')); };
  };
  add("16 strings", "stop", true, stops(16, 1));
  add("17 strings", "stop", false, stops(17, 1));
  add("256 bytes", "stop", true, stops(1, 256));
  add("257 bytes", "stop", false, stops(1, 257));
  add("empty", "stop", false, stops(1, 0));
  add("not UTF-8", "stop", false, [](ClientRequest* r) { r->sampling.stop = {"\xff"}; });

  const auto stop_ids = [](size_t count, int64_t id) {
    return [=](ClientRequest* r) { r->sampling.stop_token_ids.assign(count, id); };
  };
  add("64 ids", "stop_token_ids", true, stop_ids(64, 9));
  add("65 ids", "stop_token_ids", false, stop_ids(65, 9));
  add("last id", "stop_token_ids", true, stop_ids(1, 1023));
  add("beyond the vocabulary", "stop_token_ids", false, stop_ids(1, 1024));
  add("negative", "stop_token_ids", false, stop_ids(1, -1));

  const auto bias = [](int64_t count, double value) {
    return [=](ClientRequest* r) {
      for (int64_t i = 0; i < count; ++i) r->sampling.logit_bias.emplace_back(i, value);
    };
  };
  add("1024 entries", "logit_bias", true, bias(1024, 1));
  add("1025 entries", "logit_bias", false, bias(1025, 1));
  add("100", "logit_bias", true, bias(1, 100));
  add("-100", "logit_bias", true, bias(1, -100));
  add("100.1", "logit_bias", false, bias(1, 100.1));
  add("-100.1", "logit_bias", false, bias(1, -100.1));
  add("NaN", "logit_bias", false, bias(1, nan));
  add("twice the same id", "logit_bias", false, [](ClientRequest* r) {
    r->sampling.logit_bias = {{3, 1.0}, {4, 1.0}, {3, 2.0}};
  });
  add("unknown id", "logit_bias", false, [](ClientRequest* r) {
    r->sampling.logit_bias = {{1024, 1.0}};
  });

  const auto prompt = [](std::vector<TokenId> ids) {
    return [=](ClientRequest* r) { r->prompt = ids; };
  };
  add("one id", "prompt", true, prompt({0}));
  add("none", "prompt", false, prompt({}));
  add("last id", "prompt", true, prompt({1023}));
  add("beyond the vocabulary", "prompt", false, prompt({1, 1024}));
  add("63 of 64", "prompt", true, prompt(std::vector<TokenId>(63, 5)));
  add("64 of 64", "prompt", false, prompt(std::vector<TokenId>(64, 5)));
  add("a million", "prompt", false, prompt(std::vector<TokenId>(1'000'000, 5)));
  add("missing", "prompt", false, [](ClientRequest* r) { r->prompt = std::monostate(); });
  add("not UTF-8", "prompt", false, [](ClientRequest* r) { r->prompt = std::string("a\xc3"); });

  const auto id = [](std::string value) {
    return [=](ClientRequest* r) { r->request_id = value; };
  };
  add("128 bytes", "request_id", true, id(std::string(128, 'a')));
  add("129 bytes", "request_id", false, id(std::string(129, 'a')));
  add("tilde and space", "request_id", true, id(" ~"));
  add("control character", "request_id", false, id("a\nb"));
  add("not ASCII", "request_id", false, id("\xc3\xa9"));
  add("served", "model", true, [](ClientRequest* r) { r->model = "demo"; });
  add("129 bytes", "model", false, [](ClientRequest* r) { r->model = std::string(129, 'm'); });
  add("no messages", "messages", false, [](ClientRequest* r) { r->prompt = ChatPrompt{}; });
  return cases;
}

TEST(BuildRequest, HoldsEveryLimit) {
  for (const Case& c : Cases()) {
    SCOPED_TRACE(std::string(c.field) + ": " + c.name);
    ClientRequest request = Valid();
    c.set(&request);
    const absl::StatusOr<Request> built = Build(request);
    if (c.accepted) {
      EXPECT_TRUE(built.ok()) << built.status();
      continue;
    }
    ASSERT_FALSE(built.ok());
    EXPECT_EQ(built.status().code(), absl::StatusCode::kInvalidArgument) << built.status();
    EXPECT_EQ(ErrorField(built.status()), c.field) << built.status();
    EXPECT_THAT(std::string(built.status().message()), StartsWith(std::string(c.field) + ": "));
    EXPECT_LT(built.status().message().size(), 300u) << built.status();
  }
}

TEST(BuildRequest, SaysWhatWouldWork) {
  ClientRequest request = Valid();
  request.sampling.temperature = 3;
  EXPECT_EQ(Build(request).status().message(), "temperature: 3 is above 2; allowed: [0, 2]");
  request = Valid();
  request.prompt = std::vector<TokenId>{1, 2, 5000};
  EXPECT_EQ(Build(request).status().message(),
            "prompt: token id 5000 at index 2 is not in the vocabulary; allowed: [0, 1024)");
}

TEST(BuildRequest, AnotherModelIsNotFound) {
  ClientRequest request = Valid();
  request.model = "gpt-" + std::string(100, '4');
  const absl::Status status = Build(request).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ErrorField(status), "model");
  EXPECT_THAT(std::string(status.message()), HasSubstr(std::string(60, '4') + "..."));
  EXPECT_THAT(std::string(status.message()), HasSubstr("'demo'"));
}

TEST(BuildRequest, EndingIdsAreTheUnion) {
  ClientRequest request = Valid();
  request.sampling.stop_token_ids = {9, 2, 9, 7};
  EXPECT_THAT(Build(request)->ending_ids, ElementsAre(2, 7, 9));
  request.sampling.stop_token_ids = {9};
  request.sampling.ignore_eos = true;
  EXPECT_THAT(Build(request)->ending_ids, ElementsAre(9));
}

TEST(BuildRequest, DefaultMaxTokensIsTheDoors) {
  EXPECT_EQ(Build(Valid())->sampling.max_tokens, 61u);
  EXPECT_EQ(Build(Valid(), {.max_tokens = 16})->sampling.max_tokens, 16u);
  ClientRequest request = Valid();
  request.prompt = std::vector<TokenId>(60, 5);
  EXPECT_EQ(Build(request, {.max_tokens = 16})->sampling.max_tokens, 4u);
}

TEST(BuildRequest, MinTokensMayNotPassMaxTokens) {
  ClientRequest request = Valid();
  request.sampling.max_tokens = 4;
  request.sampling.min_tokens = 5;
  EXPECT_EQ(ErrorField(Build(request).status()), "min_tokens");
  request.sampling.min_tokens = 4;
  EXPECT_TRUE(Build(request).ok());
}

TEST(BuildRequest, TextGetsTheTokenizersFrame) {
  ClientRequest request;
  request.prompt = std::string("hello");
  const absl::StatusOr<Request> framed = Build(request);
  ASSERT_TRUE(framed.ok()) << framed.status();
  EXPECT_EQ(framed->prompt, *Model().tokenizer->Encode("hello", true));
  request.add_special_tokens = false;
  EXPECT_EQ(Build(request)->prompt, Ids(Model(), "hello"));
}

TEST(BuildRequest, ChatGoesThroughTheTemplate) {
  ClientRequest request;
  request.prompt = ChatPrompt{{{"user", "hi"}}};
  const absl::StatusOr<Request> built = Build(request);
  ASSERT_TRUE(built.ok()) << built.status();
  const std::string text = *Model().chat_template->Render({{"user", "hi"}}, true);
  EXPECT_EQ(built->prompt, Ids(Model(), text));
}

TEST(BuildRequest, AModelWithoutTemplateRefusesChat) {
  ServedModel bare = Model();
  bare.chat_template.reset();
  ClientRequest request;
  request.prompt = ChatPrompt{{{"user", "hi"}}};
  const absl::Status status = BuildRequest(request, bare, {}, 0).status();
  EXPECT_EQ(ErrorField(status), "messages");
  EXPECT_THAT(std::string(status.message()), HasSubstr("no chat template"));
}

TEST(BuildRequest, ATopKOfTheWholeVocabularyIsOff) {
  ClientRequest request = Valid();
  request.sampling.top_k = 1023;
  EXPECT_EQ(Build(request)->sampling.top_k, 1023u);
  request.sampling.top_k = 1024;
  EXPECT_EQ(Build(request)->sampling.top_k, 0u);
}

// Workers refuse a smaller one, and with it the step that everybody is in.
TEST(BuildRequest, ARepetitionPenaltyOfAlmostNothingIsOneThatWorkersTake) {
  ClientRequest request = Valid();
  for (const double least : {1e-40, 1e-10}) {
    request.sampling.repetition_penalty = least;
    EXPECT_EQ(Build(request)->sampling.repetition_penalty, kMinRepetitionPenalty);
  }
  request.sampling.repetition_penalty = 2e-9;
  EXPECT_EQ(Build(request)->sampling.repetition_penalty, 2e-9f);
}

TEST(BuildRequest, EveryFieldArrives) {
  ClientRequest client = Valid();
  client.request_id = "me";
  client.priority = -3;
  client.deadline_ms = 5000;
  ClientSampling& s = client.sampling;
  s.max_tokens = 9, s.min_tokens = 2, s.n = 3, s.seed = -77;
  s.temperature = 0.25, s.top_p = 0.5, s.min_p = 0.125, s.top_k = 40;
  s.repetition_penalty = 1.5, s.presence_penalty = -0.5, s.frequency_penalty = 0.75;
  s.logit_bias = {{8, -1.0}, {3, 2.0}};
  s.stop = {"a", "b"};
  s.logprobs = 4, s.prompt_logprobs = 0;
  s.include_stop_str_in_output = true, s.skip_special_tokens = false;
  const absl::StatusOr<Request> built = Build(client);
  ASSERT_TRUE(built.ok()) << built.status();
  const SamplingParams& out = built->sampling;
  EXPECT_EQ(built->external_id, "me");
  EXPECT_EQ(built->priority, -3);
  EXPECT_EQ(built->deadline_ms, 5000);
  EXPECT_EQ(built->arrival_ms, 1000);
  EXPECT_EQ(out.max_tokens, 9u);
  EXPECT_EQ(out.min_tokens, 2u);
  EXPECT_EQ(out.n, 3u);
  EXPECT_EQ(out.seed, -77);
  EXPECT_EQ(out.temperature, 0.25f);
  EXPECT_EQ(out.top_p, 0.5f);
  EXPECT_EQ(out.min_p, 0.125f);
  EXPECT_EQ(out.top_k, 40u);
  EXPECT_EQ(out.repetition_penalty, 1.5f);
  EXPECT_EQ(out.presence_penalty, -0.5f);
  EXPECT_EQ(out.frequency_penalty, 0.75f);
  EXPECT_THAT(out.logit_bias, ElementsAre(std::pair(3u, 2.0f), std::pair(8u, -1.0f)));
  EXPECT_THAT(out.stop, ElementsAre("a", "b"));
  EXPECT_EQ(out.logprobs, 4);
  EXPECT_EQ(out.prompt_logprobs, 0);
  EXPECT_TRUE(out.include_stop_str_in_output);
  EXPECT_FALSE(out.skip_special_tokens);
  EXPECT_FALSE(out.ignore_eos);
}

std::string Repeat(const std::string& text, size_t bytes) {
  std::string all;
  while (all.size() < bytes) all += text;
  return all;
}

TEST(BoundedEncode, IsTheWholeTextsEncodingWhereItFits) {
  const ServedModel model = DemoModel();
  for (const char* text : {"hello world, ", "  \n\n\t  x", "\u4f60\u597d\u00e9\U0001f600", "7"}) {
    const std::string long_text = Repeat(text, 3 * kShortTextBytes);
    const auto whole = model.tokenizer->Encode(long_text, true);
    const auto bounded = BoundedEncode(*model.tokenizer, long_text, true, whole->size());
    ASSERT_TRUE(bounded.ok()) << bounded.status();
    EXPECT_EQ(*bounded, *whole);
  }
}

TEST(BoundedEncode, GivesUpOnWhatIsClearlyTooLong) {
  const ServedModel model = DemoModel();
  const std::string text = Repeat("hello world ", 7 << 20);
  const auto ids = BoundedEncode(*model.tokenizer, text, true, 1'000);
  EXPECT_TRUE(absl::IsOutOfRange(ids.status())) << ids.status();
  EXPECT_THAT(std::string(ids.status().message()), HasSubstr("more than 1000 tokens"));
  ClientRequest client;
  client.prompt = text;
  const auto request = BuildRequest(client, model, {}, 0);
  EXPECT_TRUE(absl::IsInvalidArgument(request.status())) << request.status();
  EXPECT_THAT(std::string(request.status().message()), HasSubstr("more than 64 tokens"));
}

TEST(Echo, CutsAt64CharactersAndEscapes) {
  EXPECT_EQ(Echo(std::string(64, 'x')), std::string(64, 'x'));
  EXPECT_EQ(Echo(std::string(65, 'x')), std::string(64, 'x') + "...");
  EXPECT_EQ(Echo("a\nb"), "a\\x0ab");
}

}  // namespace
}  // namespace lockstep
