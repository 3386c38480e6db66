// Hundreds of requests that must be refused, at each door of the real server:
// with the right code, naming the field, and at no cost to anybody else.
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/integration/test_server.h"
#include "tests/load/load_options.h"

namespace lockstep {
namespace {

using nlohmann::json;

constexpr size_t kMiB = 1024 * 1024;
// Of a message beyond the 8 MiB that one may have.
constexpr size_t kTooLong = 9 * kMiB;
// What such a message took may stay with each of the coordinator's two malloc arenas, below
// something that is still in use.
constexpr size_t kMostGrowth = kSlowdown == 1 ? 2 * kTooLong + 8 * kMiB : 1024 * kMiB;
constexpr uint32_t kMax32 = std::numeric_limits<uint32_t>::max();

class HostileRequestsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    served_ = TestServer::Start(DemoModel(), 2, {"--dtype", "float32"});
    ASSERT_NE(served_, nullptr);
    vocab_ = served_->Info().vocab_size();
    // What a first request makes for good is no leak of the ones that follow.
    ASSERT_TRUE(served_->client().Generate(LongGreedy("hello", 5)).ok());
    HttpRequest(port(), "POST", "/v1/completions", R"({"prompt":"hi","max_tokens":2})");
    before_ = Memory();
  }
  void TearDown() override {
    if (served_ == nullptr) return;
    EXPECT_TRUE(Eventually([&] {
      return served_->Metric("lockstep_kv_blocks{state=\"active\"}") == 0 &&
             served_->Metric("lockstep_kv_blocks{state=\"pending\"}") == 0;
    }));
    EXPECT_TRUE(served_->client().Generate(LongGreedy("hello", 5)).ok());
    EXPECT_EQ(served_->Info().epoch(), 1u) << "a worker had to be replaced";
    const size_t after = Memory();
    std::printf("coordinator: %zu MiB before, %zu MiB after\n", before_ / kMiB, after / kMiB);
    EXPECT_LE(after, before_ + kMostGrowth);
  }

  int port() { return served_->server().http_port(); }
  size_t Memory() { return ProcessMemory(served_->CoordinatorPid(), "VmRSS:"); }

  std::unique_ptr<TestServer> served_;
  uint32_t vocab_ = 0;
  size_t before_ = 0;
};

struct Refused {
  std::string path;
  std::string body;
  int status;
  std::string field;  // of the error; "*": whatever it says
  std::string method = "POST";
};

std::string With(json body, const std::string& field, const std::string& value) {
  // As text: a value may be what no JSON library would write.
  body.erase(field);
  std::string text = body.dump();
  text.pop_back();
  return absl::StrCat(text, ",\"", field, "\":", value, "}");
}

std::string Repeated(const std::string& what, int count) {
  std::string list = "[";
  for (int i = 0; i < count; ++i) absl::StrAppend(&list, i == 0 ? "" : ",", what);
  return list + "]";
}

// Values that are of no use in a numeric field, whatever its range.
const std::vector<std::string> kNoNumbers = {"\"x\"", "true", "[]", "{}", "1e400", "-1e300"};

void AddSampling(const std::string& path, const json& body, bool is_chat,
                 std::vector<Refused>* out) {
  const auto add = [&](const std::string& field, const std::string& value) {
    // A number beyond double's range is no JSON number to begin with.
    out->push_back({path, With(body, field, value), 400, value == "1e400" ? "*" : field});
  };
  for (const char* field : {"temperature", "top_p", "min_p", "repetition_penalty",
                            "presence_penalty", "frequency_penalty"}) {
    for (const std::string& value : kNoNumbers) add(field, value);
    for (const char* value : {"2.0001", "-2.0001", "1e38"}) add(field, value);
  }
  for (const char* field : {"max_tokens", "min_tokens", "n", "top_k", "seed"}) {
    for (const std::string& value : kNoNumbers) add(field, value);
    for (const char* value : {"0.5", "18446744073709551616"}) add(field, value);
  }
  for (const char* field : {"max_tokens", "min_tokens", "n"}) {
    for (const char* value : {"-1", "4294967296", "9223372036854775807"}) add(field, value);
  }
  for (const char* field : {"stream", "ignore_eos", "include_stop_str_in_output",
                            "skip_special_tokens", "return_token_ids", "add_special_tokens"}) {
    for (const char* value : {"1", "\"true\"", "[]"}) add(field, value);
  }
  for (const char* value : {"5", "[5]", "[\"a\",null]", "\"\"", "[\"\"]", "{}"}) add("stop", value);
  add("stop", Repeated("\"a\"", 17));
  add("stop", "\"" + std::string(257, 'x') + "\"");
  for (const char* value : {"5", "[-1]", "[\"a\"]", "[1.5]", "[4294967296]"}) {
    add("stop_token_ids", value);
  }
  add("stop_token_ids", Repeated("7", 65));
  for (const char* value : {"5", "[]", "{\"x\":1}", "{\"-1\":1}", "{\"07\":1}", "{\"5\":\"1\"}",
                            "{\"5\":100.5}", "{\"4294967301\":1}"}) {
    // An empty list is no object either.
    add("logit_bias", value);
  }
  for (const char* field : {"nonsense", "temperatur", "__proto__"}) add(field, "1");
  for (const char* value : {"5", "\"\\n\"", "\"\\u00e9\""}) add("model", value);
  out->push_back({path, With(body, "model", "\"other\""), 404, "model"});
  for (const char* value : {"5", "{\"x\":1}", "{\"include_usage\":1}"}) {
    out->push_back({path, With(body, "stream_options", value), 400, "*"});
  }
  if (is_chat) return;
  for (const char* value : {"-1", "21", "true", "\"x\"", "0.5"}) add("logprobs", value);
  for (const char* value : {"-1", "21", "true", "\"x\"", "0.5"}) add("prompt_logprobs", value);
  add("best_of", "3");
  add("suffix", "\"x\"");
}

std::vector<Refused> HttpRequests() {
  std::vector<Refused> all;
  const std::string completions = "/v1/completions", chat = "/v1/chat/completions";
  const json prompt = {{"prompt", "hi"}};
  const json messages = {{"messages", {{{"role", "user"}, {"content", "hi"}}}}};
  AddSampling(completions, prompt, false, &all);
  AddSampling(chat, messages, true, &all);
  for (const char* value : {"5", "null", "[]", "{}", "[1,\"a\"]", "[[1],\"a\"]", "[-1]", "[1.5]",
                            "[4294967296]", "[99999999]", "[[]]", "[null]", "true"}) {
    all.push_back({completions, absl::StrCat("{\"prompt\":", value, "}"), 400, "prompt"});
  }
  all.push_back({completions, "{\"prompt\":" + Repeated("\"a\"", 129) + "}", 400, "prompt"});
  all.push_back({completions, "{\"prompt\":" + Repeated("5", 100'000) + "}", 400, "prompt"});
  all.push_back({completions, "{}", 400, "prompt"});
  for (const char* value : {"5", "null", "[]", "{}", "\"hi\""}) {
    all.push_back({chat, absl::StrCat("{\"messages\":", value, "}"), 400, "messages"});
  }
  const std::pair<const char*, const char*> bad_messages[] = {
      {"5", "*"},
      {R"({"content":"x"})", "messages[0].role"},
      {R"({"role":"root","content":"x"})", "messages[0].role"},
      {R"({"role":5,"content":"x"})", "messages[0].role"},
      {R"({"role":"user"})", "messages[0].content"},
      {R"({"role":"user","content":5})", "messages[0].content"},
      {R"({"role":"user","content":{}})", "messages[0].content"},
      {R"({"role":"user","content":[{"type":"image_url","image_url":{}}]})",
       "messages[0].content[0].type"},
      {R"({"role":"user","content":[{"type":"text"}]})", "messages[0].content[0].text"},
      {R"({"role":"user","content":"x","extra":1})", "messages[0].extra"},
      {R"({"role":"assistant","tool_calls":5})", "messages[0].tool_calls"},
      {R"({"role":"assistant","tool_calls":[{"function":{"name":"a b"}}]})",
       "messages[0].tool_calls[0].function.name"},
      {R"({"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":"[1"}}]})",
       "messages[0].tool_calls[0].function.arguments"}};
  for (const auto& [message, field] : bad_messages) {
    all.push_back({chat, absl::StrCat("{\"messages\":[", message, "]}"), 400, field});
  }
  for (const auto& [field, value] : std::vector<std::pair<std::string, std::string>>{
           {"tools", "5"},
           {"tools", "[5]"},
           {"tools", R"([{"type":"retrieval"}])"},
           {"tool_choice", "\"required\""},
           {"response_format", R"({"type":"json_object"})"},
           {"functions", "[]"},
           {"parallel_tool_calls", "false"},
           {"chat_template_kwargs", R"({"messages":1})"},
           {"top_logprobs", "3"},
           {"store", "true"}}) {
    all.push_back({chat, With(messages, field, value), 400, field == "tools" ? "*" : field});
  }
  for (const char* path : {"/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"}) {
    for (const char* body :
         {" ", "{", "[]", "null", "5", "\"x\"", "{\"prompt\":\"a\",\"prompt\":\"b\"}",
          "{\"prompt\":\"\xff\"}", "{'prompt':'a'}", "{\"prompt\":\"\\ud800\"}", "{\"a\":NaN}",
          "{\"prompt\":\"a\",}"}) {
      all.push_back({path, body, 400, "*"});
    }
    all.push_back({path, std::string(100'000, '['), 400, "*"});
    all.push_back({path, "", 405, "*", "GET"});
    all.push_back({path, "{}", 405, "*", "DELETE"});
  }
  for (const char* path : {"/", "/v1", "/v1/completions/", "/../etc/passwd", "/v1/embeddings",
                           "/v1/models/other", "/%00"}) {
    all.push_back({path, "", 404, "*", "GET"});
  }
  for (const char* value : {"5", "[\"a\"]", "[-1]", "[99999999]"}) {
    all.push_back({"/detokenize", absl::StrCat("{\"tokens\":", value, "}"), 400, "tokens"});
  }
  all.push_back({"/tokenize", R"({"prompt":5})", 400, "prompt"});
  all.push_back({"/tokenize", R"({"prompt":"a","model":"other"})", 404, "model"});
  return all;
}

TEST_F(HostileRequestsTest, HttpRefusesEachAndNamesTheField) {
  const std::vector<Refused> all = HttpRequests();
  ASSERT_GE(all.size(), 200u);
  for (const Refused& each : all) {
    SCOPED_TRACE(absl::StrCat(each.method, " ", each.path, " ", each.body.substr(0, 200)));
    const std::string answer = HttpRequest(port(), each.method, each.path, each.body);
    EXPECT_TRUE(absl::StartsWith(answer, absl::StrCat("HTTP/1.1 ", each.status, " ")))
        << answer.substr(0, 400);
    const size_t head = answer.find("\r\n\r\n");
    ASSERT_NE(head, std::string::npos);
    const json object = json::parse(answer.substr(head + 4), nullptr, false);
    ASSERT_TRUE(object.is_object() && object.contains("error")) << answer.substr(0, 400);
    const json& error = object["error"];
    EXPECT_FALSE(error.value("message", "").empty());
    if (each.field == "*") continue;
    EXPECT_EQ(error["param"].is_string() ? error.value("param", "") : "", each.field)
        << answer.substr(0, 400);
  }
  std::printf("%zu requests refused over HTTP\n", all.size());
}

struct RefusedCall {
  std::string field;  // of which the message begins with the name; "*": whatever it says
  std::function<void(v1::GenerateRequest*)> spoil;
  absl::StatusCode code = absl::StatusCode::kInvalidArgument;
};

std::vector<RefusedCall> Calls(uint32_t vocab) {
  std::vector<RefusedCall> all;
  const auto sampling = [&](const char* field, std::function<void(v1::SamplingParams*)> set) {
    all.push_back({field, [set = std::move(set)](auto* r) { set(r->mutable_sampling()); }});
  };
  const float inf = std::numeric_limits<float>::infinity();
  for (const float x : {std::nanf(""), inf, -inf, 3e38f, -3e38f, 2.0001f, -2.0001f, 1e10f}) {
    sampling("temperature", [x](auto* p) { p->set_temperature(x); });
    sampling("top_p", [x](auto* p) { p->set_top_p(x); });
    sampling("min_p", [x](auto* p) { p->set_min_p(x); });
    sampling("repetition_penalty", [x](auto* p) { p->set_repetition_penalty(x); });
    sampling("presence_penalty", [x](auto* p) { p->set_presence_penalty(x); });
    sampling("frequency_penalty", [x](auto* p) { p->set_frequency_penalty(x); });
    const float bias = x * 50;
    sampling("logit_bias", [bias](auto* p) { (*p->mutable_logit_bias())[3] = bias; });
  }
  sampling("top_p", [](auto* p) { p->set_top_p(0); });
  sampling("repetition_penalty", [](auto* p) { p->set_repetition_penalty(0); });
  for (const uint32_t x : {0u, 17u, 1u << 16, 1u << 31, kMax32}) {
    sampling("n", [x](auto* p) { p->set_n(x); });
  }
  for (const uint32_t x : {2048u, 100'000u, 1u << 31, kMax32}) {
    sampling("max_tokens", [x](auto* p) { p->set_max_tokens(x); });
    sampling("min_tokens", [x](auto* p) { p->set_min_tokens(x); });
  }
  for (const uint32_t x : {21u, 1000u, 1u << 31, kMax32}) {
    sampling("logprobs", [x](auto* p) { p->set_logprobs(x); });
    sampling("prompt_logprobs", [x](auto* p) { p->set_prompt_logprobs(x); });
  }
  for (const uint32_t x : {vocab, vocab + 1, 1u << 31, kMax32}) {
    sampling("stop_token_ids", [x](auto* p) { p->add_stop_token_ids(x); });
    sampling("logit_bias", [x](auto* p) { (*p->mutable_logit_bias())[x] = 1; });
    all.push_back({"*", [x](auto* r) { r->mutable_token_ids()->add_ids(x); }});
  }
  sampling("stop", [](auto* p) { p->add_stop(""); });
  sampling("stop", [](auto* p) { p->add_stop(std::string(257, 'x')); });
  sampling("stop", [](auto* p) {
    for (int i = 0; i < 17; ++i) p->add_stop("a");
  });
  sampling("stop_token_ids", [](auto* p) {
    for (int i = 0; i < 65; ++i) p->add_stop_token_ids(7);
  });
  sampling("logit_bias", [](auto* p) {
    for (uint32_t i = 0; i < 1025; ++i) (*p->mutable_logit_bias())[i] = 1;
  });
  all.push_back({"*", [](auto* r) { r->clear_prompt(); }});
  all.push_back({"*", [](auto* r) { r->mutable_token_ids(); }});
  all.push_back({"*", [](auto* r) { r->mutable_chat(); }});
  all.push_back({"*", [](auto* r) { r->mutable_chat()->add_messages()->set_role("root"); }});
  all.push_back({"*", [](auto* r) {
                   for (int i = 0; i < 5'000; ++i) r->mutable_token_ids()->add_ids(5);
                 }});
  all.push_back({"*", [](auto* r) {
                   for (int i = 0; i < 1'025; ++i)
                     r->mutable_chat()->add_messages()->set_role("user");
                 }});
  all.push_back({"*", [](auto* r) { r->set_text(std::string(100'000, 'x')); }});
  all.push_back({"request_id", [](auto* r) { r->set_request_id(std::string(129, 'x')); }});
  all.push_back({"request_id", [](auto* r) { r->set_request_id("a\nb"); }});
  all.push_back({"model", [](auto* r) { r->set_model("a\nb"); }});
  all.push_back({"model", [](auto* r) { r->set_model("other"); }, absl::StatusCode::kNotFound});
  all.push_back({"*", [](auto* r) { r->set_text(std::string(kTooLong, 'x')); },
                 absl::StatusCode::kResourceExhausted});
  return all;
}

TEST_F(HostileRequestsTest, GrpcRefusesEachAndNamesTheField) {
  size_t count = 0;
  for (const RefusedCall& each : Calls(vocab_)) {
    v1::GenerateRequest request;
    request.set_text("hi");
    each.spoil(&request);
    SCOPED_TRACE(request.ShortDebugString().substr(0, 200));
    const absl::Status ends[] = {
        served_->client().Generate(request).status(),
        served_->client().GenerateStream(request, [](const v1::GenerateEvent&) {})};
    for (const absl::Status& end : ends) {
      ++count;
      // Two messages that are too long are more than the door holds at a time (16 MiB): while it
      // has not let go of the first it may give up the second's connection instead.
      const bool given_up = each.code == absl::StatusCode::kResourceExhausted &&
                            end.code() == absl::StatusCode::kUnavailable;
      EXPECT_TRUE(end.code() == each.code || given_up) << end;
      if (each.field == "*") continue;
      EXPECT_TRUE(absl::StrContains(end.message(), each.field)) << end;
    }
  }
  EXPECT_GE(count, 200u);
  std::printf("%zu calls refused over gRPC\n", count);
}

}  // namespace
}  // namespace lockstep
