#include "coordinator/text/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "tests/text/text_test_util.h"

namespace lockstep {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

ChatTemplate Compile(const std::string& source) {
  ModelDir dir;
  dir.Write("chat_template.jinja", source);
  auto loaded = ChatTemplate::Load(dir.path());
  EXPECT_TRUE(loaded.ok() && loaded->has_value()) << loaded.status();
  return **loaded;
}

absl::Status RenderError(const std::string& source) {
  return Compile(source).Render({{"user", "hi"}}, true).status();
}

TEST(ChatTemplateTest, RendersAsHuggingFaceDoes) {
  const std::string config = ReadText(TextData("byte_level/tokenizer_config.json"));
  for (const auto& golden : Golden()["renders"]) {
    const std::string name = golden["template"];
    ModelDir dir;
    dir.Write("tokenizer_config.json", config);
    dir.Write("chat_template.jinja", ReadText(TextData("templates/" + name)));
    auto chat_template = ChatTemplate::Load(dir.path());
    ASSERT_TRUE(chat_template.ok()) << chat_template.status();
    std::vector<ChatMessage> messages;
    for (const auto& message : golden["chat"]) messages.push_back({message[0], message[1]});
    auto text = (*chat_template)->Render(messages, golden["add_generation_prompt"]);
    if (golden.contains("error")) {
      EXPECT_EQ(text.status().code(), absl::StatusCode::kInvalidArgument) << name;
      EXPECT_EQ(std::string(text.status().message()), golden["error"]) << name;
    } else {
      ASSERT_TRUE(text.ok()) << name << ": " << text.status();
      EXPECT_EQ(*text, golden["text"]) << name;
    }
  }
}

TEST(ChatTemplateTest, TheFileComesBeforeTheConfig) {
  ModelDir dir;
  auto none = ChatTemplate::Load(dir.path());
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_FALSE(none->has_value());

  dir.Write("tokenizer_config.json", R"({"chat_template": "config {{ messages[0].content }}"})");
  EXPECT_EQ(*(*ChatTemplate::Load(dir.path()))->Render({{"user", "x"}}, false), "config x");
  dir.Write(
      "tokenizer_config.json",
      R"({"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]})");
  EXPECT_EQ(*(*ChatTemplate::Load(dir.path()))->Render({{"user", "x"}}, false), "yes");
  dir.Write("chat_template.jinja", "file");
  EXPECT_EQ(*(*ChatTemplate::Load(dir.path()))->Render({{"user", "x"}}, false), "file");
}

TEST(ChatTemplateTest, GivesTheTemplateItsOwnTokens) {
  ModelDir dir;
  dir.Write("tokenizer_config.json", R"({"bos_token": {"content": "<s>"}, "eos_token": "</s>"})");
  dir.Write(
      "chat_template.jinja",
      "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ 'go' if add_generation_prompt }}");
  auto chat_template = ChatTemplate::Load(dir.path());
  ASSERT_TRUE(chat_template.ok());
  EXPECT_EQ(*(*chat_template)->Render({{"user", "x"}}, true), "<s>x</s>go");
  EXPECT_EQ(*(*chat_template)->Render({{"user", "x"}}, false), "<s>x</s>");
}

TEST(ChatTemplateTest, AVariableTakesNoNameThatIsInUse) {
  const ChatTemplate shown = Compile("{{ messages[0].content }}{{ tools }}{{ mood }}");
  const auto with = [&](const std::string& name) {
    ChatContext context;
    context.variables_json = "{\"" + name + "\":\"y\"}";
    return shown.Render({{"user", "x"}}, context);
  };
  EXPECT_TRUE(with("mood").ok()) << with("mood").status();
  for (const char* name : {"messages", "tools", "documents", "add_generation_prompt"}) {
    EXPECT_EQ(with(name).status().code(), absl::StatusCode::kInvalidArgument) << name;
    EXPECT_THAT(std::string(with(name).status().message()),
                HasSubstr("'" + std::string(name) + "' is not free"));
  }
}

TEST(ChatTemplateTest, RaiseExceptionIsTheClientsError) {
  absl::Status status = RenderError("{{ raise_exception('roles must\nalternate') }}");
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(std::string(status.message()), "roles must alternate");
  status = RenderError(
      "{% macro m() %}{% for x in [1] %}{{ raise_exception('deep ' ~ x) }}{% endfor %}{% endmacro "
      "%}"
      "{% set s %}{{ m() }}{% endset %}");
  EXPECT_EQ(std::string(status.message()), "deep 1");
  status = RenderError("{{ raise_exception('no role \x01\x7f') }}");
  EXPECT_EQ(std::string(status.message()), "no role \\x01\\x7f");
}

TEST(ChatTemplateTest, ErrorsNameTheLine) {
  ModelDir dir;
  dir.Write("chat_template.jinja", "fine\n{% if %}");
  auto loaded = ChatTemplate::Load(dir.path());
  EXPECT_EQ(loaded.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(loaded.status().message()),
              AllOf(HasSubstr(dir.path() + "/chat_template.jinja: line 2"), Not(HasSubstr("\n"))));
  absl::Status status = RenderError("a\nb\n{{ messages | no_such_filter }}");
  EXPECT_THAT(std::string(status.message()), HasSubstr("no_such_filter"));
  status = RenderError("a\nb\n{{ messages[0].content.foo.bar }}");
  EXPECT_THAT(std::string(status.message()), HasSubstr("line 3"));
}

TEST(ChatTemplateTest, TellsTheTimeItIsGiven) {
  setenv("TZ", "UTC", 1);
  tzset();
  ChatTemplate t = Compile(
      "{{ strftime_now('%d %b %Y %H:%M') }}|{{ strftime_now('') }}|{{ strftime_now('%%') }}");
  EXPECT_EQ(*t.RenderAt({}, false, 1'721'952'000), "26 Jul 2024 00:00||%");
  EXPECT_EQ(*t.RenderAt({}, false, -1), "31 Dec 1969 23:59||%");
  EXPECT_TRUE(t.RenderAt({}, false, INT64_MAX).status().code() ==
              absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(Compile("{{ strftime_now('%9999999999d') }}").Render({}, false).ok());
  EXPECT_FALSE(Compile("{{ strftime_now('a\\x00b') }}").Render({}, false).ok());
}

TEST(ChatTemplateTest, RefusesMessagesThatAreNotUtf8) {
  auto text = Compile("{{ messages }}").Render({{"user", "ok"}, {"user", "\xC3"}}, false);
  EXPECT_EQ(text.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(text.status().message()), HasSubstr("messages[1]"));
}

TEST(ChatTemplateTest, ContentIsTextNotTemplate) {
  const std::string content = "{{ 1 + 1 }}{% raw %}\"}],\\u0000\\";
  EXPECT_EQ(*Compile("{{ messages[0].content }}").Render({{"user", content}}, false), content);
  const std::string nul("a\0b", 3);
  EXPECT_EQ(*Compile("{{ messages[0].content }}").Render({{"user", nul}}, false), nul);
}

TEST(ChatTemplateTest, EndlessWorkIsCutShort) {
  for (const char* source :
       {"{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for a in range(90000) %}{{ 'x' * 100000 }}{% endfor %}",
        "{% set x %}{% for a in range(90000) %}{{ 'x' * 100000 }}{% endfor %}{% endset %}",
        "{{ 'x' * 99999999 }}", "{{ 'x' * 99999999999 }}",
        "{% for a in range(99999999999) %}{% endfor %}"}) {
    absl::Status status = RenderError(source);
    EXPECT_FALSE(status.ok()) << source;
    EXPECT_THAT(std::string(status.message()), Not(HasSubstr("\n")));
  }
  EXPECT_EQ(
      RenderError("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}")
          .code(),
      absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(RenderError("{{ 'x' * 9000000 }}").code(), absl::StatusCode::kResourceExhausted);
}

TEST(ChatTemplateTest, DeepValuesDoNotOverflowTheStack) {
  const std::string nest =
      "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor "
      "%}";
  // Whether it fits the step budget or not: no crash, when built, dropped or shown.
  (void)RenderError(nest);
  for (const char* use :
       {"{{ ns.x }}", "{{ ns.x | tojson }}", "{{ ns.x ~ '' }}", "{{ ns.x == ns.x }}", ""}) {
    (void)RenderError(
        "{% set ns = namespace(x=[]) %}{% for i in range(20000) %}{% set ns.x = [ns.x] %}"
        "{% endfor %}" +
        std::string(use));
  }
  const std::vector<ChatMessage> many(4000, {"user", "x"});  // the largest step budget
  const std::string literal = std::string(40, '[') + "ns.x" + std::string(40, ']');
  for (const std::string use :
       {"{{ ns.x == [ns.x] }}", "{% set y = ns.x ~ '' %}", "{% set y = {ns.x: 1} %}"}) {
    const ChatTemplate deepest = Compile(
        "{% set ns = namespace(x=[]) %}{% for i in range(10000) %}{% set ns.x = " + literal +
        " %}{% endfor %}" + use);
    EXPECT_TRUE(deepest.Render(many, false).ok()) << use;
  }
  std::string deep;
  for (int i = 0; i < 20'000; ++i) deep += "[";
  ModelDir dir;
  dir.Write("chat_template.jinja", "{{ " + deep + " }}");
  EXPECT_FALSE(ChatTemplate::Load(dir.path()).ok());
  std::string chain = "{% if a %}";
  for (int i = 0; i < 20'000; ++i) chain += "{% elif a %}";
  dir.Write("chat_template.jinja", chain + "{% endif %}");
  (void)ChatTemplate::Load(dir.path());
  std::string sum = "{{ 1";
  for (int i = 0; i < 100'000; ++i) sum += "+1";
  dir.Write("chat_template.jinja", sum + " }}");
  (void)ChatTemplate::Load(dir.path());
}

TEST(ChatTemplateTest, LongConversationsFitTheBounds) {
  ModelDir dir;
  dir.Write("tokenizer_config.json", R"({"bos_token": "<s>", "eos_token": "</s>"})");
  for (const char* name :
       {"header_blocks.jinja", "im_blocks.jinja", "inst_pairs.jinja", "turns.jinja"}) {
    dir.Write("chat_template.jinja", ReadText(TextData("templates/" + std::string(name))));
    auto chat_template = ChatTemplate::Load(dir.path());
    ASSERT_TRUE(chat_template.ok()) << chat_template.status();
    std::vector<ChatMessage> messages;
    for (int i = 0; i < 4000; ++i) messages.push_back({i % 2 == 0 ? "user" : "assistant", "words"});
    messages.push_back({"user", std::string(4 << 20, 'x')});
    EXPECT_TRUE((*chat_template)->Render(messages, true).ok()) << name;
  }
}

TEST(ChatTemplateTest, IsSharedByThreads) {
  const ChatTemplate shared = Compile("{% for m in messages %}{{ m.content }};{% endfor %}");
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([shared, t] {
      const std::string own = std::to_string(t);
      for (int i = 0; i < 50; ++i) {
        auto text = shared.Render({{"user", own}, {"user", own}}, false);
        ASSERT_TRUE(text.ok());
        EXPECT_EQ(*text, own + ";" + own + ";");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace lockstep
