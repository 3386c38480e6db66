// A model's answer, searched for function calls: what is found does not depend
// on how the answer was cut into pieces, and calls name functions that there are.
#include <string>
#include <vector>

#include "common/check.h"
#include "coordinator/api/http/tool_call_parser.h"
#include "nlohmann/json.hpp"
#include "tests/fuzz/fuzz_input.h"

namespace lockstep::fuzz {
namespace {

ToolCallParser::Found Read(std::string_view answer, size_t piece) {
  static const std::vector<std::string>& functions = *new std::vector<std::string>{"f", "get"};
  ToolCallParser parser(functions);
  ToolCallParser::Found all;
  const auto add = [&](ToolCallParser::Found found) {
    // Text after a call would be out of its place.
    all.text += found.text;
    for (ToolCall& call : found.calls) {
      LOCKSTEP_CHECK(call.name == "f" || call.name == "get");
      LOCKSTEP_CHECK(nlohmann::json::parse(call.arguments, nullptr, false).is_object());
      all.calls.push_back(std::move(call));
    }
  };
  for (size_t at = 0; at < answer.size(); at += piece) add(parser.Push(answer.substr(at, piece)));
  add(parser.Finish());
  return all;
}

}  // namespace
}  // namespace lockstep::fuzz

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lockstep::fuzz;
  Input input(data, size);
  const size_t piece = input.Byte() % 16 + size_t{1};
  const std::string answer(input.Rest());
  const auto whole = Read(answer, answer.size() + 1), cut = Read(answer, piece);
  LOCKSTEP_CHECK(whole.text == cut.text);
  LOCKSTEP_CHECK(whole.calls.size() == cut.calls.size());
  for (size_t i = 0; i < whole.calls.size(); ++i) {
    LOCKSTEP_CHECK(whole.calls[i].name == cut.calls[i].name);
    LOCKSTEP_CHECK(whole.calls[i].arguments == cut.calls[i].arguments);
  }
  if (whole.calls.empty()) LOCKSTEP_CHECK(whole.text == answer);
  return 0;
}
