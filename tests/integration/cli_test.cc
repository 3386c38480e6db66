// The commands as a user types them, against the demo model.
#include <signal.h>
#include <sys/wait.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "absl/strings/str_cat.h"
#include "cli/child_process.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/fakes/shell.h"
#include "tests/fakes/temp_dir.h"
#include "tests/integration/test_server.h"

namespace lockstep {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

// stdout and stderr together.
Shell Lockstep(const std::string& arguments) {
  return RunShell(absl::StrCat(LOCKSTEP_BINARY_DIR, "/bin/lockstep ", arguments, " 2>&1"));
}

class CliTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    served_ = TestServer::Start(DemoModel(), 2, {"--dtype", "float32"}).release();
    ASSERT_NE(served_, nullptr);
  }
  static void TearDownTestSuite() { delete served_; }
  void SetUp() override { ASSERT_NE(served_, nullptr); }

  static std::string At() { return "--address " + served_->server().address(); }
  std::string File(const std::string& name, const std::string& text) {
    const std::string path = temp_.File(name);
    std::ofstream(path, std::ios::trunc) << text;
    return path;
  }
  static std::string Read(const std::string& path) {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  static TestServer* served_;
  const TempDir temp_;
};

TestServer* CliTest::served_ = nullptr;

TEST_F(CliTest, GenerateStreamsAnAnswerAndSaysWhoHoldsWhat) {
  const Shell shell =
      Lockstep("generate --chat --temperature 0 -v " + At() + " 'What is 35 + 28?'");
  EXPECT_EQ(shell.code, 0) << shell.out;
  EXPECT_THAT(shell.out, HasSubstr("35 + 28 = 63"));
  EXPECT_THAT(shell.out, HasSubstr("rank 0"));
  EXPECT_THAT(shell.out, HasSubstr("rank 1"));
  EXPECT_THAT(shell.out, HasSubstr("start-up:"));
}

TEST_F(CliTest, GenerateReadsThePromptFromStdin) {
  const Shell shell = Lockstep("generate --chat --temperature 0 " + At() + " < " +
                               File("prompt.txt", "What is 35 + 28?"));
  EXPECT_THAT(shell.out, HasSubstr("35 + 28 = 63"));
}

// Each takes one value, however often it is given.
TEST_F(CliTest, GenerateTakesThePromptBehindARepeatableFlag) {
  for (const std::string flag :
       {"--stop END", "--stop=END", "--stop END --stop STOP", "--stop-token-ids 4",
        "--stop-token-ids=4,5 --stop-token-ids 6", "--logit-bias 5=0", "--logit-bias=5=0"}) {
    const Shell shell = Lockstep("generate --chat --temperature 0 " + At() + " " + flag +
                                 " 'What is 35 + 28?'" + " < " + File("other.txt", "other"));
    EXPECT_EQ(shell.code, 0) << flag << shell.out;
    EXPECT_THAT(shell.out, HasSubstr("35 + 28 = 63")) << flag;
  }
  const Shell served =
      Lockstep("generate --chat --temperature 0 --model " + DemoModel() +
               " --serve-flag=--dtype=float32 'What is 35 + 28?' < " + File("other.txt", "other"));
  EXPECT_THAT(served.out, HasSubstr("35 + 28 = 63"));
}

TEST_F(CliTest, ChatNamesAMessageThatIsNotUtf8) {
  const Shell shell = Lockstep("chat " + At() + " < " + File("bytes.txt", "a\xff\n"));
  EXPECT_EQ(shell.code, 1);
  EXPECT_EQ(shell.out, "lockstep chat: the message is not UTF-8\n");
}

TEST_F(CliTest, AKeyThatIsNotValidIsNamedAtOnce) {
  const std::string digest = RunShell("printf secret | sha256sum | cut -c1-64 | tr -d '\\n'").out;
  const auto guarded = LocalServer::Start(
      {"--model", DemoModel(), "--api-key-file", File("keys", digest + " team\n")});
  ASSERT_TRUE(guarded.ok()) << guarded.status();
  const std::string at = " --address " + (*guarded)->address();
  const std::string one = " --max-tokens 1 x";
  EXPECT_EQ(Lockstep("generate --api-key secret" + at + one).code, 0);
  for (const std::string& command :
       {"generate" + at + one, "generate --api-key another" + at + one,
        "bench latency --api-key another --server " + (*guarded)->address()}) {
    const Shell shell = Lockstep(command);
    EXPECT_EQ(shell.code, 1);
    EXPECT_THAT(shell.out, HasSubstr("--api-key: ")) << command;
    EXPECT_THAT(shell.out, Not(HasSubstr("not ready after"))) << command;
    EXPECT_THAT(shell.out, Not(HasSubstr("no server answers"))) << command;
  }
}

TEST_F(CliTest, ProfileSaysThatAnotherDoorAnswers) {
  const Shell shell = Lockstep("profile " + At() + " --output " + temp_.File("trace.json"));
  EXPECT_EQ(shell.code, 1);
  EXPECT_THAT(shell.out, HasSubstr("is no --admin-address"));
}

TEST_F(CliTest, WhatStdoutDidNotTakeIsNoSuccess) {
  const std::string address = served_->server().address();
  for (const std::string& command :
       {"generate --max-tokens 2 " + At() + " Once",
        absl::StrCat("top --once --interval 0.1 --server 127.0.0.1:",
                     served_->server().http_port()),
        "bench latency --json --batch 1 --context 16 --output-len 4 --runs 1 --server " +
            address}) {
    EXPECT_EQ(Lockstep(command + " >/dev/null").code, 0) << command;
    EXPECT_EQ(Lockstep(command + " >/dev/full").code, 1) << command;
  }
}

TEST_F(CliTest, GenerateNamesTheFieldAtFault) {
  const Shell shell = Lockstep("generate --temperature 3 " + At() + " hello");
  EXPECT_EQ(shell.code, 1);
  EXPECT_THAT(shell.out, HasSubstr("temperature"));
}

TEST_F(CliTest, ChatKeepsTheConversation) {
  const std::string lines = File("chat.txt", "I am Sara from Paris.\nWhat is my name?\n");
  const Shell shell = Lockstep("chat --temperature 0 " + At() + " < " + lines);
  EXPECT_EQ(shell.code, 0) << shell.out;
  EXPECT_THAT(shell.out, HasSubstr("Nice to meet you, Sara from Paris."));
  EXPECT_THAT(shell.out, HasSubstr("Your name is Sara."));
}

TEST_F(CliTest, BatchAnswersEveryLineAndResumes) {
  std::string input;
  for (int i = 0; i < 20; ++i) {
    input += absl::StrCat("{\"custom_id\":\"q", i, "\",\"temperature\":0,\"messages\":[{\"role\":",
                          "\"user\",\"content\":\"What is 35 + 28?\"}]}\n");
  }
  const std::string in = File("in.jsonl", input);
  // Two answers and a cut line stand there already.
  const std::string out = File("out.jsonl",
                               "{\"custom_id\":\"q3\",\"text\":\"kept\"}\n"
                               "{\"custom_id\":\"q4\",\"text\":\"kept\"}\n{\"custom_id\":\"q5");
  const Shell shell = Lockstep("batch " + At() + " " + in + " " + out);
  EXPECT_EQ(shell.code, 0) << shell.out;
  EXPECT_THAT(shell.out, HasSubstr("2 of 20 requests are answered already"));
  std::istringstream lines(Read(out));
  int answers = 0, kept = 0;
  for (std::string line; std::getline(lines, line);) {
    const json answer = json::parse(line);
    if (answer["text"] == "kept") ++kept;
    if (answer["text"] == "35 + 28 = 63" && answer["finish_reason"] == "stop") ++answers;
  }
  EXPECT_EQ(kept, 2);
  EXPECT_EQ(answers, 18);
}

TEST_F(CliTest, BatchWritesAnErrorLineForABadRequestAndAnswersTheRest) {
  const std::string in = File("bad.jsonl",
                              "{\"prompt\":\"a\",\"max_tokens\":3}\nnot json\n"
                              "{\"prompt\":\"b\",\"temperature\":9,\"max_tokens\":3}\n");
  const std::string out = temp_.File("bad-out.jsonl");
  const Shell shell = Lockstep("batch " + At() + " " + in + " " + out);
  EXPECT_EQ(shell.code, 1);
  EXPECT_THAT(shell.out, HasSubstr("2 of 3 requests failed"));
  EXPECT_THAT(Read(out), HasSubstr("line 2: not a JSON object"));
  EXPECT_THAT(Read(out), HasSubstr("temperature"));
}

TEST_F(CliTest, BatchWritesToADeviceAsItIs) {
  const std::string in = File("device.jsonl", "{\"prompt\":\"Once\",\"max_tokens\":2}\n");
  const std::string link = temp_.File("device-out");
  std::filesystem::create_symlink("/dev/null", link);
  const Shell shell = Lockstep("batch " + At() + " " + in + " " + link);
  EXPECT_EQ(shell.code, 0) << shell.out;
  EXPECT_TRUE(std::filesystem::is_symlink(link));
  EXPECT_TRUE(std::filesystem::is_character_file("/dev/null"));
  EXPECT_THAT(Lockstep("batch " + At() + " " + in + " /dev/stdout").out,
              HasSubstr("\"completion_tokens\":2"));
}

TEST_F(CliTest, BatchAsksNoMoreWhenTheDiskIsFull) {
  std::string input;
  for (int i = 0; i < 50; ++i) input += "{\"prompt\":\"Once\",\"max_tokens\":2}\n";
  const std::string full = temp_.File("full");
  std::filesystem::create_symlink("/dev/full", full);
  const auto answered = [] {
    return served_->Metric("lockstep_requests_total{outcome=\"completed\"}");
  };
  const double before = answered();
  const Shell shell =
      Lockstep("batch --concurrency 1 " + At() + " " + File("fifty.jsonl", input) + " " + full);
  EXPECT_EQ(shell.code, 1);
  EXPECT_THAT(shell.out, HasSubstr("writing failed"));
  EXPECT_TRUE(Eventually([&] { return answered() > before; }));
  EXPECT_EQ(answered(), before + 1);
}

TEST_F(CliTest, BatchDropsErrorLinesOnlyWhereAServerAnswers) {
  const std::string in = File("again.jsonl", "{\"prompt\":\"Once\",\"max_tokens\":2}\n");
  const std::string failed = "{\"custom_id\":\"line-1\",\"error\":{}}\n";
  const std::string out = File("again-out.jsonl", failed);
  EXPECT_EQ(Lockstep("batch --address 127.0.0.1:1 " + in + " " + out).code, 1);
  EXPECT_EQ(Read(out), failed);
  EXPECT_EQ(Lockstep("batch " + At() + " " + in + " " + out).code, 0);
  EXPECT_EQ(json::parse(Read(out))["completion_tokens"], 2);
}

// gRPC refuses it with the code of a full queue, but it never fits.
TEST_F(CliTest, BatchGivesUpOnARequestAboveTheMessageLimit) {
  const std::string in = File("large.jsonl", "{\"prompt\":\"" + std::string(9 << 20, 'x') +
                                                 "\"}\n{\"prompt\":\"Once\",\"max_tokens\":2}\n");
  const std::string out = temp_.File("large-out.jsonl");
  const Shell shell = Lockstep("batch " + At() + " " + in + " " + out);
  EXPECT_EQ(shell.code, 1);
  EXPECT_THAT(shell.out, HasSubstr("1 of 2 requests failed"));
  EXPECT_THAT(Read(out), HasSubstr("larger than max"));
  EXPECT_THAT(Read(out), HasSubstr("\"completion_tokens\":2"));
}

TEST_F(CliTest, BatchEndsAtOnceAtTheSecondInterrupt) {
  std::string input = "{\"prompt\":\"Once\",\"max_tokens\":2}\n";
  for (int i = 0; i < 64; ++i) {
    input += "{\"prompt\":\"Once\",\"max_tokens\":2000,\"ignore_eos\":true}\n";
  }
  const std::string in = File("long.jsonl", input);
  const std::string out = File("long-out.jsonl", ""), log = File("long.log", "");
  ChildOptions options;
  options.log_path = log;
  const auto batch = StartChild({absl::StrCat(LOCKSTEP_BINARY_DIR, "/bin/lockstep"), "batch",
                                 "--address", served_->server().address(), in, out},
                                options);
  ASSERT_TRUE(batch.ok()) << batch.status();
  EXPECT_TRUE(Eventually([&] { return !Read(out).empty(); }));
  kill(*batch, SIGINT);
  EXPECT_TRUE(Eventually([&] { return Read(log).find("Ctrl-C again") != std::string::npos; }));
  int status = 0;
  EXPECT_EQ(waitpid(*batch, &status, WNOHANG), 0) << "it waits for what is under way";
  kill(*batch, SIGINT);
  waitpid(*batch, &status, 0);
  EXPECT_EQ(WEXITSTATUS(status), 130) << Read(log);
  // Nothing of those that were under way, and no half line.
  EXPECT_EQ(json::parse(Read(out), nullptr, false)["custom_id"], "line-1") << Read(out);
}

TEST_F(CliTest, BatchRunsOfflineWithAModelOfItsOwn) {
  const std::string in = File("offline.jsonl", "{\"prompt\":\"Once\",\"max_tokens\":4}\n");
  const std::string out = temp_.File("offline-out.jsonl");
  const Shell shell =
      Lockstep("batch --model " + DemoModel() + " --tensor-parallel-size 2 " + in + " " + out);
  EXPECT_EQ(shell.code, 0) << shell.out;
  EXPECT_EQ(json::parse(Read(out))["completion_tokens"], 4);
}

TEST_F(CliTest, PlanAnswersFromTheConfigAlone) {
  const Shell shell = Lockstep("plan " + DemoModel() + " --gpu-memory 80GiB --json");
  EXPECT_EQ(shell.code, 0) << shell.out;
  const json report = json::parse(shell.out);
  EXPECT_EQ(report["minimum_tensor_parallel_size"], 1);
}

TEST_F(CliTest, DoctorLooksAtTheHost) {
  const std::string said = Lockstep("doctor").out;
  EXPECT_THAT(said, HasSubstr("processor"));
#ifdef LOCKSTEP_CUDA
  EXPECT_THAT(said, HasSubstr("backends           cpu and cuda\n"));
#else
  EXPECT_THAT(said, HasSubstr("backends           cpu alone"));
#endif
}

TEST_F(CliTest, HelpGroupsTheCommands) {
  const Shell shell = Lockstep("--help");
  EXPECT_EQ(shell.code, 0);
  for (const char* group : {"Serve", "Ask", "Look"}) EXPECT_THAT(shell.out, HasSubstr(group));
}

TEST_F(CliTest, CompletionsOverHttpGiveTheSameTokens) {
  const std::string body =
      "{\"model\":\"model\",\"prompt\":\"<|begin|><|user|>What is 35 + 28?<|end|><|assistant|>\","
      "\"temperature\":0,\"max_tokens\":20,\"return_token_ids\":true}";
  const std::string answer =
      HttpRequest(served_->server().http_port(), "POST", "/v1/completions", body);
  EXPECT_THAT(answer, StartsWith("HTTP/1.1 200"));
  const json object = json::parse(answer.substr(answer.find("\r\n\r\n") + 4), nullptr, false);
  ASSERT_TRUE(object.is_object()) << answer;
  EXPECT_EQ(object["choices"][0]["text"], "35 + 28 = 63");
  EXPECT_EQ(object["choices"][0]["finish_reason"], "stop");
}

}  // namespace
}  // namespace lockstep
