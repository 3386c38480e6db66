// What comes over a socket from clients that mean harm or know no better: each
// gets its status in OpenAI's error shape, and the server goes on.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/api/limits.h"
#include "tests/coordinator/api/api_fixture.h"

namespace lockstep {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

class HostileHttp : public ApiFixture {
 protected:
  void SetUp() override {
    ApiFixture::SetUp();
    AnswerWith("fine");
  }
  void TearDown() override {
    // Whatever was sent, nothing is left behind and the next client is served.
    EXPECT_EQ(Get(http(), "/health").status, 200);
    EXPECT_EQ(Complete({{"prompt", "x"}}).status, 200);
    EXPECT_TRUE(engine_.WaitIdle());
  }

  // `status` 400 or more, in the error shape, and `param` named ("" for null).
  void Refused(const RawResponse& response, int status, const std::string& param,
               const std::string& what) {
    SCOPED_TRACE(what.substr(0, 200));
    EXPECT_EQ(response.status, status) << response.body;
    const json error = response.error();
    ASSERT_FALSE(error.is_null()) << response.body;
    EXPECT_TRUE(error["message"].is_string() && error["type"].is_string() &&
                error["code"].is_string());
    EXPECT_LT(error["message"].get<std::string>().size(), 400u);
    EXPECT_EQ(error["param"], param.empty() ? json(nullptr) : json(param)) << response.body;
    EXPECT_TRUE(response.headers.contains("x-request-id"));
  }
  void BodyRefused(const std::string& body, const std::string& param, int status = 400) {
    Refused(Post(http(), "/v1/completions", body), status, param, body);
  }
};

TEST_F(HostileHttp, BodiesThatAreNotJson) {
  using namespace std::string_literals;
  const std::vector<std::string> bodies = {"",
                                           "\0"s,
                                           "{\"prompt\":\"x\"}\0"s,
                                           "{\"prompt\":\"x\"}\0{}"s,
                                           "{\"prompt\":\"a\0b\"}"s,
                                           " ",
                                           "{",
                                           "}",
                                           "[",
                                           "nul",
                                           "{]",
                                           "{\"prompt\"}",
                                           "{\"prompt\":}",
                                           "{\"prompt\":\"x\",}",
                                           "{'prompt':'x'}",
                                           "{\"prompt\":\xd6",
                                           "{prompt:\"x\"}",
                                           "{\"prompt\":\"x\"}x",
                                           "{\"prompt\":\"x\"}{}",
                                           "{\"prompt\":\"x\" \"n\":1}",
                                           "{\"prompt\":\"a\nb\"}",
                                           "{\"prompt\":\"\\x\"}",
                                           "{\"prompt\":\"\\u12\"}",
                                           "{\"prompt\":\"\\ud800\"}",
                                           "{\"prompt\":\"\\udc00x\"}",
                                           "{\"prompt\":\"\xff\"}",
                                           "{\"prompt\":\"\xc3\"}",
                                           "{\"prompt\":\"\xed\xa0\x80\"}",
                                           "{\"prompt\":\"\xf5\x80\x80\x80\"}",
                                           "{\"temperature\":NaN,\"prompt\":\"x\"}",
                                           "{\"temperature\":Infinity,\"prompt\":\"x\"}",
                                           "{\"temperature\":-Infinity,\"prompt\":\"x\"}",
                                           "{\"temperature\":nan,\"prompt\":\"x\"}",
                                           "{\"temperature\":1e999,\"prompt\":\"x\"}",
                                           "{\"temperature\":-1e999,\"prompt\":\"x\"}",
                                           "{\"temperature\":01,\"prompt\":\"x\"}",
                                           "{\"temperature\":+1,\"prompt\":\"x\"}",
                                           "{\"temperature\":.5,\"prompt\":\"x\"}",
                                           "{\"temperature\":1.,\"prompt\":\"x\"}",
                                           "{\"temperature\":0x1,\"prompt\":\"x\"}",
                                           "{\"temperature\":1e,\"prompt\":\"x\"}",
                                           "// c\n{\"prompt\":\"x\"}",
                                           "{\"prompt\":\"x\"/*c*/}",
                                           std::string("{\"prompt\":\"x\0\"}", 15),
                                           std::string("\x00\x01\x02", 3),
                                           "true",
                                           "12",
                                           "\"text\"",
                                           "null",
                                           "[]",
                                           "[{\"prompt\":\"x\"}]"};
  for (const std::string& body : bodies) BodyRefused(body, "");
}

TEST_F(HostileHttp, DuplicateKeysAreNamed) {
  BodyRefused(R"({"prompt":"x","prompt":"y"})", "prompt");
  BodyRefused(R"({"prompt":"x","n":1,"n":1})", "n");
  BodyRefused(R"({"prompt":"x","stream":true,"stream_options":{"include_usage":true,)"
              R"("include_usage":false}})",
              "include_usage");
  BodyRefused(R"({"prompt":"x","logit_bias":{"5":1,"5":2}})", "5");
}

TEST_F(HostileHttp, NestingStopsAt64) {
  const auto nested = [](int depth) {  // the outer object counts as one
    return "{\"prompt\":" + std::string(static_cast<size_t>(depth - 1), '[') +
           std::string(static_cast<size_t>(depth - 1), ']') + "}";
  };
  // 64 deep is JSON, and not a prompt; 65 deep is refused as JSON.
  BodyRefused(nested(64), "prompt");
  BodyRefused(nested(65), "");
  BodyRefused(std::string(100'000, '['), "");
  BodyRefused("{\"prompt\":" + std::string(4'000'000, '['), "");
  std::string objects;
  for (int i = 0; i < 100'000; ++i) objects += "{\"a\":";
  BodyRefused(objects, "");
}

TEST_F(HostileHttp, MillionsOfValuesAreRefusedInPassing) {
  std::string ids = "{\"prompt\":[0";
  for (int i = 0; i < 4'000'000; ++i) ids += ",0";
  BodyRefused(ids + "]}", "");
  std::string fewer = "{\"prompt\":[0";
  for (int i = 0; i < 100'000; ++i) fewer += ",0";
  BodyRefused(fewer + "]}", "prompt");
}

TEST_F(HostileHttp, WrongTypesNameTheirField) {
  const std::vector<std::string> numbers = {
      "temperature",      "top_p", "min_p", "repetition_penalty", "presence_penalty",
      "frequency_penalty"};
  const std::vector<std::string> integers = {
      "max_tokens", "top_k",           "n",       "seed",     "min_tokens",
      "logprobs",   "prompt_logprobs", "best_of", "priority", "max_completion_tokens"};
  const std::vector<std::string> booleans = {"stream",
                                             "echo",
                                             "ignore_eos",
                                             "include_stop_str_in_output",
                                             "skip_special_tokens",
                                             "return_token_ids",
                                             "return_tokens_as_token_ids",
                                             "add_special_tokens"};
  const auto refused = [&](const std::string& field, const std::string& value) {
    BodyRefused(absl::StrCat("{\"prompt\":\"x\",\"", field, "\":", value, "}"), field);
  };
  for (const std::string& field : numbers) {
    for (const char* value : {"true", "false", "\"1\"", "[]", "[1]", "{}"}) refused(field, value);
  }
  for (const std::string& field : integers) {
    for (const char* value : {"true", "\"1\"", "[1]", "{}", "0.5", "1e300", "18446744073709551615",
                              "9223372036854775808", "99999999999999999999999"}) {
      refused(field, value);
    }
  }
  for (const std::string& field : booleans) {
    for (const char* value : {"1", "0", "\"true\"", "[]", "{}"}) refused(field, value);
  }
  for (const char* value : {"1", "true", "[]", "{}"}) {
    refused("model", value);
    refused("user", value);
    refused("suffix", value);
  }
  for (const char* value : {"1", "true", "{}", "[1]", "[null]", "[[\"a\"]]", "[\"\"]", "\"\""}) {
    refused("stop", value);
  }
  for (const char* value : {"1", "\"1\"", "{}", "[true]", "[\"1\"]", "[1.5]", "[-1]", "[1024]"}) {
    refused("stop_token_ids", value);
  }
  for (const char* value :
       {"1", "[]", "[[1,2]]", "{\"a\":1}", "{\"1.0\":1}", "{\"01\":1}", "{\" 1\":1}", "{\"\":1}",
        "{\"1\":\"2\"}", "{\"1\":true}", "{\"1\":null}", "{\"1\":101}", "{\"-1\":1}",
        "{\"1024\":1}", "{\"99999999999999999999\":1}"}) {
    refused("logit_bias", value);
  }
}

TEST_F(HostileHttp, PromptsThatAreNone) {
  for (const char* prompt : {"1",
                             "true",
                             "{}",
                             "[]",
                             "\"\"",
                             "[true]",
                             "[1.5]",
                             "[-1]",
                             "[1024]",
                             "[4294967296]",
                             "[1,\"a\"]",
                             "[\"a\",1]",
                             "[\"a\",[1]]",
                             "[[1],\"a\"]",
                             "[[1],2]",
                             "[[]]",
                             "[[1],[]]",
                             "[null]",
                             "[[[1]]]",
                             "[{}]",
                             "[99999999999999999999]",
                             "[[1],[1024]]"}) {
    // The empty text has a begin token in this model, so that it is a prompt.
    if (std::string(prompt) == "\"\"") continue;
    BodyRefused(std::string("{\"prompt\":") + prompt + "}", "prompt");
  }
  BodyRefused("{}", "prompt");
  BodyRefused("{\"prompt\":null}", "prompt");
}

TEST_F(HostileHttp, LimitsOfABatch) {
  const auto batch = [](size_t prompts, size_t n) {
    json body = {{"prompt", json::array()}, {"n", n}, {"max_tokens", 1}};
    for (size_t i = 0; i < prompts; ++i) body["prompt"].push_back("x");
    return body;
  };
  EXPECT_EQ(Complete(batch(128, 2)).status, 200);
  EXPECT_EQ(Complete(batch(16, 16)).status, 200);
  BodyRefused(batch(129, 1).dump(), "prompt");
  BodyRefused(batch(128, 3).dump(), "n");
  BodyRefused(batch(17, 16).dump(), "n");
  BodyRefused(batch(1, 17).dump(), "n");
  BodyRefused(batch(1, 0).dump(), "n");
}

TEST_F(HostileHttp, WhatIsNotSupportedIsNamed) {
  for (const char* field : {"messages", "guided_json", "use_beam_search", "temprature", "",
                            "__proto__", "Prompt", "prompt "}) {
    BodyRefused(std::string("{\"prompt\":\"x\",\"") + field + "\":1}", field);
  }
  const std::string name(1000, 'f');
  const RawResponse response = Post(http(), "/v1/completions", "{\"" + name + "\":1}");
  Refused(response, 400, std::string(64, 'f') + "...", "a long name");
  BodyRefused(R"({"prompt":"x","best_of":2})", "best_of");
  BodyRefused(R"({"prompt":"x","suffix":"y"})", "suffix");
  BodyRefused(R"({"prompt":"x","stream_options":{"include_usage":true}})", "stream_options");
  BodyRefused(R"({"prompt":"x","stream":true,"stream_options":{"x":1}})", "stream_options.x");
  BodyRefused(R"({"prompt":"x","stream":true,"stream_options":7})", "stream_options");
  BodyRefused(R"({"prompt":"x","max_tokens":1,"max_completion_tokens":2})",
              "max_completion_tokens");
  BodyRefused(R"({"prompt":"x","user":"a\u0001b"})", "user");
  BodyRefused(json({{"prompt", "x"}, {"user", std::string(129, 'u')}}).dump(), "user");
  BodyRefused(R"({"prompt":"x","model":"other"})", "model", 404);
}

TEST_F(HostileHttp, TheLimitsTableHoldsHereToo) {
  const std::vector<std::pair<std::string, std::string>> bodies = {{"temperature", "2.001"},
                                                                   {"temperature", "-0.001"},
                                                                   {"top_p", "0"},
                                                                   {"top_p", "1.001"},
                                                                   {"min_p", "-0.1"},
                                                                   {"min_p", "1.1"},
                                                                   {"presence_penalty", "3"},
                                                                   {"frequency_penalty", "-3"},
                                                                   {"repetition_penalty", "0"},
                                                                   {"repetition_penalty", "2.5"},
                                                                   {"logprobs", "21"},
                                                                   {"logprobs", "-1"},
                                                                   {"prompt_logprobs", "21"},
                                                                   {"max_tokens", "-1"},
                                                                   {"max_tokens", "1000000"},
                                                                   {"min_tokens", "17"},
                                                                   {"top_k", "-2"},
                                                                   {"n", "-1"}};
  for (const auto& [field, value] : bodies) {
    BodyRefused(absl::StrCat("{\"prompt\":\"x\",\"", field, "\":", value, "}"), field);
  }
}

TEST_F(HostileHttp, RoutesAndMethods) {
  for (const char* path : {"/", "/v1", "/v1/", "/v1/completion", "/v1/completions/", "/V1/models",
                           "/v1/chat/completions/", "/../etc/passwd", "/v1/models%00",
                           "/favicon.ico", "//v1/models"}) {
    Refused(Get(http(), path), 404, "", path);
  }
  Refused(Get(http(), "/v1/models/other"), 404, "model", "another model");
  EXPECT_EQ(Get(http(), "/v1/models/demo").json()["id"], "demo");
  EXPECT_EQ(Get(http(), "/v1/models/d%65m%6F").json()["id"], "demo");
  EXPECT_THAT(std::string(Get(http(), "/v1/models/org%2Fm").error()["message"]),
              HasSubstr("'org/m'"));
  for (const char* escaped : {"demo%", "demo%0", "d%6", "d%6gmo", "d%%65mo", "demo%00", "%"}) {
    Refused(Get(http(), absl::StrCat("/v1/models/", escaped)), 404, "model", escaped);
  }
  EXPECT_EQ(Get(http(), "/health?x=1").status, 200);
  for (const char* method : {"PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "GET", "BREW"}) {
    RawClient client(http());
    client.Send(std::string(method) + " /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n");
    const RawResponse response = client.Read();
    Refused(response, 405, "", method);
    EXPECT_EQ(response.headers.at("allow"), "POST");
  }
  const RawResponse post = Post(http(), "/health", "{}");
  Refused(post, 405, "", "POST /health");
  EXPECT_EQ(post.headers.at("allow"), "GET, HEAD");
}

TEST_F(HostileHttp, ContentTypes) {
  for (const char* type :
       {"", "Content-Type: text/plain\r\n", "Content-Type: application/x-www-form-urlencoded\r\n",
        "Content-Type: multipart/form-data; boundary=x\r\n", "Content-Type: application/jsonx\r\n",
        "Content-Type: \r\n", "Content-Type: json\r\n"}) {
    Refused(Post(http(), "/v1/completions", R"({"prompt":"x"})", type), 415, "", type);
  }
  for (const char* type :
       {"Content-Type: application/json; charset=utf-8\r\n", "content-type: Application/JSON\r\n",
        "CONTENT-TYPE:application/json\r\n"}) {
    EXPECT_EQ(Post(http(), "/v1/completions", R"({"prompt":"x"})", type).status, 200) << type;
  }
}

TEST_F(HostileHttp, MalformedRequests) {
  const std::vector<std::string> requests = {
      "\r\n\r\n\r\n",
      "GET\r\n\r\n",
      "GET /\r\n\r\n",
      "GET  / HTTP/1.1\r\n\r\n",
      "GET / HTTP/2.0\r\n\r\n",
      "GET / HTTP/1.9\r\n\r\n",
      "GET / HTTX/1.1\r\n\r\n",
      "GET / HTTP/1.1\r\nno colon\r\n\r\n",
      "GET / HTTP/1.1\r\n: empty\r\n\r\n",
      "GET / HTTP/1.1\r\nA B: c\r\n\r\n",
      std::string("GET /\0 HTTP/1.1\r\n\r\n", 19),
      "GET / HTTP/1.1\r\nA: b\x01\r\n\r\n",
      "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
      std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 11) + std::string(200, '\x01'),
      "POST /tokenize HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
      "POST /tokenize HTTP/1.1\r\nContent-Length: x\r\n\r\n",
      "POST /tokenize HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n",
      "POST /tokenize HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
      "POST /tokenize HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
      "POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
      "POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
      "POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
      "POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}x\r\n"};
  for (const std::string& bytes : requests) {
    SCOPED_TRACE(bytes.substr(0, 80));
    RawClient client(http());
    client.Send(bytes);
    client.ShutdownSend();
    const RawResponse response = client.Read();
    // Some of these end before they are a request: then the end is the answer.
    if (response.status == 0) continue;
    EXPECT_GE(response.status, 400);
    EXPECT_LT(response.status, 500);
    EXPECT_FALSE(response.error().is_null()) << response.body;
    EXPECT_TRUE(client.ReadToEnd().has_value());
  }
}

// Two readers that disagree on where a body ends let one client write another's
// request: whatever is in doubt is refused, and the connection with it.
TEST_F(HostileHttp, BodiesOfUnclearLengthEndTheConnection) {
  const std::string head = "POST /tokenize HTTP/1.1\r\nContent-Type: application/json\r\n";
  const std::string hidden = "0\r\n\r\nGET /version HTTP/1.1\r\n\r\n";
  for (const std::string& framing : std::vector<std::string>{
           "Transfer-Encoding: gzip", "Transfer-Encoding: xchunked",
           "Transfer-Encoding: chunked, chunked", "Transfer-Encoding: gzip, chunked",
           "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
           "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
           "Transfer-Encoding: \"chunked\"",
           "Transfer-Encoding:", "Transfer-Encoding: chunked\r\nContent-Length: 5",
           "Content-Length: 5\r\nTransfer-Encoding: chunked",
           "Content-Length: 5\r\nContent-Length: 6", "Content-Length: 5, 6", "Content-Length: +5",
           "Content-Length: 0x5", "Content-Length : 5"}) {
    SCOPED_TRACE(framing);
    RawClient client(http());
    client.Send(absl::StrCat(head, framing, "\r\n\r\n", hidden));
    Refused(client.Read(), 400, "", framing);
    EXPECT_EQ(client.Read().status, 0) << "the hidden request was answered";
  }
  RawClient old(http());
  old.Send("POST /tokenize HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n");
  EXPECT_EQ(old.Read().status, 400);
}

TEST_F(HostileHttp, HeadersStopAt16KiB) {
  for (const bool many : {false, true}) {
    RawClient client(http());
    std::string head = "GET /health HTTP/1.1\r\n";
    if (many) {
      for (int i = 0; i < 2000; ++i) head += "X-" + std::to_string(i) + ": 1234567\r\n";
    } else {
      head += "X: " + std::string(17 * 1024, 'y') + "\r\n";
    }
    client.Send(head + "\r\n");
    Refused(client.Read(), 431, "", "a large header");
    EXPECT_TRUE(client.ReadToEnd().has_value());
  }
  RawClient client(http());
  client.Send("GET /health HTTP/1.1\r\nX: " + std::string(15 * 1024, 'y') + "\r\n\r\n");
  EXPECT_EQ(client.Read().status, 200);
  RawClient line(http());
  line.Send("GET /" + std::string(20 * 1024, 'p') + " HTTP/1.1\r\n\r\n");
  EXPECT_EQ(line.Read().status, 431);
}

TEST_F(HostileHttp, BodiesStopAt8MiB) {
  const std::string body = R"({"prompt":")" + std::string(limits::kBodyBytes, 'x') + R"("})";
  Refused(Post(http(), "/tokenize", body), 413, "", "a large body");
  // Announced and never sent.
  RawClient announced(http());
  announced.Send(
      "POST /tokenize HTTP/1.1\r\nContent-Type: application/json\r\n"
      "Content-Length: 8388609\r\n\r\n");
  EXPECT_EQ(announced.Read().status, 413);
  // In chunks, never announced.
  RawClient chunked(http());
  chunked.Send(
      "POST /tokenize HTTP/1.1\r\nContent-Type: application/json\r\n"
      "Transfer-Encoding: chunked\r\n\r\n");
  const std::string chunk = "100000\r\n" + std::string(0x100000, ' ') + "\r\n";
  for (int i = 0; i < 9; ++i) chunked.Send(chunk);
  EXPECT_EQ(chunked.Read().status, 413);
  // 8 MiB exactly is read, and then judged.
  std::string exact = R"({"tokens":[)";
  exact.resize(limits::kBodyBytes - 2, ' ');
  exact += "]}";
  const RawResponse response = Post(http(), "/detokenize", exact);
  EXPECT_EQ(response.status, 200) << response.body;
}

TEST_F(HostileHttp, RequestIdsAreCheckedAndReturned) {
  const auto with = [&](const std::string& id) {
    RawClient client(http());
    client.Send("GET /health HTTP/1.1\r\nx-request-id: " + id + "\r\n\r\n");
    return client.Read();
  };
  EXPECT_EQ(with("abc").headers.at("x-request-id"), "abc");
  EXPECT_EQ(with(std::string(128, 'i')).headers.at("x-request-id"), std::string(128, 'i'));
  const RawResponse longer = with(std::string(129, 'i'));
  Refused(longer, 400, "x-request-id", "129 bytes");
  EXPECT_EQ(longer.headers.at("x-request-id").size(), 32u);
  Refused(with("caf\xc3\xa9"), 400, "x-request-id", "not ASCII");
  EXPECT_EQ(Get(http(), "/health").headers.at("x-request-id").size(), 32u);
}

TEST_F(HostileHttp, TokenizeAndDetokenize) {
  const auto tokenize = [&](const json& body) { return Post(http(), "/tokenize", body.dump()); };
  const auto detokenize = [&](const json& body) {
    return Post(http(), "/detokenize", body.dump());
  };
  const json framed = tokenize({{"prompt", "hello"}}).json();
  EXPECT_EQ(framed["tokens"], json(*model_.tokenizer->Encode("hello", true)));
  EXPECT_EQ(framed["count"], framed["tokens"].size());
  EXPECT_EQ(framed["max_model_len"], 64);
  const json bare = tokenize({{"prompt", "hello"}, {"add_special_tokens", false}}).json();
  EXPECT_EQ(bare["tokens"], json(Ids(model_, "hello")));
  const json chat = {{{"role", "user"}, {"content", "hi"}}};
  const std::string text = *model_.chat_template->Render({{"user", "hi"}}, true);
  EXPECT_EQ(tokenize({{"messages", chat}}).json()["tokens"], json(Ids(model_, text)));
  const std::string open = *model_.chat_template->Render({{"user", "hi"}}, false);
  EXPECT_EQ(tokenize({{"messages", chat}, {"add_generation_prompt", false}}).json()["tokens"],
            json(Ids(model_, open)));
  const json parts = {
      {{"role", "user"},
       {"content", {{{"type", "text"}, {"text", "a"}}, {{"type", "text"}, {"text", "b"}}}}}};
  const std::string joined = *model_.chat_template->Render({{"user", "a\nb"}}, true);
  EXPECT_EQ(tokenize({{"messages", parts}}).json()["tokens"], json(Ids(model_, joined)));

  const json back = detokenize({{"tokens", framed["tokens"]}}).json();
  EXPECT_EQ(back["prompt"],
            model_.tokenizer->Decode(*model_.tokenizer->Encode("hello", true), false));
  EXPECT_EQ(detokenize({{"tokens", json::array()}}).json()["prompt"], "");

  Refused(tokenize({{"prompt", 5}}), 400, "prompt", "a number");
  Refused(tokenize(json::object()), 400, "prompt", "nothing");
  Refused(tokenize({{"messages", json::array()}}), 400, "messages", "no messages");
  Refused(tokenize({{"messages", 1}}), 400, "messages", "a number");
  Refused(tokenize({{"messages", {1}}}), 400, "messages[0]", "numbers");
  Refused(tokenize({{"messages", {{{"role", "user"}}}}}), 400, "messages[0].content", "no content");
  Refused(tokenize({{"messages", {{{"role", "user"}, {"content", 1}}}}}), 400,
          "messages[0].content", "content a number");
  Refused(tokenize({{"prompt", "x"}, {"messages", chat}}), 400, "messages", "both");
  Refused(tokenize({{"prompt", "x"}, {"what", 1}}), 400, "what", "unknown");
  Refused(tokenize({{"prompt", "x"}, {"model", "y"}}), 404, "model", "another model");
  Refused(detokenize({{"tokens", {1, 1024}}}), 400, "tokens", "beyond the vocabulary");
  Refused(detokenize({{"tokens", "1"}}), 400, "tokens", "a string");
  const json most(std::vector<int>(limits::kTokenizeTokens, 5));
  EXPECT_EQ(detokenize({{"tokens", most}}).status, 200);
  Refused(detokenize({{"tokens", std::vector<int>(limits::kTokenizeTokens + 1, 5)}}), 400, "tokens",
          "one more than is allowed");
  Refused(detokenize({{"tokens", {-1}}}), 400, "tokens", "negative");
  Refused(detokenize(json::object()), 400, "tokens", "nothing");
}

}  // namespace
}  // namespace lockstep
