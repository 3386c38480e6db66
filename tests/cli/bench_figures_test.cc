// What is made of request logs: figures that can be worked out by hand.
#include <cmath>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cli/bench/prompts.h"
#include "cli/bench/request_log.h"
#include "cli/bench/serve_figures.h"
#include "cli/bench/serve_report.h"
#include "cli/bench/statistics.h"
#include "cli/bench/svg_plot.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

using ::testing::DoubleNear;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::Optional;

constexpr int64_t kMs = 1'000'000;

// A request due at 0 whose tokens arrive one by one at these milliseconds.
RequestLog Log(const std::vector<int64_t>& arrivals_ms, int64_t due_ms = 0) {
  RequestLog log;
  log.due_ns = due_ms * kMs;
  log.sent_ns = log.due_ns;
  for (const int64_t ms : arrivals_ms) {
    log.arrivals.push_back({ms * kMs, 1});
    ++log.output_tokens;
  }
  log.end_ns = arrivals_ms.empty() ? log.due_ns : log.arrivals.back().ns;
  return log;
}

TEST(Statistics, QuantilesLieBetweenNeighbours) {
  EXPECT_EQ(Quantile({3, 1, 2}, 0.5), 2);
  EXPECT_EQ(Quantile({4, 1, 2, 3}, 0.5), 2.5);
  EXPECT_EQ(Quantile({1, 2, 3, 4, 5}, 1), 5);
  EXPECT_EQ(Quantile({}, 0.5), 0);
}

TEST(RequestLog, CountsLatenciesFromWhenItWasDue) {
  const RequestLog log = Log({150, 160, 170, 180}, 100);
  EXPECT_NEAR(log.first_token_s(), 0.050, 1e-12);
  EXPECT_NEAR(log.latency_s(), 0.080, 1e-12);
  EXPECT_THAT(log.per_token_s(), Optional(DoubleNear(0.010, 1e-12)));
}

TEST(RequestLog, CountsTokensNotMessages) {
  RequestLog log = Log({10, 30});
  log.arrivals[1].tokens = 4;  // four tokens, 20 ms after the first
  EXPECT_THAT(log.per_token_s(), Optional(DoubleNear(0.005, 1e-12)));
}

TEST(RequestLog, OneMessageHasNoTimePerToken) { EXPECT_EQ(Log({10}).per_token_s(), std::nullopt); }

TEST(AllRunning, IsFromTheLastStartToTheFirstEnd) {
  const TimeWindow window = AllRunning({Log({10, 20, 30, 40}), Log({25, 35, 45})});
  EXPECT_EQ(window.begin_ns, 25 * kMs);
  EXPECT_EQ(window.end_ns, 40 * kMs);
}

TEST(AllRunning, IsEmptyWhenOneEndedBeforeAnotherBegan) {
  EXPECT_EQ(AllRunning({Log({10, 20}), Log({30, 40})}).seconds(), 0);
  EXPECT_EQ(AllRunning({}).seconds(), 0);
}

TEST(PerTokenWithin, LeavesOutStepsThatServedPromptsOfOthers) {
  // Slow steps of 100 ms while the other's prompt ran, then 10 ms each.
  const RequestLog early = Log({100, 200, 300, 310, 320, 330});
  const RequestLog late = Log({300, 310, 320, 330, 340});
  const TimeWindow window = AllRunning({early, late});
  EXPECT_THAT(PerTokenWithin(early, window), Optional(DoubleNear(0.010, 1e-12)));
  EXPECT_THAT(PerTokenWithin(late, window), Optional(DoubleNear(0.010, 1e-12)));
  EXPECT_EQ(GapsWithin({early, late}, window).size(), 6u);
}

TEST(FirstFailure, NamesTheRequest) {
  std::vector<RequestLog> logs = {Log({1}), Log({2})};
  EXPECT_TRUE(FirstFailure(logs).ok());
  logs[1].status = absl::ResourceExhaustedError("queue full");
  EXPECT_THAT(std::string(FirstFailure(logs).message()), HasSubstr("request 1 of 2: queue full"));
  EXPECT_FALSE(FirstFailure({Log({})}).ok());
}

TEST(FirstFailure, IsAnAnswerOfAnotherLengthThanWasAsked) {
  std::vector<RequestLog> logs = {Log({1, 2, 3}), Log({1, 2})};
  for (RequestLog& log : logs) log.asked_tokens = 3;
  EXPECT_THAT(std::string(FirstFailure(logs).message()),
              HasSubstr("request 1 of 2: the answer had 2 tokens of 3"));
  EXPECT_EQ(Summarize({true, 1}, logs, {}).failed, 1);
  logs.pop_back();
  EXPECT_TRUE(FirstFailure(logs).ok());
}

TEST(Prompts, AreDistinctAndAsLongAsAsked) {
  std::mt19937_64 random(7);
  std::set<std::string> seen;
  for (const v1::GenerateRequest& request : RandomRequests(50, {20, 5}, 100, &random)) {
    EXPECT_EQ(request.token_ids().ids_size(), 20);
    for (const uint32_t id : request.token_ids().ids()) EXPECT_LT(id, 100u);
    EXPECT_EQ(request.sampling().max_tokens(), 5u);
    EXPECT_TRUE(request.sampling().ignore_eos());
    EXPECT_TRUE(seen.insert(request.token_ids().SerializeAsString()).second);
  }
}

TEST(Prompts, ChatLengthsHaveTheStatedMediansAndFit) {
  std::mt19937_64 random(7);
  std::vector<double> prompts, outputs;
  for (int i = 0; i < 20000; ++i) {
    const Lengths lengths = ChatLengths(&random, 4096);
    prompts.push_back(lengths.prompt);
    outputs.push_back(lengths.output);
    const Lengths tight = ChatLengths(&random, 64);
    EXPECT_LE(tight.prompt + tight.output, 64u);
    EXPECT_GT(tight.output, 0u);
  }
  EXPECT_NEAR(Median(prompts), 110, 5);
  EXPECT_NEAR(Median(outputs), 140, 5);
  EXPECT_NEAR(Mean(prompts), 201, 5);
  EXPECT_NEAR(Mean(outputs), 204, 5);
}

TEST(ServeFigures, CountGoodRequestsAgainstBothLimits) {
  std::vector<RequestLog> logs = {
      Log({50, 60, 70}),     // good
      Log({150, 160, 170}),  // first token late
      Log({50, 90, 130}),    // slow after it
      Log({40}),             // one token: no time per token to miss
  };
  logs.push_back(Log({}));
  logs.back().status = absl::ResourceExhaustedError("full");
  logs.back().end_ns = 200 * kMs;
  logs.push_back(Log({}));
  logs.back().status = absl::UnavailableError("gone");
  const ServeFigures figures = Summarize({true, 2}, logs, {.ttft_ms = 100, .tpot_ms = 20});
  EXPECT_EQ(figures.completed, 4);
  EXPECT_EQ(figures.good, 2);
  EXPECT_EQ(figures.refused, 1);
  EXPECT_EQ(figures.failed, 1);
  EXPECT_EQ(figures.first_failure, "full");
  EXPECT_NEAR(figures.seconds, 0.2, 1e-12);
  EXPECT_NEAR(figures.goodput_per_s(), 10, 1e-9);
  EXPECT_NEAR(figures.good_share(), 2.0 / 6, 1e-12);
  EXPECT_EQ(figures.output_tokens, 10);
  EXPECT_NEAR(figures.ttft_ms.max, 150, 1e-9);
}

TEST(ServeFigures, SlicesHoldEveryTokenAndTheMeanOfWhatRan) {
  const std::vector<RequestLog> logs = {Log({100, 300, 600}), Log({200, 400, 600})};
  const ServeFigures figures = Summarize({false, 2}, logs, {});
  double tokens = 0, request_seconds = 0;
  for (const double rate : figures.tokens_per_s) tokens += rate * figures.slice_s;
  for (const double running : figures.running) request_seconds += running * figures.slice_s;
  EXPECT_NEAR(tokens, 6, 1e-6);
  EXPECT_NEAR(request_seconds, 1.2, 1e-6);
}

TEST(ServeFigures, NothingSentIsNothingSaid) {
  const ServeFigures figures = Summarize({true, 1}, {}, {});
  EXPECT_EQ(figures.requests_per_s(), 0);
  EXPECT_EQ(figures.good_share(), 0);
  EXPECT_TRUE(ToJson(figures).is_object());
}

RequestLog Ended(const absl::Status& status) {
  RequestLog log = Log({});
  log.status = status;
  return log;
}

TEST(ServeFigures, RefusalsBesideAnswersAreNoErrorButFailuresAndSilenceAre) {
  const RequestLog answered = Log({50, 60}), full = Ended(absl::ResourceExhaustedError("full")),
                   gone = Ended(absl::UnavailableError("gone"));
  EXPECT_TRUE(Verdict(Summarize({true, 2}, {answered, full}, {})).ok());
  const absl::Status failed = Verdict(Summarize({true, 2}, {answered, gone, gone}, {}));
  EXPECT_THAT(std::string(failed.message()), HasSubstr("2 req/s: 2 of 3 requests failed"));
  EXPECT_THAT(std::string(failed.message()), HasSubstr("gone"));
  const absl::Status silent = Verdict(Summarize({false, 4}, {full, full}, {}));
  EXPECT_THAT(std::string(silent.message()), HasSubstr("4 at once: none of 2 requests"));
}

nlohmann::ordered_json Report() {
  nlohmann::ordered_json points = nlohmann::ordered_json::array();
  for (const double rate : {4.0, 1.0}) {
    points.push_back(ToJson(Summarize({true, rate}, {Log({50, 60, 70}), Log({80, 95, 120})}, {})));
  }
  return {{"target",
           {{"model", "<demo>"},
            {"architecture", "Llama"},
            {"dtype", "float32"},
            {"tensor_parallel_size", 2},
            {"device", "cpu"}}},
          {"lengths", "fixed"},
          {"slo", {{"ttft_ms", 100}, {"tpot_ms", 20}}},
          {"points", points}};
}

TEST(ServeReport, IsOneFileThatNeedsNothingElse) {
  const std::string html = ServeHtml(Report());
  EXPECT_THAT(html, HasSubstr("<svg"));
  EXPECT_THAT(html, HasSubstr("Against load, open loop"));
  EXPECT_THAT(html, Not(HasSubstr("closed loop")));
  for (const char* outside : {"<script", "<link", "src=", "url(", "http://", "https://"}) {
    EXPECT_THAT(html, Not(HasSubstr(outside)));
  }
  EXPECT_THAT(html, HasSubstr("&lt;demo&gt;"));
  EXPECT_THAT(html, Not(HasSubstr("<demo>")));
}

TEST(ServeReport, TableHasALineForEachPoint) {
  const std::string table = ServeTable(Report());
  EXPECT_THAT(table, HasSubstr("4 req/s"));
  EXPECT_THAT(table, HasSubstr("1 req/s"));
}

TEST(ServeReport, WhatWasNotMeasuredIsNoZero) {
  nlohmann::ordered_json report = Report();
  report["points"].push_back(
      ToJson(Summarize({true, 8}, {Ended(absl::UnavailableError("gone"))}, {})));
  report["points"].push_back(ToJson(Summarize({true, 16}, {Log({50})}, {})));
  for (const char* key : {"ttft_ms", "tpot_ms", "gap_ms", "latency_s"}) {
    EXPECT_TRUE(report["points"][2][key].is_null()) << key;
  }
  EXPECT_FALSE(report["points"][3]["ttft_ms"].is_null());
  EXPECT_TRUE(report["points"][3]["tpot_ms"].is_null());
  const std::string table = ServeTable(report);
  const std::string dash = "         -";
  EXPECT_THAT(table, HasSubstr(dash + dash + dash + dash + dash + "\n    first failure: gone"));
  EXPECT_THAT(table, HasSubstr("      50.0      50.0" + dash + dash + dash));
  // As a point's hint has it: its line, load and value.
  const std::string html = ServeHtml(report);
  EXPECT_THAT(html, HasSubstr("p50: 16, 50"));
  EXPECT_THAT(html, Not(HasSubstr("p50: 16, 0")));
  EXPECT_THAT(html, HasSubstr("p50: 4, "));
  EXPECT_THAT(html, Not(HasSubstr("p50: 8, ")));
}

TEST(ServeReport, SaysHowTheMatricesAreHeld) {
  nlohmann::ordered_json report = Report();
  EXPECT_THAT(ServeTable(report), HasSubstr("(Llama, float32)"));
  report["target"]["quantization"] = "fp8";
  EXPECT_THAT(ServeTable(report), HasSubstr("(Llama, float32 with fp8 matrices)"));
}

TEST(SvgPlot, TicksAreRoundNumbers) {
  EXPECT_NEAR(TickStep(10, 5), 2, 1e-12);
  EXPECT_NEAR(TickStep(0.37, 5), 0.1, 1e-12);
  EXPECT_NEAR(TickStep(7200, 6), 2000, 1e-9);
  EXPECT_EQ(TickStep(0, 5), 1);
  EXPECT_EQ(TickStep(std::nan(""), 5), 1);
}

TEST(SvgPlot, KeepsPointsInsideAndSaysWhenThereAreNone) {
  EXPECT_THAT(SvgPlot({"t", "x", "y", {}}), HasSubstr("no data"));
  const std::string svg = SvgPlot({"t", "x", "y", {{"s", {{0, 0}, {10, 100}}}}});
  EXPECT_THAT(svg, HasSubstr("points=\"62.0,247.0 506.0,51.0 \""));
}

// However many there are: the plot begins under them, and no two look alike.
TEST(SvgPlot, ManyNamesStandAboveThePlot) {
  Plot plot{"t", "x", "y", {}};
  for (int i = 0; i < 14; ++i) plot.series.push_back({absl::StrCat("at ", i), {{0, 0}, {10, 9}}});
  const std::string svg = SvgPlot(plot);
  EXPECT_THAT(svg, HasSubstr("y=\"49\">at 13<"));  // the second line
  EXPECT_THAT(svg, HasSubstr("points=\"62.0,261.0 506.0,84.6 \""));
  EXPECT_THAT(svg, HasSubstr("viewBox=\"0 0 520 307\""));
  for (const char* look : {"line c1\"", "line c1 d1\"", "line c1 d2\""}) {
    EXPECT_THAT(svg, HasSubstr(absl::StrCat("<polyline class=\"", look))) << look;
  }
}

}  // namespace
}  // namespace lockstep
