// bench, compare and top as a user types them, against the demo model.
#include <signal.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
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

// stderr goes to the same place unless the arguments send it elsewhere.
Shell Lockstep(const std::string& arguments, const std::string& redirect = "2>&1") {
  UseBuiltPrograms();
  return RunShell(absl::StrCat(LOCKSTEP_BINARY_DIR, "/bin/lockstep ", arguments, " ", redirect));
}

// The flag goes in front of what is passed on to serve.
json JsonOf(std::string arguments) {
  const size_t passed_on = arguments.find(" -- ");
  arguments.insert(passed_on == std::string::npos ? arguments.size() : passed_on, " --json");
  const Shell shell = Lockstep(arguments, "2>/dev/null");
  EXPECT_EQ(shell.code, 0) << Lockstep(arguments).out;
  return json::parse(shell.out, nullptr, /*allow_exceptions=*/false);
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// The demo model's config.json in `folder`, with `changes` to it; null takes a field out.
std::string ModelLikeTheDemo(const std::string& folder, const json& changes) {
  json config = json::parse(ReadFile(DemoModel() + "/config.json"));
  config.merge_patch(changes);
  std::filesystem::create_directory(folder);
  std::ofstream(folder + "/config.json") << config;
  return folder;
}

// In `folder`, a `lockstep` for commands that start a server: sh runs `lines`, and
// then the real one with what is left of the arguments.
std::string InsteadOfLockstep(const std::string& folder, const std::string& lines) {
  const std::string programs = absl::StrCat(LOCKSTEP_BINARY_DIR, "/bin");
  std::filesystem::create_directory(folder);
  std::ofstream(folder + "/lockstep") << "#!/bin/sh\n"
                                      << lines << "\nexport LOCKSTEP_PROGRAMS=" << programs
                                      << "\nexec " << programs << "/lockstep \"$@\"\n";
  std::filesystem::permissions(folder + "/lockstep", std::filesystem::perms::owner_all);
  return folder;
}

class MeasureTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    served_ = TestServer::Start(DemoModel(), 2, {"--max-num-seqs", "16", "--num-kv-blocks", "256"})
                  .release();
  }
  static void TearDownTestSuite() { delete std::exchange(served_, nullptr); }
  void SetUp() override { ASSERT_NE(served_, nullptr); }

  static std::string At() { return "--server " + served_->server().address(); }
  static std::string Http() {
    return absl::StrCat("--server 127.0.0.1:", served_->server().http_port());
  }

  static TestServer* served_;
  const TempDir temp_;
};

TestServer* MeasureTest::served_ = nullptr;

TEST_F(MeasureTest, LatencyReportsEveryBatchWithFloorAndRatio) {
  const json report = JsonOf("bench latency " + At() + " --batch 1,8 --context 64 --output-len 48" +
                             " --runs 2 --bandwidth 20GB/s --model " + DemoModel());
  ASSERT_TRUE(report.is_object());
  EXPECT_EQ(report["target"]["tensor_parallel_size"], 2);
  ASSERT_EQ(report["cases"].size(), 2u);
  for (const json& each : report["cases"]) {
    EXPECT_EQ(each["runs"].size(), 2u);
    EXPECT_GT(each["step_ms"], 0);
    EXPECT_GT(each["ttft_median_ms"], 0);
    EXPECT_GT(each["floor_ms"], 0);
    EXPECT_NEAR(each["ratio"].get<double>(),
                each["step_ms"].get<double>() / each["floor_ms"].get<double>(), 1e-9);
    // Random prompts: no cache has seen them.
    EXPECT_EQ(each["cached_prompt_tokens"], 0);
  }
  EXPECT_EQ(report["cases"][1]["batch"], 8);
}

TEST_F(MeasureTest, LatencyNeedsRoomForTheWholeBatch) {
  const Shell many = Lockstep("bench latency " + At() + " --batch 17 --context 16 --output-len 16");
  EXPECT_EQ(many.code, 1);
  EXPECT_THAT(many.out, HasSubstr("--max-num-seqs 17"));
  const Shell blocks = Lockstep("bench latency " + At() + " --batch 16 --context 512");
  EXPECT_EQ(blocks.code, 1);
  EXPECT_THAT(blocks.out, HasSubstr("--num-kv-blocks"));
}

TEST_F(MeasureTest, PrefillTimesTheFirstToken) {
  const json report = JsonOf("bench prefill " + At() + " --prompts 1x100,4x50 --runs 1");
  ASSERT_EQ(report["cases"].size(), 2u);
  EXPECT_EQ(report["cases"][1]["prompts"], 4);
  EXPECT_GE(report["cases"][1]["ttft_last_ms"], report["cases"][1]["ttft_median_ms"]);
  const Shell bad = Lockstep("bench prefill " + At() + " --prompts 4by50");
  EXPECT_EQ(bad.code, 1);
  EXPECT_THAT(bad.out, HasSubstr("--prompts: \"4by50\""));
}

TEST_F(MeasureTest, ThroughputCountsOutputTokensOfAllRequests) {
  const json report =
      JsonOf("bench throughput " + At() + " --requests 40 --input-len 20 --output-len 10 --runs 1");
  EXPECT_GT(report["output_tokens_per_second"], 0);
  EXPECT_GT(report["client_us_per_token"], 0);
}

TEST_F(MeasureTest, ServeReportsOpenAndClosedLoopsInOneSelfContainedFile) {
  const std::string html = temp_.File("serve-report.html");
  const std::string copy = temp_.File("serve-report.json");
  const json report = JsonOf("bench serve " + At() +
                             " --request-rate 40,80 --concurrency 2 --requests 12 --input-len 16" +
                             " --output-len 8 --slo-ttft-ms 100000 --slo-tpot-ms 100000 --html " +
                             html + " --output " + copy);
  ASSERT_EQ(report["points"].size(), 3u);
  for (const json& point : report["points"]) {
    EXPECT_EQ(point["completed"], 12);
    EXPECT_EQ(point["good"], 12);
    EXPECT_EQ(point["output_tokens"], 96);
  }
  EXPECT_EQ(report["points"][2]["loop"], "closed");
  const std::string page = ReadFile(html);
  EXPECT_THAT(page, HasSubstr("<svg"));
  EXPECT_THAT(page, Not(HasSubstr("<script")));
  EXPECT_EQ(json::parse(ReadFile(copy)), report);
}

TEST_F(MeasureTest, ServeWithAnImpossibleServiceLevelHasNoGoodput) {
  const json report =
      JsonOf("bench serve " + At() +
             " --concurrency 2 --requests 3 --lengths sharegpt --slo-ttft-ms 0.001");
  EXPECT_EQ(report["points"][0]["completed"], 3);
  EXPECT_EQ(report["points"][0]["goodput_per_second"], 0);
}

TEST_F(MeasureTest, ServeReportsAndFailsWhenItsServerDies) {
  const std::string pid = temp_.File("pid"), copy = temp_.File("dies.json"),
                    said = temp_.File("said");
  const std::string programs =
      InsteadOfLockstep(temp_.File("programs"), absl::StrCat("echo $$ > ", pid));
  UseBuiltPrograms();
  Shell shell;
  std::thread bench([&] {
    shell = RunShell(absl::StrCat(
        "LOCKSTEP_PROGRAMS=", programs, " ", LOCKSTEP_BINARY_DIR, "/bin/lockstep bench serve",
        " --backend cpu --concurrency 2,4 --requests 200 --input-len 8 --output-len 64 --model ",
        DemoModel(), " --output ", copy, " 2>", said));
  });
  const auto saved = [&] { return json::parse(ReadFile(copy), nullptr, false); };
  // The first point is measured, and the second under way.
  EXPECT_TRUE(
      Eventually([&] { return ReadFile(said).find("4 at once") != std::string::npos; }, 90));
  const json half = saved();
  if (const std::string serve = ReadFile(pid); !serve.empty()) kill(std::stoi(serve), SIGKILL);
  bench.join();
  ASSERT_TRUE(half.is_object()) << ReadFile(said);
  EXPECT_EQ(half["complete"], false);
  ASSERT_EQ(half.value("points", json::array()).size(), 1u);
  EXPECT_EQ(half["points"][0]["completed"], 200);

  EXPECT_EQ(shell.code, 1);
  EXPECT_THAT(shell.out, HasSubstr("    first failure: "));
  const json whole = saved();
  EXPECT_EQ(whole["complete"], true);
  ASSERT_EQ(whole["points"].size(), 2u);
  EXPECT_GT(whole["points"][1]["failed"], 0);
  EXPECT_THAT(ReadFile(said), HasSubstr("[coordinator]"));
  EXPECT_THAT(ReadFile(said), HasSubstr("lockstep bench serve: 4 at once: "));
}

// What an earlier run left is not taken for this one's.
TEST_F(MeasureTest, AReportIsNotCompleteBeforeItsEnd) {
  const std::string copy = temp_.File("report.json");
  struct Case {
    std::string bench, fits, is_too_long;
  };
  const std::string fits = " --input-len 8 --output-len 4", is_too_long = " --output-len 5000";
  for (const Case& each : {Case{"latency --batch 1", fits, is_too_long},
                           {"prefill", " --prompts 1x8", " --prompts 1x5000"},
                           {"throughput --requests 2", fits, is_too_long},
                           {"serve --concurrency 1 --requests 2", fits, is_too_long}}) {
    const std::string command = "bench " + each.bench + " " + At() + " --output " + copy;
    EXPECT_EQ(Lockstep(command + each.fits).code, 0) << each.bench;
    EXPECT_EQ(json::parse(ReadFile(copy))["complete"], true) << each.bench;
    EXPECT_EQ(Lockstep(command + each.is_too_long).code, 1) << each.bench;
    EXPECT_EQ(json::parse(ReadFile(copy)), json({{"complete", false}})) << each.bench;
  }
}

TEST_F(MeasureTest, AnUnwritableHtmlCostsNoFigures) {
  const std::string load =
      "bench serve " + At() + " --concurrency 2 --requests 4 --input-len 8 --output-len 4 --html ";
  // Takes nothing, but can be opened.
  const Shell full = Lockstep(load + "/dev/full");
  EXPECT_EQ(full.code, 1);
  EXPECT_THAT(full.out, HasSubstr("TTFT p50"));
  EXPECT_THAT(full.out, HasSubstr("--html /dev/full: cannot be written"));
  const Shell nowhere = Lockstep(load + temp_.File("no-folder/x.html"));
  EXPECT_EQ(nowhere.code, 1);
  EXPECT_THAT(nowhere.out, HasSubstr("x.html: cannot be written"));
  EXPECT_THAT(nowhere.out, Not(HasSubstr("2 at once")));  // said before it is measured
}

TEST_F(MeasureTest, TheQuantizationIsTheFlagsBehindTheDashesOrTheCheckpoints) {
  const std::string small = " --batch 1 --context 8 --output-len 4 --runs 1 --bandwidth 20GB/s ";
  const std::string quantized = ModelLikeTheDemo(
      temp_.File("quantized"), {{"quantization_config", {{"quant_method", "fp8"}}}});
  const auto target = [&](const std::string& arguments) {
    return JsonOf("bench latency " + At() + small + arguments)["target"];
  };
  EXPECT_TRUE(target("")["quantization"].is_null());  // a server does not say
  const json plain = target("--model " + DemoModel()), fp8 = target("--model " + quantized);
  EXPECT_EQ(plain["quantization"], "");
  EXPECT_EQ(fp8["quantization"], "fp8");
  EXPECT_LT(fp8["weight_bytes_read_a_step"], plain["weight_bytes_read_a_step"]);
  const std::string line = " with fp8 matrices";
  EXPECT_THAT(Lockstep("bench latency " + At() + small + "--model " + quantized).out,
              HasSubstr(line));
  EXPECT_THAT(Lockstep("bench latency " + At() + small + "--model " + DemoModel()).out,
              Not(HasSubstr(line)));

  // The cpu backend has no such matrices: it is asked for others.
  const std::string programs = InsteadOfLockstep(
      temp_.File("programs"),
      "for a; do shift; case $a in --quantization=fp8) ;; *) set -- \"$@\" \"$a\";; esac; done");
  UseBuiltPrograms();
  const Shell started = RunShell(absl::StrCat(
      "LOCKSTEP_PROGRAMS=", programs, " ", LOCKSTEP_BINARY_DIR, "/bin/lockstep bench latency",
      small, " --backend cpu --model ", DemoModel(), " -- --quantization=fp8 2>&1"));
  EXPECT_EQ(started.code, 0) << started.out;
  EXPECT_THAT(started.out, HasSubstr(line));
}

TEST_F(MeasureTest, AModelThatIsNotTheServersIsRefused) {
  const std::string other =
      ModelLikeTheDemo(temp_.File("other"), {{"architectures", {"MistralForCausalLM"}},
                                             {"model_type", "mistral"},
                                             {"attention_bias", nullptr},
                                             {"mlp_bias", nullptr},
                                             {"pretraining_tp", nullptr}});
  const Shell shell = Lockstep("bench latency " + At() + " --model " + other);
  EXPECT_EQ(shell.code, 1);
  EXPECT_THAT(shell.out, HasSubstr("--model: " + other + " is a MistralForCausalLM, and "));
}

TEST_F(MeasureTest, ServeHasRequestsForItsConcurrency) {
  const std::string serve = "bench serve " + At() + " --input-len 4 --output-len 2 --concurrency ";
  const Shell few = Lockstep(serve + "2,256 --requests 8");
  EXPECT_EQ(few.code, 1);
  EXPECT_THAT(few.out, HasSubstr("--concurrency 256: above --requests 8"));
  EXPECT_EQ(JsonOf(serve + "55,60")["points"][0]["completed"], 240);
  EXPECT_THAT(Lockstep(serve + "2 --runs 2").out, HasSubstr("--runs"));
  EXPECT_NE(Lockstep(serve + "2 --runs 2").code, 0);
}

TEST_F(MeasureTest, AnswersOfOneTokenHaveNoTimePerToken) {
  const std::string one =
      "bench throughput " + At() + " --requests 2 --input-len 8 --output-len 1 --runs 1";
  EXPECT_TRUE(JsonOf(one)["tpot_median_ms"].is_null());
  EXPECT_THAT(Lockstep(one).out, HasSubstr("TPOT median   -\n"));
}

TEST_F(MeasureTest, AComputeRateWithoutItsUnitIsRefused) {
  const std::string prefill = "bench prefill " + At() + " --prompts 1x8 --compute ";
  EXPECT_THAT(Lockstep(prefill + "770").out, HasSubstr("as in 770TFLOPS"));
  EXPECT_EQ(Lockstep(prefill + "770").code, 1);
  EXPECT_EQ(Lockstep(prefill + "770T").code, 0);
}

TEST_F(MeasureTest, BenchStartsAServerOfItsOwnAndPassesFlagsOn) {
  const std::string said = temp_.File("bench-server.log");
  const json report =
      JsonOf("bench latency --tp 1 --load-format dummy --batch 2 --context 16 --output-len 8" +
             absl::StrCat(" --runs 1 --dtype float32 --server-log ", said, " --model ", DemoModel(),
                          " -- --num-kv-blocks 77 --served-model-name x"));
  EXPECT_EQ(report["target"]["model"], "x");
  EXPECT_EQ(report["target"]["dtype"], "float32");
  EXPECT_EQ(report["target"]["kv_tokens"], 77 * 16);
  EXPECT_THAT(ReadFile(said), HasSubstr("[coordinator]"));
}

// The warm-up fits as well, however small the server is that the load asks for.
TEST_F(MeasureTest, ServeMeasuresTheSmallestLoadThereIs) {
  const json report = JsonOf("bench serve --model " + DemoModel() +
                             " --backend cpu --concurrency 1 --requests 2 --input-len 3"
                             " --output-len 2");
  ASSERT_TRUE(report.is_object());
  EXPECT_EQ(report["points"][0]["completed"], 2);
}

TEST_F(MeasureTest, AShapeWithoutWeightsCanBeMeasured) {
  const std::string folder = temp_.File("tiny-shape");
  EXPECT_EQ(Lockstep("bench shape tiny " + folder).code, 0);
  const json report = JsonOf("bench latency --load-format dummy --tp 2 --batch 2 --context 16" +
                             (" --output-len 8 --runs 1 --bandwidth 1GB/s --model " + folder));
  EXPECT_EQ(report["target"]["model"], "tiny-shape");
  EXPECT_GT(report["cases"][0]["floor_ms"], 0);
  // Never over what is there.
  EXPECT_EQ(Lockstep("bench shape tiny " + folder).code, 1);
  EXPECT_THAT(Lockstep("bench shape huge " + folder).out, HasSubstr("llama-8b"));
}

TEST_F(MeasureTest, BenchSaysWhatIsMissing) {
  EXPECT_THAT(Lockstep("bench latency").out, HasSubstr("--server"));
  EXPECT_THAT(Lockstep("bench serve " + At()).out, HasSubstr("--request-rate"));
  EXPECT_THAT(Lockstep("bench latncy").out, HasSubstr("did you mean latency?"));
  EXPECT_THAT(Lockstep("bench latency --btach 1").out, HasSubstr("did you mean --batch?"));
  EXPECT_EQ(Lockstep("bench latency --model /nowhere").code, 1);
}

TEST_F(MeasureTest, CompareFindsASplitModelEqualToTheWhole) {
  const json report = JsonOf("compare --server-b " + served_->server().address() + " --model " +
                             DemoModel() + " --random-prompts 3 --max-tokens 12");
  EXPECT_EQ(report["prompts"], 3);
  EXPECT_EQ(report["same_answers"], 3);
  EXPECT_EQ(report["positions"], 36);
  EXPECT_EQ(report["same_next_token"], 36);
  EXPECT_EQ(report["max_logprob_error"], 0);
}

TEST_F(MeasureTest, CompareSeesAnotherPrecisionAndFailsBeyondTheBound) {
  const std::string prompts = temp_.File("compare.jsonl");
  std::ofstream(prompts, std::ios::trunc)
      << R"({"messages":[{"role":"user","content":"What is 35 + 28?"}]})"
      << "\n";
  const Shell shell =
      Lockstep("compare --server-a " + served_->server().address() + " --model " + DemoModel() +
               " --flags-b='--dtype float32' --max-error 1e-6" + " --prompts " + prompts);
  EXPECT_EQ(shell.code, 1);
  EXPECT_THAT(shell.out, HasSubstr("above --max-error"));
  EXPECT_THAT(shell.out, HasSubstr("same answers         1 of 1 prompts"));
}

// Found before anything is asked: B would refuse what it is to score.
TEST_F(MeasureTest, CompareSaysHowManyTokensAnAnswerMayHave) {
  const std::string prompts = temp_.File("compare-room.jsonl");
  const auto write = [&](int tokens) {
    std::ofstream(prompts, std::ios::trunc)
        << "{\"prompt\":\"Once\"}\n"
        << json{{"prompt", std::vector<int>(static_cast<size_t>(tokens), 9)}} << "\n";
  };
  const std::string at = served_->server().address();
  const std::string command =
      "compare --server-a " + at + " --server-b " + at + " --prompts " + prompts + " --max-tokens ";
  write(2000);  // of 2,048
  const Shell full = Lockstep(command + "48");
  EXPECT_EQ(full.code, 1);
  EXPECT_THAT(full.out, HasSubstr("--max-tokens 48: line-2: a prompt of 2000 tokens"));
  EXPECT_THAT(full.out, HasSubstr("at most 47 would work"));
  EXPECT_EQ(Lockstep(command + "47").code, 0);
  write(2047);
  EXPECT_THAT(Lockstep(command + "1").out, HasSubstr("leaves no room"));
}

TEST_F(MeasureTest, CompareTakesZeroForABoundLikeAnyOther) {
  const std::string same = "compare --server-a " + served_->server().address() +
                           " --random-prompts 2 --max-tokens 4 --model " + DemoModel();
  EXPECT_EQ(Lockstep(same + " --max-error 0 --server-b " + served_->server().address()).code, 0);
  const Shell other = Lockstep(same + " --max-error 0 --flags-b='--dtype float32'");
  EXPECT_EQ(other.code, 1);
  EXPECT_THAT(other.out, HasSubstr("above --max-error 0"));
  EXPECT_THAT(Lockstep(same + " --max-error -1").out, HasSubstr("expected a number of 0 or more"));
}

TEST_F(MeasureTest, TopPrintsOneFrameOfAWorkingServer) {
  v1::GenerateRequest request = LongGreedy("Tell me", 1500);
  StreamedAnswer answer(&served_->client(), request);
  answer.AwaitTokens(1);
  const Shell shell = Lockstep("top --once --interval 0.2 " + Http());
  answer.Cancel();
  EXPECT_EQ(shell.code, 0) << shell.out;
  EXPECT_THAT(shell.out, HasSubstr("running 1"));
  EXPECT_THAT(shell.out, HasSubstr("rank"));
  EXPECT_THAT(shell.out, HasSubstr("the others wait for rank"));
  EXPECT_THAT(shell.out, Not(HasSubstr("out 0.0/s")));
  EXPECT_THAT(shell.out, Not(HasSubstr("\x1b[")));
}

TEST_F(MeasureTest, TopNeedsTheHttpDoor) {
  const Shell grpc_door = Lockstep("top --once " + At());
  EXPECT_EQ(grpc_door.code, 1);
  EXPECT_THAT(grpc_door.out, HasSubstr("HTTP door"));
  EXPECT_EQ(Lockstep("top --once --server 127.0.0.1:1").code, 1);
  EXPECT_THAT(Lockstep("top --once --server nonsense").out, HasSubstr("expected host:port"));
}

}  // namespace
}  // namespace lockstep
