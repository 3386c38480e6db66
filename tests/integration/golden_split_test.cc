// Models of every family through the real programs, split over ranks: float32 gives
// the tokens that transformers computed, 16-bit types stay within a bound of it, and
// every rank tells what its time went on.
//
// By default one model of tests/golden at tp 2, since parity_test has the rest of the
// cpu backend; LOCKSTEP_GOLDEN_MODELS=all, as tests/gpu/run asks: every one, at tp 4 too.
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/integration/close_tokens.h"
#include "tests/integration/test_server.h"

namespace lockstep {
namespace {

using nlohmann::json;

// Of |log-probability - float32's|; the models' random weights spread logits over
// tens. The same as on one GPU (tests/gpu/parity_gpu_test.cc).
constexpr double kBFloat16Bound = 1.25, kFloat16Bound = 0.2;

std::string Variable(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::vector<std::string> Models() {
  const std::string asked = Variable("LOCKSTEP_GOLDEN_MODELS");
  if (asked != "all") return {asked.empty() ? "gemma3" : asked};
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(GoldenModel(""))) {
    if (std::filesystem::exists(entry.path() / "config.json")) {
      names.push_back(entry.path().filename());
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}
// One a family, for what takes several servers.
std::vector<std::string> ModelOfEachFamily() {
  if (Variable("LOCKSTEP_GOLDEN_MODELS") != "all") return {Models().front()};
  return {"gemma3", "llama", "mistral_window", "opt", "qwen2", "qwen3"};
}

struct Case {
  std::vector<uint32_t> prompt, greedy;
};
std::vector<Case> CasesOf(const std::string& model) {
  std::ifstream file(GoldenModel(model) + "/golden.json");
  std::vector<Case> cases;
  const json golden = json::parse(file);
  for (const json& each : golden.at("cases")) {
    cases.push_back({each.at("prompt").get<std::vector<uint32_t>>(),
                     each.at("greedy").get<std::vector<uint32_t>>()});
  }
  EXPECT_FALSE(cases.empty());
  return cases;
}

v1::GenerateRequest Greedy(const std::vector<uint32_t>& prompt, size_t count) {
  v1::GenerateRequest request;
  for (const uint32_t id : prompt) request.mutable_token_ids()->add_ids(id);
  request.mutable_sampling()->set_temperature(0);
  request.mutable_sampling()->set_max_tokens(static_cast<uint32_t>(count));
  request.mutable_sampling()->set_ignore_eos(true);
  return request;
}

std::unique_ptr<TestServer> Serve(const std::string& model, int tp_size, const char* dtype) {
  return TestServer::Start(GoldenModel(model), tp_size, {"--dtype", dtype});
}

class GoldenSplitTest : public ::testing::TestWithParam<int> {};

TEST_P(GoldenSplitTest, Float32GivesTheReferenceTokens) {
  for (const std::string& model : Models()) {
    SCOPED_TRACE(model);
    const auto served = Serve(model, GetParam(), "float32");
    ASSERT_NE(served, nullptr);
    const std::vector<Case> cases = CasesOf(model);
    std::vector<std::unique_ptr<StreamedAnswer>> together;
    for (const Case& each : cases) {
      together.push_back(std::make_unique<StreamedAnswer>(&served->client(),
                                                          Greedy(each.prompt, each.greedy.size())));
    }
    for (size_t i = 0; i < cases.size(); ++i) {
      ASSERT_TRUE(together[i]->Await().ok()) << together[i]->Await() << served->server().Log();
      EXPECT_EQ(together[i]->token_ids(), cases[i].greedy) << "case " << i << ", together";
    }
    StreamedAnswer alone(&served->client(), Greedy(cases[1].prompt, cases[1].greedy.size()));
    ASSERT_TRUE(alone.Await().ok()) << alone.Await();
    EXPECT_EQ(alone.token_ids(), cases[1].greedy) << "alone";
  }
}

// The beginning of an answer to each prompt and to each few tokens of its own answer, so
// that one difference does not hide the rest. The first token is of the prompt's step, the
// others of a step of one row.
using Answers = std::vector<v1::Completion>;
Answers Beginnings(const std::string& model, int tp_size, const char* dtype) {
  constexpr size_t kTokens = 3;
  Answers answers;
  const auto served = Serve(model, tp_size, dtype);
  if (served == nullptr) return answers;
  for (const Case& each : CasesOf(model)) {
    for (size_t t = 0; t < each.greedy.size(); t += 8) {
      std::vector<uint32_t> known = each.prompt;
      known.insert(known.end(), each.greedy.begin(), each.greedy.begin() + static_cast<long>(t));
      v1::GenerateRequest request = Greedy(known, kTokens);
      request.mutable_sampling()->set_logprobs(5);
      const absl::StatusOr<v1::GenerateResponse> answer = served->client().Generate(request);
      EXPECT_TRUE(answer.ok()) << answer.status();
      if (!answer.ok()) return answers;
      EXPECT_EQ(answer->completions(0).logprobs_size(), static_cast<int>(kTokens));
      answers.push_back(answer->completions(0));
    }
  }
  return answers;
}

TEST_P(GoldenSplitTest, SixteenBitsStayWithinTheBoundOfFloat32) {
  for (const std::string& model : ModelOfEachFamily()) {
    const Answers wanted = Beginnings(model, GetParam(), "float32");
    for (const char* dtype : {"bfloat16", "float16"}) {
      SCOPED_TRACE(absl::StrCat(model, " in ", dtype));
      const double bound = std::string(dtype) == "float16" ? kFloat16Bound : kBFloat16Bound;
      const Answers got = Beginnings(model, GetParam(), dtype);
      ASSERT_EQ(got.size(), wanted.size());
      size_t behind_the_first = 0;
      for (size_t i = 0; i < got.size(); ++i) {
        const auto common = UpToDifference(wanted[i], got[i]);
        ExpectCloseTokens(common, UpToDifference(got[i], wanted[i]), bound);
        behind_the_first += common.size() - 1;
      }
      EXPECT_GT(behind_the_first, 0u);
    }
  }
}

TEST_P(GoldenSplitTest, EveryRankTellsWhatItsTimeWentOn) {
  const auto served = Serve(Models().front(), GetParam(), "bfloat16");
  ASSERT_NE(served, nullptr);
  const std::vector<Case> cases = CasesOf(Models().front());
  StreamedAnswer answer(&served->client(), Greedy(cases[2].prompt, cases[2].greedy.size()));
  ASSERT_TRUE(answer.Await().ok()) << answer.Await();
  const auto of = [&](const std::string& name, const std::string& labels) {
    return served->Metric(absl::StrCat("lockstep_", name, "{", labels, "}"));
  };
  for (int rank = 0; rank < GetParam(); ++rank) {
    SCOPED_TRACE(absl::StrCat("rank ", rank));
    const std::string label = absl::StrCat("rank=\"", rank, "\"");
    const auto went = [&](const std::string& kind) {
      return of("rank_step_seconds_sum", absl::StrCat("kind=\"", kind, "\",", label));
    };
    EXPECT_GT(went("compute"), 0);
    EXPECT_GT(went("total"), 0);
    EXPECT_LE(went("compute"), went("total"));
    EXPECT_GE(of("collective_wait_seconds_count", label), 2) << "a prompt and its answer";
    EXPECT_GT(of("collective_wait_seconds_sum", label), 0);
    EXPECT_GT(of("collective_transfer_seconds_sum", label), 0);
    EXPECT_GT(of("collective_bytes_total", label), 0);
    if (!OnGpus()) continue;
    EXPECT_GT(went("sampling"), 0);
    EXPECT_GT(of("device_idle_seconds_count", label), 0);
    EXPECT_TRUE(Eventually([&] { return of("gpu_memory_used_bytes", label) > 0; }));
  }
}

INSTANTIATE_TEST_SUITE_P(TpSizes, GoldenSplitTest, ::testing::ValuesIn(SplitSizes()), SplitName);

}  // namespace
}  // namespace lockstep
