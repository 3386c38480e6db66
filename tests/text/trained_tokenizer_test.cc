// Tokenizers with trained merges, and the demo model's, against what Hugging
// Face's code gave: tests/golden/text/golden.json, made by the script beside it.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "coordinator/text/chat_template.h"
#include "coordinator/text/tokenizer.h"
#include "tests/text/text_test_util.h"

namespace lockstep {
namespace {

const nlohmann::json& TrainedGolden() {
  static const auto& golden = *new nlohmann::json(nlohmann::json::parse(
      ReadText(std::string(LOCKSTEP_SOURCE_DIR) + "/tests/golden/text/golden.json")));
  return golden;
}

TEST(TrainedTokenizerTest, EncodesAndDecodesAsHuggingFaceDoes) {
  ASSERT_EQ(TrainedGolden().size(), 4u);
  for (const auto& [folder, golden] : TrainedGolden().items()) {
    SCOPED_TRACE(folder);
    auto tokenizer = Tokenizer::Load(std::string(LOCKSTEP_SOURCE_DIR) + "/" + folder);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    EXPECT_EQ((*tokenizer)->vocab_size(), golden["vocab_size"]);
    EXPECT_EQ((*tokenizer)->bos_token(), golden["bos"]);
    EXPECT_EQ((*tokenizer)->eos_token(), golden["eos"]);
    for (const auto& entry : golden["texts"]) {
      const std::string text = entry["text"];
      EXPECT_EQ(*(*tokenizer)->Encode(text, false), entry["ids"].get<std::vector<TokenId>>())
          << text;
      EXPECT_EQ(*(*tokenizer)->Encode(text, true), entry["ids_special"].get<std::vector<TokenId>>())
          << text;
    }
    for (const auto& entry : golden["decodes"]) {
      const std::vector<TokenId> ids = entry["ids"];
      EXPECT_EQ((*tokenizer)->Decode(ids, false), entry["text"]);
      EXPECT_EQ((*tokenizer)->Decode(ids, true), entry["text_skipped"]);
    }
  }
}

TEST(TrainedTokenizerTest, RendersTheirChatTemplates) {
  for (const auto& [folder, golden] : TrainedGolden().items()) {
    SCOPED_TRACE(folder);
    auto chat_template = ChatTemplate::Load(std::string(LOCKSTEP_SOURCE_DIR) + "/" + folder);
    ASSERT_TRUE(chat_template.ok() && chat_template->has_value()) << chat_template.status();
    for (const auto& render : golden["renders"]) {
      std::vector<ChatMessage> messages;
      for (const auto& message : render["chat"]) messages.push_back({message[0], message[1]});
      auto text = (*chat_template)->Render(messages, render["add_generation_prompt"]);
      if (render.contains("error")) {
        EXPECT_EQ(std::string(text.status().message()), render["error"]);
      } else {
        ASSERT_TRUE(text.ok()) << text.status();
        EXPECT_EQ(*text, render["text"]);
      }
    }
  }
}

}  // namespace
}  // namespace lockstep
