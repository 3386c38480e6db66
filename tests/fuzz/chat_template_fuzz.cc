// Messages that nobody vouches for, rendered by templates of each kind. Parts of
// the input end at a byte of 0x1e: role, content, tool calls, id, name of each
// message, after the tools and variables of the conversation.
#include <filesystem>
#include <string>
#include <vector>

#include "common/check.h"
#include "coordinator/text/chat_template.h"
#include "coordinator/text/utf8.h"
#include "tests/fuzz/fuzz_input.h"

namespace lockstep::fuzz {
namespace {

constexpr char kEnd = 0x1e;
constexpr size_t kMostMessages = 64;

const std::vector<ChatTemplate>& All() {
  static const std::vector<ChatTemplate>& all = *[] {
    auto* const loaded = new std::vector<ChatTemplate>;
    const std::string root = LOCKSTEP_SOURCE_DIR;
    const std::string config = R"({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})";
    for (const char* name : {"header_blocks", "im_blocks", "inst_pairs", "jinja_features",
                             "marked_generation", "python_habits", "turns"}) {
      ScratchDir model;
      model.Write("tokenizer_config.json", config);
      const std::string path = root + "/tests/text/data/templates/" + name + ".jinja";
      std::filesystem::copy_file(path, model.path() + "/chat_template.jinja");
      auto read = ChatTemplate::Load(model.path());
      LOCKSTEP_CHECK(read.ok() && read->has_value());
      loaded->push_back(**read);
    }
    auto demo = ChatTemplate::Load(root + "/deploy/demo/model");
    LOCKSTEP_CHECK(demo.ok() && demo->has_value());
    loaded->push_back(**demo);
    return loaded;
  }();
  return all;
}

}  // namespace
}  // namespace lockstep::fuzz

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lockstep;
  fuzz::Input input(data, size);
  const uint8_t choice = input.Byte();
  const auto text = [&] { return std::string(input.Until(fuzz::kEnd)); };
  ChatContext context{
      .add_generation_prompt = choice % 2 == 0, .tools_json = text(), .variables_json = text()};
  std::vector<ChatMessage> messages;
  while (!input.empty() && messages.size() < fuzz::kMostMessages) {
    ChatMessage& message = messages.emplace_back();
    message.role = text();
    message.content = text();
    message.tool_calls_json = text();
    message.tool_call_id = text();
    message.name = text();
    if (message.content.starts_with('#')) message.parts = {message.content, message.name};
  }
  const ChatTemplate& chat = fuzz::All()[choice / 2 % fuzz::All().size()];
  const auto prompt = chat.Render(messages, context);
  if (prompt.ok()) {
    LOCKSTEP_CHECK(IsValidUtf8(*prompt));
  } else {
    fuzz::RequireRefusal(prompt.status());
  }
  return 0;
}
