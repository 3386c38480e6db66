// SIGTERM under load: not ready at once, new work served for the grace, refused
// after it, and none of 64 running streams loses a token.
#include <signal.h>
#include <sys/wait.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/integration/test_server.h"

namespace lockstep {
namespace {

using nlohmann::json;
using ::testing::StartsWith;

constexpr int kStreams = 32;  // over each door
constexpr uint32_t kTokens = 400;
constexpr char kPrompt[] = "Count the ships in the harbour.";

// The deltas of a streamed chat answer, joined; what went wrong instead.
std::string StreamedText(const std::string& answer) {
  if (!absl::StartsWith(answer, "HTTP/1.1 200 ")) return answer;
  if (!absl::StrContains(answer, "data: [DONE]\n\n")) return absl::StrCat("no end: ", answer);
  std::string text;
  size_t at = 0;
  while ((at = answer.find("data: {", at)) != std::string::npos) {
    at += sizeof("data: ") - 1;
    const json chunk = json::parse(answer.substr(at, answer.find('\n', at) - at));
    if (chunk.contains("error")) return chunk.dump();
    for (const json& choice : chunk.at("choices")) text += choice.at("delta").value("content", "");
  }
  return text;
}

TEST(DrainTest, SixtyFourStreamsLoseNothing) {
  const auto served = TestServer::Start(
      DemoModel(), 2,
      {"--max-num-seqs", "64", "--max-model-len", "512", "--drain-grace",
       std::to_string(3 * kSlowdown), "--drain-timeout", std::to_string(100 * kSlowdown)});
  ASSERT_NE(served, nullptr);
  const int http = served->server().http_port();
  const v1::GenerateRequest request = LongGreedy(kPrompt, kTokens);
  const json message = {{"role", "user"}, {"content", kPrompt}};
  const std::string body = json({{"messages", json::array({message})},
                                 {"temperature", 0},
                                 {"max_tokens", kTokens},
                                 {"ignore_eos", true},
                                 {"stream", true}})
                               .dump();
  StreamedAnswer alone(&served->client(), request);
  ASSERT_TRUE(alone.Await().ok());
  const std::string expected = alone.text();

  std::vector<std::unique_ptr<StreamedAnswer>> grpc;
  std::vector<std::string> answers(kStreams);
  std::vector<std::thread> threads;
  for (int i = 0; i < kStreams; ++i) {
    grpc.push_back(std::make_unique<StreamedAnswer>(&served->client(), request));
    threads.emplace_back([&, i] {
      answers[static_cast<size_t>(i)] = HttpRequest(http, "POST", "/v1/chat/completions", body);
    });
  }
  EXPECT_TRUE(Eventually(
      [&] { return served->Metric("lockstep_requests{state=\"running\"}") == 2 * kStreams; }));
  kill(served->server().pid(), SIGTERM);

  EXPECT_TRUE(Eventually(
      [&] { return absl::StartsWith(HttpRequest(http, "GET", "/ready"), "HTTP/1.1 503 "); }));
  EXPECT_THAT(HttpRequest(http, "GET", "/health"), StartsWith("HTTP/1.1 200 "));
  // Within the grace a request that comes late is admitted and, later, whole.
  std::string late;
  std::thread latecomer([&] { late = HttpRequest(http, "POST", "/v1/chat/completions", body); });
  // After it a new one is refused, or the door is shut.
  const std::string one = R"({"prompt":"x","max_tokens":1})";
  EXPECT_TRUE(Eventually(
      [&] {
        const std::string answer = HttpRequest(http, "POST", "/v1/completions", one);
        return answer.empty() || absl::StartsWith(answer, "HTTP/1.1 503 ");
      },
      60));
  for (const auto& stream : grpc) {
    const absl::Status end = stream->Await();
    EXPECT_TRUE(end.ok()) << end;
    EXPECT_EQ(stream->token_ids().size(), kTokens);
    EXPECT_EQ(stream->text(), expected);
  }
  for (std::thread& thread : threads) thread.join();
  latecomer.join();
  for (const std::string& answer : answers) EXPECT_EQ(StreamedText(answer), expected);
  EXPECT_EQ(StreamedText(late), expected);
  const int status = served->server().AwaitEnd(110 * kSlowdown);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0) << served->server().Log();
}

}  // namespace
}  // namespace lockstep
