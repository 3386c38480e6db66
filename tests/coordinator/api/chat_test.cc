// POST /v1/chat/completions as clients see it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "coordinator/api/limits.h"
#include "tests/coordinator/api/api_fixture.h"
#include "tests/text/text_test_util.h"

namespace lockstep {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

const json kHi = {{{"role", "user"}, {"content", "hi"}}};

// Shows everything that a template may be given.
constexpr char kToolTemplate[] =
    "{%- if tools %}{{ tools | tojson }}\n{% endif %}"
    "{%- for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{%- for c in m.tool_calls %}(call {{ c.function.name }} "
    "{{ c.function.arguments | tojson }}){% endfor %}"
    "{%- if m.tool_call_id %}(id {{ m.tool_call_id }}){% endif %}{% endfor %}"
    "{%- if mood is defined %}mood {{ mood }}\n{% endif %}[assistant]";

class Chat : public ApiFixture {
 protected:
  void SetUp() override {
    model_.max_model_len = 512;
    Open();
  }
  // Another template, in a server of its own.
  void UseTemplate(const std::string& source) {
    ModelDir dir;
    dir.Write("chat_template.jinja", source);
    auto loaded = ChatTemplate::Load(dir.path());
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    model_.chat_template = *loaded;
    Open();
  }
  RawResponse Ask(const json& body) { return Post(http(), "/v1/chat/completions", body.dump()); }
  std::string PromptText() {
    return model_.tokenizer->Decode(engine_.submitted().back().prompt, false);
  }
  void Refused(const json& body, const std::string& param, int status = 400) {
    const RawResponse response = Ask(body);
    EXPECT_EQ(response.status, status) << body << response.body;
    ASSERT_FALSE(response.error().is_null()) << response.body;
    EXPECT_EQ(response.error()["param"], json(param)) << response.body;
  }
  // The chunks of a stream; checks what each must be.
  std::vector<json> Stream(json body) {
    body["stream"] = true;
    const RawResponse response = Ask(body);
    EXPECT_EQ(response.status, 200) << response.body;
    std::vector<std::string> events = Events(response.body);
    std::vector<json> chunks;
    EXPECT_FALSE(events.empty());
    if (events.empty()) return chunks;
    EXPECT_EQ(events.back(), "[DONE]");
    events.pop_back();
    for (const std::string& event : events) {
      chunks.push_back(json::parse(event));
      EXPECT_EQ(chunks.back()["object"], "chat.completion.chunk");
    }
    return chunks;
  }
  // What the chunks' deltas add up to, as a client adds them.
  struct Message {
    std::string content;
    json tool_calls = json::array();
    json finish;
  };
  Message Join(const std::vector<json>& chunks, uint32_t index = 0) {
    Message message;
    bool first = true;
    for (const json& chunk : chunks) {
      for (const json& choice : chunk["choices"]) {
        if (choice["index"] != index) continue;
        EXPECT_EQ(choice["delta"].contains("role"), first) << chunk;
        first = false;
        EXPECT_TRUE(message.finish.is_null()) << "after its finish: " << chunk;
        message.content += choice["delta"].value("content", "");
        for (const json& call : choice["delta"].value("tool_calls", json::array())) {
          EXPECT_EQ(call["index"], message.tool_calls.size());
          message.tool_calls.push_back(call);
        }
        if (!choice["finish_reason"].is_null()) message.finish = choice["finish_reason"];
      }
    }
    return message;
  }
  const json tools_ = json::parse(R"([{"type":"function","function":{"name":"weather",
      "description":"Weather of a city","parameters":{"type":"object",
      "properties":{"city":{"type":"string"}},"required":["city"]}}},
      {"type":"function","function":{"name":"time"}}])");
};

TEST_F(Chat, AnswersWhole) {
  AnswerWith("The lamp is green.");
  const RawResponse response = Ask({{"model", "demo"}, {"messages", kHi}});
  ASSERT_EQ(response.status, 200) << response.body;
  const json body = response.json();
  EXPECT_THAT(body["id"].get<std::string>(), ::testing::StartsWith("chatcmpl-"));
  EXPECT_EQ(body["object"], "chat.completion");
  EXPECT_EQ(body["model"], "demo");
  ASSERT_EQ(body["choices"].size(), 1u);
  EXPECT_EQ(body["choices"][0]["message"],
            json({{"role", "assistant"}, {"content", "The lamp is green."}, {"refusal", nullptr}}));
  EXPECT_EQ(body["choices"][0]["finish_reason"], "stop");
  EXPECT_TRUE(body["choices"][0]["logprobs"].is_null());
  const std::string prompt = *model_.chat_template->Render({{"user", "hi"}}, true);
  EXPECT_EQ(engine_.submitted()[0].prompt, Ids(model_, prompt));
  EXPECT_EQ(body["usage"]["prompt_tokens"], Ids(model_, prompt).size());
}

TEST_F(Chat, WithoutALimitTheContextIsOne) {
  engine_.script = [](const Request&) { return Script{.tokens = {{65}}}; };
  const json body = Ask({{"messages", kHi}}).json();
  EXPECT_EQ(body["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(body["usage"]["total_tokens"], 512);
  EXPECT_EQ(
      Ask({{"messages", kHi}, {"max_completion_tokens", 3}}).json()["usage"]["completion_tokens"],
      3);
  EXPECT_EQ(Ask({{"messages", kHi}, {"max_tokens", 3}}).json()["usage"]["completion_tokens"], 3);
}

TEST_F(Chat, AStreamIsByteExact) {
  engine_.script = [](const Request&) { return Script{.tokens = {{70, 2}}}; };
  const RawResponse response =
      Post(http(), "/v1/chat/completions",
           R"({"messages":[{"role":"user","content":"hi"}],"stream":true,)"
           R"("stream_options":{"include_usage":true},"return_token_ids":true})",
           "Content-Type: application/json\r\nx-request-id: r-1\r\n");
  ASSERT_EQ(response.status, 200);
  EXPECT_EQ(response.headers.at("content-type"), "text/event-stream; charset=utf-8");
  const json first = json::parse(Events(response.body)[0]);
  const std::vector<TokenId> prompt = engine_.submitted()[0].prompt;
  const std::string envelope =
      R"({"id":"chatcmpl-r-1","object":"chat.completion.chunk","created":)" +
      first["created"].dump() + R"(,"model":"demo",)";
  const std::string text = json(model_.tokenizer->TokenText(70)).dump();
  EXPECT_EQ(response.body,
            "data: " + envelope +
                R"("choices":[{"index":0,"delta":{"role":"assistant","content":""},)"
                R"("logprobs":null,"finish_reason":null}],"prompt_token_ids":)" +
                json(prompt).dump() + ",\"usage\":null}\n\ndata: " + envelope +
                R"("choices":[{"index":0,"delta":{"content":)" + text +
                R"(},"logprobs":null,"finish_reason":null,"stop_reason":null,"token_ids":[70]}],)" +
                "\"usage\":null}\n\ndata: " + envelope +
                R"("choices":[{"index":0,"delta":{"content":""},"logprobs":null,)"
                R"("finish_reason":"stop","stop_reason":null,"token_ids":[2]}],"usage":null})" +
                "\n\ndata: " + envelope + R"("choices":[],"usage":{"prompt_tokens":)" +
                std::to_string(prompt.size()) + R"(,"completion_tokens":2,"total_tokens":)" +
                std::to_string(prompt.size() + 2) +
                ",\"prompt_tokens_details\":{\"cached_tokens\":0}}}\n\ndata: [DONE]\n\n");
}

TEST_F(Chat, StreamedEqualsWholeForEveryChoice) {
  const std::vector<TokenId> one = Ids(model_, "One \xe2\x9c\x93"), two = Ids(model_, "Two");
  engine_.script = [&](const Request&) {
    Script script{.tokens = {one, two}};
    for (auto& tokens : script.tokens) tokens.push_back(2);
    return script;
  };
  const json body = {{"messages", kHi}, {"n", 2}};
  const json whole = Ask(body).json();
  const std::vector<json> chunks = Stream(body);
  for (uint32_t i = 0; i < 2; ++i) {
    EXPECT_EQ(Join(chunks, i).content, whole["choices"][i]["message"]["content"]);
    EXPECT_EQ(Join(chunks, i).finish, "stop");
  }
  EXPECT_EQ(whole["choices"][1]["message"]["content"], "Two");
}

TEST_F(Chat, LogprobsHaveChatsShape) {
  engine_.script = [](const Request&) { return Script{.tokens = {{70, 2}}}; };
  const auto entry = [&](TokenId id, double logprob) {
    json bytes = json::array();
    for (const char c : model_.tokenizer->TokenBytes(id)) {
      bytes.push_back(static_cast<unsigned char>(c));
    }
    return json(
        {{"token", model_.tokenizer->TokenText(id)}, {"logprob", logprob}, {"bytes", bytes}});
  };
  json body = {{"messages", kHi}, {"logprobs", true}, {"top_logprobs", 2}};
  const json content = Ask(body).json()["choices"][0]["logprobs"]["content"];
  ASSERT_EQ(content.size(), 2u);
  json expected = entry(70, -0.5);
  expected["top_logprobs"] = {entry(70, -0.5), entry(71, -1.5)};
  EXPECT_EQ(content[0], expected);
  json joined = json::array();
  for (const json& chunk : Stream(body)) {
    const json& logprobs = chunk["choices"][0]["logprobs"];
    if (logprobs.is_null()) continue;
    for (const json& each : logprobs["content"]) joined.push_back(each);
  }
  EXPECT_EQ(joined, content);
  body.erase("top_logprobs");
  EXPECT_EQ(Ask(body).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"],
            json::array());
}

TEST_F(Chat, SamplingFieldsAreThoseOfCompletions) {
  AnswerWith("ab stop");
  json body = {{"messages", kHi},
               {"temperature", 0.5},
               {"top_p", 0.5},
               {"top_k", 7},
               {"min_p", 0.25},
               {"seed", -5},
               {"presence_penalty", 1},
               {"frequency_penalty", -1},
               {"repetition_penalty", 1.5},
               {"logit_bias", {{"7", 3}}},
               {"min_tokens", 1},
               {"ignore_eos", true},
               {"stop", {" stop"}},
               {"user", "u"},
               {"max_tokens", 9}};
  const json answer = Ask(body).json();
  EXPECT_EQ(answer["choices"][0]["message"]["content"], "ab");
  EXPECT_EQ(answer["choices"][0]["stop_reason"], " stop");
  const SamplingParams sampling = engine_.submitted()[0].sampling;
  EXPECT_EQ(sampling.temperature, 0.5f);
  EXPECT_EQ(sampling.top_p, 0.5f);
  EXPECT_EQ(sampling.top_k, 7u);
  EXPECT_EQ(sampling.min_p, 0.25f);
  EXPECT_EQ(sampling.seed, -5);
  EXPECT_EQ(sampling.presence_penalty, 1.0f);
  EXPECT_EQ(sampling.frequency_penalty, -1.0f);
  EXPECT_EQ(sampling.repetition_penalty, 1.5f);
  EXPECT_EQ(sampling.min_tokens, 1u);
  EXPECT_EQ(sampling.max_tokens, 9u);
  EXPECT_TRUE(sampling.ignore_eos);
}

TEST_F(Chat, TextPartsAreJoinedUnlessTheTemplateReadsLists) {
  AnswerWith("ok");
  const json parts = {
      {{"role", "user"},
       {"content", {{{"type", "text"}, {"text", "a"}}, {{"type", "text"}, {"text", "b"}}}}}};
  ASSERT_EQ(Ask({{"messages", parts}}).status, 200);
  EXPECT_EQ(engine_.submitted()[0].prompt,
            Ids(model_, *model_.chat_template->Render({{"user", "a\nb"}}, true)));
  UseTemplate(
      "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
      "{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}{% endfor %}");
  ASSERT_EQ(Ask({{"messages", parts}}).status, 200);
  EXPECT_EQ(PromptText(), "<a><b>");
  ASSERT_EQ(Ask({{"messages", kHi}}).status, 200);
  EXPECT_EQ(PromptText(), "hi");
}

TEST_F(Chat, ToolsAndEarlierCallsReachTheTemplateInTheClientsOrder) {
  UseTemplate(kToolTemplate);
  AnswerWith("ok");
  const RawResponse response = Post(http(), "/v1/chat/completions", R"({
    "messages": [
      {"role": "developer", "content": "Be brief."},
      {"role": "user", "content": "Weather?"},
      {"role": "assistant", "content": null, "refusal": null, "annotations": [], "tool_calls": [
        {"id": "c1", "type": "function",
         "function": {"name": "weather", "arguments": "{\"z\": 1, \"a\": [2.50]}"}}]},
      {"role": "tool", "tool_call_id": "c1", "content": "Rain"}],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters":
      {"type": "object", "properties": {"zip": {}, "area": {}}}}}],
    "chat_template_kwargs": {"mood": "mild"}})");
  ASSERT_EQ(response.status, 200) << response.body;
  EXPECT_EQ(PromptText(),
            R"([{"type": "function", "function": {"name": "weather", "parameters": )"
            R"({"type": "object", "properties": {"zip": {}, "area": {}}}}}])"
            "\n[system]Be brief.[user]Weather?[assistant](call weather {\"z\": 1, \"a\": [2.5]})"
            "[tool]Rain(id c1)mood mild\n[assistant]");
}

TEST_F(Chat, CallsOfTheHermesFormBecomeToolCalls) {
  const std::string arguments = R"({"city": "Graz", "days": 1.50})";
  AnswerWith("I will look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": " + arguments +
             "}\n</tool_call>\n<tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call>");
  const json body = {{"messages", kHi}, {"tools", tools_}};
  const json choice = Ask(body).json()["choices"][0];
  EXPECT_EQ(choice["finish_reason"], "tool_calls");
  EXPECT_EQ(choice["message"]["content"], "I will look.");
  const json& calls = choice["message"]["tool_calls"];
  ASSERT_EQ(calls.size(), 2u);
  EXPECT_THAT(calls[0]["id"].get<std::string>(), ::testing::StartsWith("call_"));
  EXPECT_NE(calls[0]["id"], calls[1]["id"]);
  EXPECT_EQ(calls[0]["type"], "function");
  EXPECT_EQ(calls[0]["function"], json({{"name", "weather"}, {"arguments", arguments}}));
  EXPECT_EQ(calls[1]["function"], json({{"name", "time"}, {"arguments", "{}"}}));
  EXPECT_FALSE(calls[0].contains("index"));

  const Message streamed = Join(Stream(body));
  EXPECT_EQ(streamed.content, "I will look.");
  EXPECT_EQ(streamed.finish, "tool_calls");
  ASSERT_EQ(streamed.tool_calls.size(), 2u);
  EXPECT_EQ(streamed.tool_calls[0]["function"], calls[0]["function"]);
  EXPECT_EQ(streamed.tool_calls[1]["function"], calls[1]["function"]);
}

TEST_F(Chat, ACallThatIsFollowedByTheLimitEndsByLength) {
  const std::vector<TokenId> tokens = Ids(
      model_, "<tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call>\n<tool_call>");
  engine_.script = [&](const Request&) { return Script{.tokens = {tokens}}; };
  const json body = {{"messages", kHi}, {"tools", tools_}, {"max_tokens", tokens.size()}};
  const json choice = Ask(body).json()["choices"][0];
  EXPECT_EQ(choice["message"]["tool_calls"].size(), 1u) << choice;
  EXPECT_EQ(choice["finish_reason"], "length");
  EXPECT_EQ(Join(Stream(body)).finish, "length");
}

TEST_F(Chat, ACallOfTheLlamaFormBecomesAToolCall) {
  AnswerWith(R"({"name": "weather", "parameters": {"city": "Graz"}})");
  const json body = {{"messages", kHi}, {"tools", tools_}, {"tool_choice", "auto"}};
  const json choice = Ask(body).json()["choices"][0];
  EXPECT_EQ(choice["finish_reason"], "tool_calls");
  EXPECT_TRUE(choice["message"]["content"].is_null());
  EXPECT_EQ(choice["message"]["tool_calls"][0]["function"],
            json({{"name", "weather"}, {"arguments", R"({"city": "Graz"})"}}));
  const Message streamed = Join(Stream(body));
  EXPECT_EQ(streamed.content, "");
  EXPECT_EQ(streamed.tool_calls[0]["function"], choice["message"]["tool_calls"][0]["function"]);
}

TEST_F(Chat, WithoutToolsACallIsText) {
  UseTemplate(kToolTemplate);
  const std::string text = R"({"name": "weather", "parameters": {"city": "Graz"}})";
  AnswerWith(text);
  for (json body : {json({{"messages", kHi}}), json({{"messages", kHi}, {"tools", json::array()}}),
                    json({{"messages", kHi}, {"tools", tools_}, {"tool_choice", "none"}})}) {
    const json choice = Ask(body).json()["choices"][0];
    EXPECT_EQ(choice["message"]["content"], text);
    EXPECT_EQ(choice["finish_reason"], "stop");
    EXPECT_FALSE(choice["message"].contains("tool_calls"));
    EXPECT_EQ(PromptText(), "[user]hi[assistant]");
  }
}

TEST_F(Chat, WhatIsNotSupportedIsNamed) {
  AnswerWith("ok");
  const auto with = [](const char* field, const json& value) {
    json body = {{"messages", kHi}};
    body[field] = value;
    return body;
  };
  Refused(with("prompt", "x"), "prompt");
  Refused(with("echo", true), "echo");
  Refused(with("best_of", 1), "best_of");
  Refused(with("modalities", {"audio"}), "modalities");
  Refused(with("reasoning_effort", "high"), "reasoning_effort");
  Refused(with("functions", json::array()), "functions");
  Refused(with("function_call", "auto"), "function_call");
  Refused(with("store", true), "store");
  Refused(with("parallel_tool_calls", false), "parallel_tool_calls");
  Refused(with("prompt_logprobs", 1), "prompt_logprobs");
  Refused(with("chat_template", "{{ 1 }}"), "chat_template");
  Refused(with("response_format", {{"type", "json_object"}}), "response_format");
  Refused(with("response_format", {{"type", "json_schema"}, {"json_schema", {{"name", "x"}}}}),
          "response_format");
  Refused(with("response_format", {{"type", "text"}, {"x", 1}}), "response_format.x");
  Refused(with("tool_choice", "required"), "tool_choice");
  Refused(with("tool_choice", {{"type", "function"}, {"function", {{"name", "time"}}}}),
          "tool_choice");
  Refused(with("logprobs", 2), "logprobs");
  Refused(with("top_logprobs", 2), "top_logprobs");
  Refused(with("stream_options", json::object()), "stream_options");
  Refused(with("model", "other"), "model", 404);
  Refused(with("chat_template_kwargs", 1), "chat_template_kwargs");
  Refused(with("chat_template_kwargs", {{"messages", "x"}}), "chat_template_kwargs");
  Refused(with("temperature", 3), "temperature");
  Refused(with("n", 17), "n");
  Refused(with("max_completion_tokens", 5000), "max_completion_tokens");
  Refused(with("max_tokens", 5000), "max_tokens");
  Refused({{"messages", kHi}, {"logprobs", true}, {"top_logprobs", 21}}, "top_logprobs");
  EXPECT_EQ(Ask(with("response_format", {{"type", "text"}})).status, 200);
  EXPECT_EQ(Ask(with("stop", nullptr)).status, 200);
  EXPECT_EQ(engine_.submitted().size(), 2u);
}

TEST_F(Chat, TokenizeTakesMessagesOrAPrompt) {
  const auto tokenize = [this](const json& body) { return Post(http(), "/tokenize", body.dump()); };
  EXPECT_EQ(tokenize({{"prompt", "x"}}).status, 200);
  EXPECT_EQ(tokenize({{"messages", kHi}}).status, 200);
  const RawResponse both = tokenize({{"prompt", "x"}, {"messages", kHi}});
  EXPECT_EQ(both.status, 400);
  EXPECT_EQ(both.error()["param"], "messages") << both.body;
}

TEST_F(Chat, BadMessagesAreNamedByIndex) {
  const auto message = [&](const char* text, const std::string& param) {
    Refused({{"messages", json::array({json::parse(text)})}}, "messages[0]" + param);
  };
  Refused(json::object(), "messages");
  Refused({{"messages", json::array()}}, "messages");
  Refused({{"messages", "hi"}}, "messages");
  Refused({{"messages", json(limits::kChatMessages + 1, kHi[0])}}, "messages");
  message("1", "");
  message(R"({"content":"x"})", ".role");
  message(R"({"role":"user"})", ".content");
  message(R"({"role":"user","content":null})", ".content");
  message(R"({"role":"wizard","content":"x"})", ".role");
  message(R"({"role":"function","content":"x"})", ".role");
  message(R"({"role":"user","content":"x","mood":1})", ".mood");
  message(R"({"role":"user","content":"x","tool_calls":[]})", ".tool_calls");
  message(R"({"role":"user","content":[{"type":"image_url","image_url":{"url":"http://x"}}]})",
          ".content[0].type");
  message(R"({"role":"user","content":[{"type":"text"}]})", ".content[0].text");
  message(R"({"role":"user","content":[{"type":"text","text":"x","y":1}]})", ".content[0].y");
  message(R"({"role":"assistant","content":"x","refusal":"no"})", ".refusal");
  message(R"({"role":"assistant","tool_calls":[]})", ".content");
  message(R"({"role":"assistant","tool_calls":1})", ".tool_calls");
  message(R"({"role":"assistant","tool_calls":[{"id":"a"}]})", ".tool_calls[0].function");
  message(R"({"role":"assistant","tool_calls":[{"function":{"name":"a b"}}]})",
          ".tool_calls[0].function.name");
  message(R"({"role":"assistant","tool_calls":[{"function":{"name":"a","arguments":"{"}}]})",
          ".tool_calls[0].function.arguments");
  message(R"({"role":"assistant","tool_calls":[{"function":{"name":"a","arguments":"[]"}}]})",
          ".tool_calls[0].function.arguments");
  EXPECT_TRUE(engine_.submitted().empty());
}

TEST_F(Chat, BadToolsAreNamedByIndex) {
  const auto tool = [&](const json& value, const std::string& param) {
    Refused({{"messages", kHi}, {"tools", json::array({value})}}, "tools[0]" + param);
  };
  Refused({{"messages", kHi}, {"tools", 1}}, "tools");
  Refused({{"messages", kHi}, {"tools", json(limits::kTools + 1, tools_[1])}}, "tools");
  tool(1, "");
  tool({{"type", "retrieval"}}, ".type");
  tool({{"type", "function"}}, ".function");
  tool({{"type", "function"}, {"function", {{"name", ""}}}}, ".function.name");
  tool({{"type", "function"}, {"function", {{"name", std::string(65, 'a')}}}}, ".function.name");
  tool({{"type", "function"}, {"function", {{"name", "a"}, {"parameters", 1}}}},
       ".function.parameters");
  tool({{"type", "function"}, {"function", {{"name", "a"}, {"strict", true}}}}, ".function.strict");
  tool({{"type", "function"}, {"function", {{"name", "a"}, {"x", 1}}}}, ".function.x");
  json wide = tools_[1];
  for (size_t i = 0; i < limits::kToolValues; ++i) {
    wide["function"]["parameters"]["k" + std::to_string(i)] = i;
  }
  Refused({{"messages", kHi}, {"tools", {wide}}}, "tools");
}

TEST_F(Chat, ATemplatesRefusalIsTheClients) {
  UseTemplate("{{ raise_exception('roles must alternate') }}");
  const RawResponse response = Ask({{"messages", kHi}});
  EXPECT_EQ(response.status, 400);
  EXPECT_THAT(response.error()["message"].get<std::string>(), HasSubstr("roles must alternate"));
  EXPECT_EQ(response.error()["param"], "messages");
  model_.chat_template.reset();
  Open();
  Refused({{"messages", kHi}}, "messages");
}

TEST_F(Chat, AClientThatLeavesFreesItsRequest) {
  engine_.script = [](const Request&) { return Script{.tokens = {{70}}}; };
  engine_.Hold();
  RawClient client(http());
  client.Send(
      PostBytes("/v1/chat/completions", json({{"messages", kHi}, {"stream", true}}).dump()));
  ASSERT_TRUE(engine_.WaitSubmitted(1));
  engine_.Tick(1);
  ASSERT_TRUE(client.WaitFor("\"content\":"));
  client.Close();
  EXPECT_TRUE(engine_.WaitCancelled(1));
}

}  // namespace
}  // namespace lockstep
