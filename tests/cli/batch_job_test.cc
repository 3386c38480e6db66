#include "cli/batch_job.h"

#include <sys/stat.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/fakes/temp_dir.h"

namespace lockstep {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::UnorderedElementsAre;

std::string ErrorOf(const std::string& line) {
  return std::string(ParseBatchLine(line, 7).error.message());
}

class BatchJobTest : public ::testing::Test {
 protected:
  std::string Write(const std::string& name, const std::string& text) {
    const std::string path = temp_.File(name);
    std::ofstream(path, std::ios::trunc) << text;
    return path;
  }
  static std::string Read(const std::string& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  const TempDir temp_;
};

TEST_F(BatchJobTest, ReadsPromptsAsTextIdsAndMessages) {
  EXPECT_EQ(ParseBatchLine(R"({"prompt":"hi"})", 1).request.text(), "hi");
  EXPECT_THAT(ParseBatchLine(R"({"prompt":[3,1]})", 1).request.token_ids().ids(),
              ElementsAre(3, 1));
  const BatchItem chat =
      ParseBatchLine(R"({"messages":[{"role":"user","content":"hi"}],"custom_id":"a"})", 1);
  EXPECT_EQ(chat.custom_id, "a");
  EXPECT_EQ(chat.request.chat().messages(0).content(), "hi");
}

TEST_F(BatchJobTest, MessagesKeepTheirRoles) {
  const BatchItem chat = ParseBatchLine(
      R"({"messages":[{"role":"system","content":"a"},{"role":"user","content":"b"},
                      {"role":"assistant","content":"c"},{"role":"user","content":"d"}]})",
      1);
  std::vector<std::string> said;
  for (const v1::ChatMessage& message : chat.request.chat().messages()) {
    said.push_back(message.role() + ": " + message.content());
  }
  EXPECT_THAT(said, ElementsAre("system: a", "user: b", "assistant: c", "user: d"));
}

TEST_F(BatchJobTest, ASeedHas64BitsAndASign) {
  const auto seed = [](const std::string& number) {
    return ParseBatchLine(R"({"prompt":"x","seed":)" + number + "}", 1);
  };
  EXPECT_EQ(seed("9223372036854775807").request.sampling().seed(), INT64_MAX);
  EXPECT_EQ(seed("-9223372036854775808").request.sampling().seed(), INT64_MIN);
  for (const char* beyond :
       {"9223372036854775808", "18446744073709551615", "-9223372036854775809", "1.5"}) {
    EXPECT_THAT(std::string(seed(beyond).error.message()), HasSubstr("seed: expected")) << beyond;
  }
}

v1::Completion Answer(const std::string& text, uint32_t id, v1::FinishReason reason) {
  v1::Completion answer;
  answer.set_text(text);
  answer.add_token_ids(id);
  answer.mutable_finish()->set_reason(reason);
  answer.mutable_finish()->set_completion_tokens(1);
  return answer;
}

TEST_F(BatchJobTest, OneAnswerIsFieldsAndSeveralAreAList) {
  using nlohmann::json;
  v1::GenerateResponse response;
  response.mutable_prompt()->set_prompt_tokens(5);
  *response.add_completions() = Answer("one", 11, v1::FINISH_REASON_STOP);
  EXPECT_EQ(json::parse(AnswerLine("a", response)),
            json::parse(R"({"custom_id":"a","prompt_tokens":5,"completion_tokens":1,"text":"one",
                            "token_ids":[11],"finish_reason":"stop"})"));
  *response.add_completions() = Answer("two", 12, v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(json::parse(AnswerLine("a", response)),
            json::parse(R"({"custom_id":"a","prompt_tokens":5,"completion_tokens":2,"choices":[
                            {"text":"one","token_ids":[11],"finish_reason":"stop"},
                            {"text":"two","token_ids":[12],"finish_reason":"length"}]})"));
}

TEST_F(BatchJobTest, CarriesEverySamplingField) {
  const BatchItem item = ParseBatchLine(
      R"({"prompt":"x","max_tokens":5,"min_tokens":1,"top_k":4,"n":2,"logprobs":3,"temperature":0.5,
          "top_p":0.9,"min_p":0.1,"repetition_penalty":1.1,"presence_penalty":0.2,
          "frequency_penalty":0.3,"ignore_eos":true,"stop":["a","b"],"stop_token_ids":[9],
          "seed":-4,"logit_bias":{"7":-1.5},"include_stop_str_in_output":true,
          "skip_special_tokens":false})",
      1);
  ASSERT_TRUE(item.error.ok()) << item.error;
  const v1::SamplingParams& p = item.request.sampling();
  EXPECT_EQ(p.max_tokens(), 5u);
  EXPECT_EQ(p.min_tokens(), 1u);
  EXPECT_EQ(p.top_k(), 4u);
  EXPECT_EQ(p.n(), 2u);
  EXPECT_EQ(p.logprobs(), 3u);
  EXPECT_FLOAT_EQ(p.temperature(), 0.5f);
  EXPECT_FLOAT_EQ(p.top_p(), 0.9f);
  EXPECT_FLOAT_EQ(p.min_p(), 0.1f);
  EXPECT_FLOAT_EQ(p.repetition_penalty(), 1.1f);
  EXPECT_FLOAT_EQ(p.presence_penalty(), 0.2f);
  EXPECT_FLOAT_EQ(p.frequency_penalty(), 0.3f);
  EXPECT_TRUE(p.ignore_eos());
  EXPECT_THAT(p.stop(), ElementsAre("a", "b"));
  EXPECT_THAT(p.stop_token_ids(), ElementsAre(9));
  EXPECT_EQ(p.seed(), -4);
  EXPECT_FLOAT_EQ(p.logit_bias().at(7), -1.5f);
  EXPECT_TRUE(p.include_stop_str_in_output());
  EXPECT_FALSE(p.skip_special_tokens());
}

TEST_F(BatchJobTest, NamesWhatIsWrongWithALine) {
  EXPECT_EQ(ErrorOf("{"), "line 7: not a JSON object");
  EXPECT_EQ(ErrorOf("[]"), "line 7: not a JSON object");
  EXPECT_EQ(ErrorOf(std::string("{\"prompt\":\"a\"}\0x", 16)), "line 7: not a JSON object");
  EXPECT_THAT(ErrorOf("{}"), HasSubstr("prompt, messages: exactly one"));
  EXPECT_THAT(ErrorOf(R"({"prompt":"a","messages":[]})"), HasSubstr("exactly one"));
  EXPECT_THAT(ErrorOf(R"({"prompt":"a","max_token":1})"), HasSubstr("max_token: unknown field"));
  EXPECT_THAT(ErrorOf(R"({"prompt":"a","max_tokens":-1})"), HasSubstr("max_tokens: expected"));
  EXPECT_THAT(ErrorOf(R"({"prompt":"a","max_tokens":4294967296})"), HasSubstr("max_tokens"));
  EXPECT_THAT(ErrorOf(R"({"prompt":"a","temperature":"hot"})"), HasSubstr("temperature"));
  EXPECT_THAT(ErrorOf(R"({"prompt":"a","ignore_eos":1})"), HasSubstr("ignore_eos"));
  EXPECT_THAT(ErrorOf(R"({"prompt":["a"]})"), HasSubstr("prompt"));
  EXPECT_THAT(ErrorOf(R"({"prompt":"a","logit_bias":{"x":1}})"), HasSubstr("logit_bias"));
  EXPECT_THAT(ErrorOf(R"({"prompt":"a","logit_bias":{"4294967301":1}})"), HasSubstr("logit_bias"));
  EXPECT_THAT(ErrorOf(R"({"prompt":"a","logit_bias":{"-1":1}})"), HasSubstr("logit_bias"));
  EXPECT_THAT(ErrorOf("{\"prompt\":\"a\",\"s\x7ft\":1}"), HasSubstr("s\\x7ft: unknown field"));
  EXPECT_THAT(ErrorOf(R"({"messages":[{"role":"user"}]})"), HasSubstr("messages"));
}

TEST_F(BatchJobTest, SkipsBlankLinesAndNamesLinesByNumber) {
  const auto items = ReadBatch(Write("in1.jsonl", "{\"prompt\":\"a\"}\n\n{\"prompt\":\"b\"}"));
  ASSERT_TRUE(items.ok());
  ASSERT_EQ(items->size(), 2u);
  EXPECT_EQ((*items)[0].custom_id, "line-1");
  EXPECT_EQ((*items)[1].custom_id, "line-3");
}

TEST_F(BatchJobTest, RefusesACustomIdThatStandsTwice) {
  const std::string line = R"({"custom_id":"x","prompt":"a"})";
  const auto items = ReadBatch(Write("in2.jsonl", line + "\n" + line + "\n"));
  EXPECT_THAT(std::string(items.status().message()),
              HasSubstr("line 2: custom_id 'x' stands twice"));
}

constexpr char kHalfDone[] =
    "{\"custom_id\":\"a\",\"text\":\"1\"}\n"
    "{\"custom_id\":\"b\",\"error\":{}}\n"
    "{\"custom_id\":\"c\",\"text\":\"3\"}\n"
    "{\"custom_id\":\"d\",\"te";
constexpr char kHalfDoneKept[] =
    "{\"custom_id\":\"a\",\"text\":\"1\"}\n"
    "{\"custom_id\":\"c\",\"text\":\"3\"}\n";

TEST_F(BatchJobTest, ResumeKeepsAnswersAndDropsErrorsAndTheCutLine) {
  const std::string path = Write("out1.jsonl", kHalfDone);
  const auto output = ReadOutput(path);
  ASSERT_TRUE(output.ok()) << output.status();
  EXPECT_THAT(output->answered, UnorderedElementsAre("a", "c"));
  EXPECT_THAT(output->stale, ElementsAre(1, 3));
  EXPECT_EQ(Read(path), kHalfDone);
  ASSERT_TRUE(DropLines(path, output->stale).ok());
  EXPECT_EQ(Read(path), kHalfDoneKept);
}

TEST_F(BatchJobTest, ARewrittenFileKeepsItsModeAndItsSymbolicLink) {
  const std::string path = Write("out3.jsonl", kHalfDone);
  const std::string link = temp_.File("out3-link.jsonl");
  std::filesystem::create_symlink("out3.jsonl", link);
  const auto mode = std::filesystem::perms(0640);
  std::filesystem::permissions(path, mode);
  ASSERT_TRUE(DropLines(link, {1, 3}).ok());
  EXPECT_TRUE(std::filesystem::is_symlink(link));
  EXPECT_FALSE(std::filesystem::is_symlink(path));
  EXPECT_EQ(Read(path), kHalfDoneKept);
  EXPECT_EQ(std::filesystem::status(path).permissions(), mode);
}

TEST_F(BatchJobTest, ResumeRefusesAFileThatIsNotAnAnswerFile) {
  EXPECT_THAT(std::string(ReadOutput(Write("out2.jsonl", "precious notes\n")).status().message()),
              HasSubstr("not an answer; name another output"));
  EXPECT_THAT(std::string(ReadOutput(temp_.path()).status().message()), HasSubstr("is a folder"));
}

// A pipe, which would not be read without waiting, stands for devices as well.
TEST_F(BatchJobTest, ResumeOfNothingAndOfWhatIsNoFileIsEmpty) {
  const std::string pipe = temp_.File("out4.pipe");
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  for (const std::string& path : {temp_.File("no-such-file.jsonl"), pipe}) {
    const auto output = ReadOutput(path);
    ASSERT_TRUE(output.ok()) << output.status();
    EXPECT_TRUE(output->answered.empty());
    EXPECT_TRUE(output->stale.empty());
  }
  EXPECT_TRUE(std::filesystem::is_fifo(pipe));
}

}  // namespace
}  // namespace lockstep
