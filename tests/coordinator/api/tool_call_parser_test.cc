#include "coordinator/api/http/tool_call_parser.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace lockstep {
namespace {

const std::vector<std::string> kFunctions = {"f", "g"};

// As the text comes in pieces of `size` bytes.
ToolCallParser::Found Parse(const std::string& text, size_t size) {
  ToolCallParser parser(kFunctions);
  ToolCallParser::Found all;
  const auto add = [&all](ToolCallParser::Found found) {
    all.text += found.text;
    for (ToolCall& call : found.calls) all.calls.push_back(std::move(call));
  };
  for (size_t i = 0; i < text.size(); i += size) add(parser.Push(text.substr(i, size)));
  add(parser.Finish());
  return all;
}

struct Case {
  std::string answer, text;
  std::vector<std::string> calls;  // name and arguments
};

TEST(ToolCallParser, FindsCallsHoweverTheTextIsCut) {
  const std::vector<Case> cases = {
      {"", "", {}},
      {"  plain text \n", "  plain text \n", {}},
      {"a < b <tool", "a < b <tool", {}},
      {"<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>", "", {"f{}"}},
      {"Look.\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"b\": 1, \"a\": \"}\"}}\n"
       "</tool_call>\n",
       "Look.",
       {"f{\"b\": 1, \"a\": \"}\"}"}},
      {"<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>\n<tool_call>{\"arguments\":"
       "{\"x\":[1,{}]},\"name\":\"g\"}</tool_call> done",
       " done",
       {"f{}", "g{\"x\":[1,{}]}"}},
      // Without the closing tag, as where it is the ending token.
      {"<tool_call>{\"name\":\"f\",\"arguments\":{}}", "", {"f{}"}},
      // An unknown function, arguments that are none, a half call: text, all of it.
      {"x <tool_call>{\"name\":\"h\",\"arguments\":{}}</tool_call> y",
       "x <tool_call>{\"name\":\"h\",\"arguments\":{}}</tool_call> y",
       {}},
      {"<tool_call>{\"name\":\"f\",\"arguments\":\"{}\"}</tool_call>",
       "<tool_call>{\"name\":\"f\",\"arguments\":\"{}\"}</tool_call>",
       {}},
      {"x <tool_call>{\"name\":", "x <tool_call>{\"name\":", {}},
      {"{\"name\": \"f\", \"parameters\": {\"k\": \"\\\"\"}}", "", {"f{\"k\": \"\\\"\"}"}},
      {"<|python_tag|>{\"type\":\"function\",\"function\":\"g\",\"parameters\":{}}", "", {"g{}"}},
      {"\n{\"name\":\"f\",\"parameters\":{}}; {\"name\":\"g\",\"parameters\":{}} ",
       "",
       {"f{}", "g{}"}},
      // An answer that is JSON and no call.
      {"{\"name\": \"h\", \"parameters\": {}}", "{\"name\": \"h\", \"parameters\": {}}", {}},
      {"{\"name\": \"f\", \"parameters\": {}} and more",
       "{\"name\": \"f\", \"parameters\": {}} and more",
       {}},
      {"{}", "{}", {}},
      {"{", "{", {}},
      {"{ <tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>", "{", {"f{}"}},
      {"<|python", "<|python", {}},
      // Members before the arguments, of every kind.
      {"{\"a\":\"\\\\\",\"b\":[\"]\"],\"c\":{\"d\":1},\"e\":-1.5,\"name\":\"f\",\"parameters\":{"
       "\"n\":2}}",
       "",
       {"f{\"n\":2}"}},
      // An escaped name of a member is the same member.
      {"{\"name\":\"f\",\"param\\u0065ters\":{\"n\":2}}", "", {"f{\"n\":2}"}},
  };
  for (const Case& each : cases) {
    for (const size_t size : {1ul, 2ul, 3ul, 7ul, 1000ul}) {
      SCOPED_TRACE(each.answer + " in pieces of " + std::to_string(size));
      const ToolCallParser::Found found = Parse(each.answer, size);
      EXPECT_EQ(found.text, each.text);
      std::vector<std::string> calls;
      for (const ToolCall& call : found.calls) calls.push_back(call.name + call.arguments);
      EXPECT_EQ(calls, each.calls);
    }
  }
}

TEST(ToolCallParser, TextIsNotHeldBackWithoutReason) {
  ToolCallParser parser(kFunctions);
  EXPECT_EQ(parser.Push("Hello").text, "Hello");
  EXPECT_EQ(parser.Push(" wor<").text, " wor");
  EXPECT_EQ(parser.Push("b>").text, "<b>");
}

TEST(ToolCallParser, DeepNestingIsText) {
  const std::string deep(100'000, '[');
  const std::string answer = "{\"name\":\"f\",\"parameters\":{\"x\":" + deep;
  EXPECT_EQ(Parse(answer, 1000).text, answer);
  const std::string closed = answer + std::string(100'000, ']') + "}}";
  EXPECT_EQ(Parse(closed, 1000).text, closed);
}

}  // namespace
}  // namespace lockstep
