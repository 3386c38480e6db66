// Finds function calls in an answer as it comes, in the forms that models write:
//
//   Hermes, Qwen   text <tool_call>{"name": .., "arguments": {..}}</tool_call> ...
//   Llama 3        the whole answer {"name": .., "parameters": {..}}, several
//                  separated by ";", perhaps after <|python_tag|>
//
// A call counts when it names one of the request's functions and its arguments
// are an object; anything else is text. What may yet become a call is held back.
// Not thread-safe; memory is that of the answer.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_TOOL_CALL_PARSER_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_TOOL_CALL_PARSER_H_

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace lockstep {

struct ToolCall {
  std::string name;
  std::string arguments;  // the text of a JSON object, as the model wrote it
};

class ToolCallParser {
 public:
  // `functions` outlives the parser.
  explicit ToolCallParser(const std::vector<std::string>& functions) : functions_(functions) {}

  struct Found {
    std::string text;  // before the calls
    std::vector<ToolCall> calls;
  };
  Found Push(std::string_view text);
  // The answer is over: what was held back is a call or text.
  Found Finish();

 private:
  enum class State { kStart, kText, kCall, kWholeAnswer };

  std::optional<ToolCall> ReadCall(std::string_view json) const;
  // All calls of a Llama answer, or none when any of it is something else.
  std::vector<ToolCall> ReadAnswer(std::string_view text) const;
  void Advance(Found* found);
  // Moves text out of held_, but for space at its end, which may precede a call.
  void TakeText(size_t size, Found* found);

  const std::vector<std::string>& functions_;
  State state_ = State::kStart;
  bool after_call_ = false;  // space between calls is no text
  std::string held_;
  std::string gap_;  // space before the call that is held
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_TOOL_CALL_PARSER_H_
