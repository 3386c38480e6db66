// Random and mutated input for every entry point of the C ABI. What is asked for
// is little: an answer or a one-line error, no crash, nothing leaked or read out
// of bounds (the sanitizers watch), in bounded time.
#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

#include "coordinator/text/chat_template.h"
#include "coordinator/text/detokenizer.h"
#include "coordinator/text/ffi/lockstep_text.h"
#include "coordinator/text/internal/ffi.h"
#include "coordinator/text/utf8.h"
#include "tests/text/text_test_util.h"

namespace lockstep {
namespace {

std::string RandomBytes(Random& random, uint32_t most) {
  std::string out;
  for (uint32_t n = random.Below(most); n > 0; --n) out += static_cast<char>(random.Below(256));
  return out;
}

// Some bytes changed, removed, doubled or swapped for others of the same text.
std::string Mutate(Random& random, std::string text) {
  for (uint32_t n = random.Below(3) + 1; n > 0 && !text.empty(); --n) {
    const size_t at = random.Below(static_cast<uint32_t>(text.size()));
    const size_t from = random.Below(static_cast<uint32_t>(text.size()));
    const size_t size = random.Below(40);
    // Mostly small changes: much of the text still parses.
    const uint32_t kind = random.Below(12);
    switch (kind < 5 ? kind : 3) {
      case 0:
        text[at] = static_cast<char>(random.Below(256));
        break;
      case 1:
        text.erase(at, size);
        break;
      case 2:
        text.insert(at, text.substr(from, size));
        break;
      case 3:
        text[at] = "0123456789{}[]\",:-."[random.Below(19)];
        break;
      default:
        text.resize(at);
        break;
    }
  }
  return text;
}

void ExpectOneLine(LockstepTextStatus status, const ffi::Text& error) {
  if (status == LOCKSTEP_TEXT_OK) {
    EXPECT_TRUE(error.view().empty());
    return;
  }
  EXPECT_FALSE(error.view().empty());
  EXPECT_TRUE(IsValidUtf8(error.view()));
  EXPECT_EQ(error.view().find('\n'), std::string_view::npos);
}

void UseTokenizer(Random& random, LockstepTokenizer* tokenizer) {
  LockstepTokenTable table;
  {
    ffi::Text error;
    ASSERT_EQ(lockstep_tokenizer_table(tokenizer, &table, error.out()), LOCKSTEP_TEXT_OK);
  }
  ASSERT_GT(table.size, 0u);
  for (uint32_t id = 0; id < table.size; ++id) ASSERT_LE(table.offsets[id], table.offsets[id + 1]);
  for (const std::string& text :
       {RandomBytes(random, 60), std::string("Hello <|end|> é 12"), std::string()}) {
    LockstepIds ids;
    ffi::Text error;
    const auto status =
        lockstep_tokenizer_encode(tokenizer, text.data(), text.size(), 1, &ids, error.out());
    ExpectOneLine(status, error);
    lockstep_ids_free(ids);
  }
  std::vector<uint32_t> ids;
  for (int i = 0; i < 20; ++i) ids.push_back(random.Below(table.size + 3));
  ffi::Text text, error;
  const auto status =
      lockstep_tokenizer_decode(tokenizer, ids.data(), ids.size(), 1, text.out(), error.out());
  ExpectOneLine(status, error);
  EXPECT_TRUE(IsValidUtf8(text.view()));
}

TEST(HostileTextTest, MutatedTokenizersLoadOrExplain) {
  Random random(21);
  int loaded = 0, refused = 0;
  for (const std::string& name : TokenizerNames()) {
    const std::string json = ReadText(TextData(name + "/tokenizer.json"));
    for (int round = 0; round < 150; ++round) {
      const std::string bad = Mutate(random, json);
      LockstepTokenizer* tokenizer = nullptr;
      ffi::Text error;
      const auto status =
          lockstep_tokenizer_new(bad.data(), bad.size(), "[]", 2, &tokenizer, error.out());
      ExpectOneLine(status, error);
      ASSERT_EQ(status == LOCKSTEP_TEXT_OK, tokenizer != nullptr);
      if (tokenizer != nullptr) UseTokenizer(random, tokenizer);
      ++(tokenizer != nullptr ? loaded : refused);
      lockstep_tokenizer_free(tokenizer);
    }
  }
  EXPECT_GT(loaded, 50);
  EXPECT_GT(refused, 50);
}

TEST(HostileTextTest, RandomBytesAreNoTokenizer) {
  Random random(22);
  for (int round = 0; round < 500; ++round) {
    const std::string json = RandomBytes(random, 100);
    const std::string added = RandomBytes(random, 100);
    LockstepTokenizer* tokenizer = nullptr;
    ffi::Text error;
    const auto status = lockstep_tokenizer_new(json.data(), json.size(), added.data(), added.size(),
                                               &tokenizer, error.out());
    EXPECT_NE(status, LOCKSTEP_TEXT_OK);
    ExpectOneLine(status, error);
  }
}

TEST(HostileTextTest, OddDecodersAndPatternsDoNotCrash) {
  const std::string head =
      R"({"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0,"":1,"b":2},"unk_token":"a"})";
  std::string nested = R"({"type":"Fuse"})";
  for (int i = 0; i < 200; ++i) nested = R"({"type":"Sequence","decoders":[)" + nested + "]}";
  std::string groups(3000, '(');
  groups += std::string(3000, ')');
  Random random(23);
  for (
      const std::string& tail : {
          std::string(R"("decoder":{"type":"Strip","content":"a","start":0,"stop":9})"),
          std::string(
              R"("decoder":{"type":"Strip","content":"a","start":18446744073709551615,"stop":18446744073709551615})"),
          std::string(R"("decoder":{"type":"BPEDecoder","suffix":""})"),
          std::string(
              R"("decoder":{"type":"CTC","pad_token":"a","word_delimiter_token":"","cleanup":true})"),
          std::string(R"("decoder":{"type":"WordPiece","prefix":"","cleanup":true})"),
          std::string(R"("decoder":{"type":"Replace","pattern":{"Regex":""},"content":"zzzz"})"),
          std::string(
              R"("decoder":{"type":"Replace","pattern":{"Regex":"((a|aa)+)+$"},"content":""})"),
          std::string(R"("decoder":{"type":"Sequence","decoders":[]})"),
          R"("decoder":)" + nested,
          R"("pre_tokenizer":{"type":"Split","pattern":{"Regex":")" + groups +
              R"("},"behavior":"Isolated","invert":false})",
          std::string(
              R"("pre_tokenizer":{"type":"Split","pattern":{"Regex":"(?:a{1000}){1000}{1000}"},"behavior":"Isolated","invert":false})"),
          std::string(
              R"("post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"x","type_id":0}}],"pair":[],"special_tokens":{}})"),
          std::string(
              R"("normalizer":{"type":"Precompiled","precompiled_charsmap":"AAAA////AAAA"})"),
          std::string(
              R"("added_tokens":[{"id":4294967295,"content":"z","single_word":false,"lstrip":false,"rstrip":false,"normalized":true,"special":true}])"),
          std::string(
              R"("added_tokens":[{"id":0,"content":"","single_word":true,"lstrip":true,"rstrip":true,"normalized":true,"special":true}])"),
      }) {
    const std::string json = head + "," + tail + "}";
    LockstepTokenizer* tokenizer = nullptr;
    ffi::Text error;
    const auto status =
        lockstep_tokenizer_new(json.data(), json.size(), nullptr, 0, &tokenizer, error.out());
    ExpectOneLine(status, error);
    if (tokenizer != nullptr) UseTokenizer(random, tokenizer);
    lockstep_tokenizer_free(tokenizer);
  }
}

TEST(HostileTextTest, MutatedTemplatesRenderOrExplain) {
  Random random(24);
  int rendered = 0, refused = 0;
  const std::string context =
      R"({"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}],"bos_token":"<s>"})";
  for (const char* name : {"header_blocks", "im_blocks", "inst_pairs", "turns", "python_habits",
                           "marked_generation"}) {
    const std::string source = ReadText(TextData("templates/" + std::string(name) + ".jinja"));
    for (int round = 0; round < 200; ++round) {
      const std::string bad = Mutate(random, source);
      LockstepTemplate* compiled = nullptr;
      ffi::Text error;
      auto status = lockstep_template_new(bad.data(), bad.size(), &compiled, error.out());
      ExpectOneLine(status, error);
      if (compiled != nullptr) {
        ffi::Text text, why;
        status = lockstep_template_render(compiled, context.data(), context.size(), 0, 100'000,
                                          100'000, text.out(), why.out());
        ExpectOneLine(status, why);
        EXPECT_TRUE(IsValidUtf8(text.view()));
        EXPECT_NE(status, LOCKSTEP_TEXT_BUG) << why.view();
      }
      ++(status == LOCKSTEP_TEXT_OK ? rendered : refused);
      lockstep_template_free(compiled);
    }
  }
  EXPECT_GT(rendered, 50);
  EXPECT_GT(refused, 50);
}

TEST(HostileTextTest, RandomContextsAreRefused) {
  Random random(25);
  const std::string source = "{{ messages }}{{ messages | tojson }}";
  LockstepTemplate* compiled = nullptr;
  ffi::Text error;
  ASSERT_EQ(lockstep_template_new(source.data(), source.size(), &compiled, error.out()),
            LOCKSTEP_TEXT_OK);
  std::string deep(100'000, '[');
  for (int round = 0; round < 300; ++round) {
    const std::string context =
        round == 0 ? deep
        : round == 1
            ? std::string(R"({"messages": 1e999})")
            : Mutate(random, R"({"messages":[{"role":"user","content":[1.5,null,true]}]})");
    ffi::Text text, why;
    const auto status = lockstep_template_render(compiled, context.data(), context.size(), 0, 1000,
                                                 1000, text.out(), why.out());
    ExpectOneLine(status, why);
    EXPECT_TRUE(IsValidUtf8(text.view()));
  }
  lockstep_template_free(compiled);
}

TEST(HostileTextTest, NullHandlesAndEmptyRangesAreErrorsNotCrashes) {
  ffi::Text error, text;
  LockstepIds ids;
  LockstepTokenTable table;
  uint32_t id = 7;
  EXPECT_NE(lockstep_tokenizer_table(nullptr, &table, nullptr), LOCKSTEP_TEXT_OK);
  EXPECT_NE(lockstep_tokenizer_encode(nullptr, nullptr, 0, 0, &ids, nullptr), LOCKSTEP_TEXT_OK);
  EXPECT_NE(lockstep_tokenizer_decode(nullptr, nullptr, 0, 0, text.out(), nullptr),
            LOCKSTEP_TEXT_OK);
  EXPECT_NE(lockstep_tokenizer_token_to_id(nullptr, nullptr, 0, &id), LOCKSTEP_TEXT_OK);
  EXPECT_EQ(id, 0u);
  EXPECT_NE(lockstep_template_render(nullptr, nullptr, 0, 0, 0, 0, text.out(), error.out()),
            LOCKSTEP_TEXT_OK);
  EXPECT_EQ(error.view(), "null handle");
  lockstep_tokenizer_free(nullptr);
  lockstep_template_free(nullptr);
  lockstep_ids_free({nullptr, 0});
  LockstepTemplate* empty = nullptr;
  EXPECT_EQ(lockstep_template_new(nullptr, 0, &empty, nullptr), LOCKSTEP_TEXT_OK);
  lockstep_template_free(empty);
}

TEST(HostileTextTest, LongTextsWithoutBreaksEncodeInBoundedTime) {
  for (const std::string& name : TokenizerNames()) {
    auto tokenizer = LoadFixture(name);
    for (const char* unit : {"a", " ", "\n", "1", "\u0301", "é", "<", "'"}) {
      std::string text;
      while (text.size() < 100'000) text += unit;
      EXPECT_TRUE(tokenizer->Encode(text, true).ok()) << name << " " << unit;
    }
  }
}

}  // namespace
}  // namespace lockstep
