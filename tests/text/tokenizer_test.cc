#include "coordinator/text/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "coordinator/text/tokenizer_config.h"
#include "tests/text/text_test_util.h"

namespace lockstep {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

class EveryTokenizer : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Text, EveryTokenizer, testing::ValuesIn(TokenizerNames()),
                         [](const auto& name) { return name.param; });

TEST_P(EveryTokenizer, GivesHuggingFacesIdsAndTexts) {
  auto tokenizer = LoadFixture(GetParam());
  const auto& golden = Golden()["tokenizers"][GetParam()];
  EXPECT_EQ(tokenizer->vocab_size(), golden["vocab_size"]);
  EXPECT_EQ(tokenizer->bos_token(), golden["bos"]);
  EXPECT_EQ(tokenizer->eos_token(), golden["eos"]);
  for (const auto& entry : golden["texts"]) {
    const std::string text = entry["text"];
    EXPECT_EQ(*tokenizer->Encode(text, false), entry["ids"].get<std::vector<TokenId>>()) << text;
    EXPECT_EQ(*tokenizer->Encode(text, true), entry["ids_special"].get<std::vector<TokenId>>())
        << text;
  }
  for (const auto& entry : golden["decodes"]) {
    const std::vector<TokenId> ids = entry["ids"];
    EXPECT_EQ(tokenizer->Decode(ids, false), entry["text"]);
    EXPECT_EQ(tokenizer->Decode(ids, true), entry["text_skipped"]);
  }
}

TEST_P(EveryTokenizer, UnknownIdsHaveNoText) {
  auto tokenizer = LoadFixture(GetParam());
  for (TokenId id : {tokenizer->vocab_size(), 1u << 24, 0xFFFFFFFFu}) {
    EXPECT_EQ(tokenizer->Decode({id}, false), "");
    EXPECT_EQ(tokenizer->DecodeAnswer({id}, false), "");
    EXPECT_EQ(tokenizer->TokenText(id), "");
    EXPECT_FALSE(tokenizer->IsSpecial(id));
  }
  EXPECT_EQ(tokenizer->TokenToId("no such token"), std::nullopt);
  EXPECT_EQ(tokenizer->TokenToId("\xFF"), std::nullopt);
}

TEST_P(EveryTokenizer, IsSharedByThreads) {
  auto tokenizer = LoadFixture(GetParam());
  const auto& texts = Golden()["tokenizers"][GetParam()]["texts"];
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int round = 0; round < 20; ++round) {
        for (const auto& entry : texts) {
          const std::vector<TokenId> ids = entry["ids"];
          EXPECT_EQ(*tokenizer->Encode(entry["text"].get<std::string>(), false), ids);
          EXPECT_FALSE(tokenizer->Decode(ids, false).empty() && ids.size() > 4);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(TokenizerTest, ShowsATokenByItself) {
  auto tokenizer = LoadFixture("byte_level");
  EXPECT_EQ(tokenizer->TokenText(*tokenizer->TokenToId("Ġthe")), " the");
  EXPECT_EQ(tokenizer->TokenText(*tokenizer->TokenToId("<|end|>")), "<|end|>");
  const TokenId byte = *tokenizer->TokenToId("ð");  // stands for 0xF0
  EXPECT_EQ(tokenizer->TokenText(byte), "\xEF\xBF\xBD");
  EXPECT_EQ(tokenizer->TokenBytes(byte), "\xF0");
  auto fallback = LoadFixture("byte_fallback");
  EXPECT_EQ(fallback->TokenBytes(*fallback->TokenToId("<0xE2>")), "\xE2");
  EXPECT_EQ(fallback->TokenText(*fallback->TokenToId("<0x41>")), "A");
  EXPECT_EQ(fallback->TokenText(*fallback->TokenToId("▁Hello")), " Hello");
}

TEST(TokenizerTest, KnowsSpecialAndEndTokens) {
  auto tokenizer = LoadFixture("byte_level");
  const TokenId end = *tokenizer->TokenToId("<|end|>");
  EXPECT_THAT(tokenizer->eos_token_ids(), ElementsAre(end));
  EXPECT_TRUE(tokenizer->IsSpecial(end));
  EXPECT_FALSE(tokenizer->IsSpecial(*tokenizer->TokenToId("<tool>")));
  EXPECT_FALSE(tokenizer->IsSpecial(0));
  EXPECT_THAT(LoadFixture("word_piece")->eos_token_ids(), IsEmpty());
}

TEST(TokenizerTest, AddsTokensThatOnlyTheConfigNames) {
  auto tokenizer = LoadFixture("unigram");
  const auto pad = tokenizer->TokenToId("<pad>");
  ASSERT_TRUE(pad.has_value());
  EXPECT_TRUE(tokenizer->IsSpecial(*pad));
  ASSERT_TRUE(tokenizer->TokenToId("<late>").has_value());
  EXPECT_FALSE(tokenizer->IsSpecial(*tokenizer->TokenToId("<late>")));
}

TEST(TokenizerTest, NeverTruncatesOrPads) {
  auto json = nlohmann::json::parse(ReadText(TextData("word_level/tokenizer.json")));
  json["truncation"] = {
      {"direction", "Right"}, {"max_length", 2}, {"strategy", "LongestFirst"}, {"stride", 0}};
  json["padding"] = {{"strategy", {{"Fixed", 64}}},
                     {"direction", "Right"},
                     {"pad_to_multiple_of", nullptr},
                     {"pad_id", 0},
                     {"pad_type_id", 0},
                     {"pad_token", "[UNK]"}};
  ModelDir dir;
  dir.Write("tokenizer.json", json.dump());
  auto tokenizer = Tokenizer::Load(dir.path());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->Encode("the dog the dog the", true)->size(), 5u);
}

TEST(TokenizerTest, RefusesTextThatIsNotUtf8) {
  auto ids = LoadFixture("byte_level")->Encode("abc\xFF", true);
  EXPECT_EQ(ids.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(ids.status().message()), HasSubstr("byte 3"));
}

std::string LoadError(const ModelDir& dir) {
  auto tokenizer = Tokenizer::Load(dir.path());
  EXPECT_FALSE(tokenizer.ok());
  const std::string message(tokenizer.status().message());
  EXPECT_THAT(message, AllOf(HasSubstr(dir.path()), Not(HasSubstr("\n"))));
  return message;
}

TEST(TokenizerTest, NamesTheFileThatIsMissingOrBad) {
  ModelDir dir;
  EXPECT_THAT(LoadError(dir), HasSubstr("tokenizer.json: No such file"));
  EXPECT_EQ(Tokenizer::Load(dir.path()).status().code(), absl::StatusCode::kNotFound);
  std::filesystem::create_directory(dir.path() + "/tokenizer.json");
  EXPECT_THAT(LoadError(dir), HasSubstr("not a regular file"));
  std::filesystem::remove(dir.path() + "/tokenizer.json");
  for (const char* text :
       {"", "{", "[]", "null", "{}", "\xFF\xFE", R"({"model": 3})",
        R"({"version":"1.0","model":{"type":"Nope","vocab":{}}})",
        R"({"version":"9.0","model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}})"}) {
    dir.Write("tokenizer.json", text);
    EXPECT_THAT(LoadError(dir), HasSubstr("tokenizer.json: ")) << text;
  }
  const std::string good = ReadText(TextData("word_level/tokenizer.json"));
  dir.Write("tokenizer.json", good);
  EXPECT_TRUE(Tokenizer::Load(dir.path()).ok());
  for (const char* text :
       {"", "[]", "{\"eos_token\": 3}", "{\"bos_token\": {\"text\": \"x\"}}",
        R"({"eos_token": {"content": "x", "lstrip": 7}})", R"({"chat_template": 5})",
        R"({"chat_template": [{"name": "rag", "template": ""}]})",
        R"({"added_tokens_decoder": {"x": {"content": "y"}}})",
        R"({"added_tokens_decoder": []})"}) {
    dir.Write("tokenizer_config.json", text);
    EXPECT_THAT(LoadError(dir), HasSubstr("tokenizer_config.json: ")) << text;
  }
  dir.Write("tokenizer_config.json", std::string("{}\0{", 4));
  EXPECT_THAT(LoadError(dir), HasSubstr("NUL"));
  dir.Write("tokenizer_config.json", "{}");
  dir.Write("tokenizer.json", good + std::string("\0x", 2));
  EXPECT_THAT(LoadError(dir), HasSubstr("tokenizer.json: "));
}

TEST(TokenizerTest, RefusesIdsTooLargeForATable) {
  ModelDir dir;
  dir.Write(
      "tokenizer.json",
      R"({"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0,"b":4294967295},"unk_token":"a"}})");
  EXPECT_THAT(LoadError(dir), HasSubstr("token id 4294967295 is too large"));
  dir.Write("tokenizer.json",
            R"({"version":"1.0","model":{"type":"WordLevel","vocab":{},"unk_token":"a"}})");
  EXPECT_THAT(LoadError(dir), HasSubstr("vocabulary is empty"));
}

TEST(TokenizerTest, GapsBetweenIdsHaveNoText) {
  ModelDir dir;
  dir.Write(
      "tokenizer.json",
      R"({"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0,"b":9},"unk_token":"a"}})");
  auto tokenizer = Tokenizer::Load(dir.path());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->vocab_size(), 10u);
  EXPECT_EQ((*tokenizer)->TokenText(5), "");
  EXPECT_EQ((*tokenizer)->Decode({9, 5, 0}, false), "b a");
}

TEST(TokenizerConfigTest, ReadsBothWaysOfWritingTokens) {
  ModelDir dir;
  dir.Write("tokenizer_config.json", R"({"bos_token": null, "eos_token": {"content": "</s>"}})");
  dir.Write("special_tokens_map.json",
            R"({"bos_token": "<s>", "eos_token": "late", "unk_token": ""})");
  auto config = TokenizerConfig::Load(dir.path());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->bos_token(), "<s>");
  EXPECT_EQ(config->eos_token(), "</s>");
  EXPECT_EQ(config->special_tokens.size(), 2u);
}

TEST(TokenizerConfigTest, TheFirstFileThatNamesATokenDecides) {
  ModelDir dir;
  dir.Write("tokenizer_config.json", R"({"eos_token": {"content": "</s>", "lstrip": true}})");
  dir.Write("special_tokens_map.json", R"({"eos_token": {"content": "late", "rstrip": true}})");
  auto config = TokenizerConfig::Load(dir.path());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->eos_token(), "</s>");
  EXPECT_EQ(nlohmann::json::parse(config->added_tokens_json),
            nlohmann::json::parse(R"([{"content": "</s>", "lstrip": true, "special": true}])"));
}

TEST(TokenizerConfigTest, TokensKeepTheirFlags) {
  const char kToken[] = R"({"content": "<x>", "special": false, "single_word": true,
                            "lstrip": true, "rstrip": false, "normalized": true})";
  ModelDir dir;
  dir.Write("tokenizer_config.json",
            std::string(R"({"added_tokens_decoder": {"7": )") + kToken + "}}");
  auto config = TokenizerConfig::Load(dir.path());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(nlohmann::json::parse(config->added_tokens_json),
            nlohmann::json::array({nlohmann::json::parse(kToken)}));
}

TEST(TokenizerConfigTest, FilesOfAnySizeAreNotRead) {
  ModelDir dir;
  dir.Write("tokenizer_config.json", "{}  ");
  const std::string path = dir.path() + "/tokenizer_config.json";
  EXPECT_TRUE(ReadModelFile(path, 4).ok());
  EXPECT_THAT(std::string(ReadModelFile(path, 3).status().message()),
              AllOf(HasSubstr(path), HasSubstr("4 bytes; at most 3")));
  std::filesystem::resize_file(path, (size_t{64} << 20) + 1);  // a hole
  EXPECT_THAT(std::string(TokenizerConfig::Load(dir.path()).status().message()),
              HasSubstr("at most 67108864"));
}

}  // namespace
}  // namespace lockstep
