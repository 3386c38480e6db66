// Metrics read back, and the picture made of two scrapes.
#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "cli/top/frame.h"
#include "cli/top/metrics_text.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

using ::testing::DoubleNear;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::Optional;

TEST(MetricsText, ReadsNamesLabelsAndValues) {
  const MetricsText text = MetricsText::Parse(
      "# HELP a what\n# TYPE a gauge\na 3\n"
      "b{x=\"1\",y=\"two, \\\"quoted\\\" \\\\ {}\"} 2.5e3 1700000000\n"
      "b{x=\"2\"} 4\r\n"
      "c{le=\"+Inf\"} +Inf\n");
  EXPECT_THAT(text.Value("a"), Optional(3));
  EXPECT_THAT(text.Value("b", {{"x", "1"}}), Optional(2500));
  EXPECT_THAT(text.Value("b"), Optional(2504));
  EXPECT_EQ(text.Label("b", "y"), "two, \"quoted\" \\ {}");
  EXPECT_EQ(text.Value("b", {{"x", "3"}}), std::nullopt);
  EXPECT_EQ(text.Value("none"), std::nullopt);
  EXPECT_TRUE(std::isinf(*text.Value("c")));
}

TEST(MetricsText, SkipsWhatItDoesNotUnderstand) {
  const MetricsText text = MetricsText::Parse(
      "a{x=\"1\" 3\nb{x=1} 2\nc{\nd{=\"\nwords and more\ne\n\n{} 4\nok 1\nf{x=\"y\\");
  EXPECT_THAT(text.Value("ok"), Optional(1));
  EXPECT_EQ(text.Value("a"), std::nullopt);
  EXPECT_EQ(text.Value("e"), std::nullopt);
}

TEST(MetricsText, OrdersRanksByNumber) {
  const MetricsText text =
      MetricsText::Parse("r{rank=\"10\"} 1\nr{rank=\"9\"} 1\nr{rank=\"0\"} 1\n");
  EXPECT_THAT(text.LabelValues("r", "rank"), ElementsAre("0", "9", "10"));
}

std::string Histogram(int to_10, int to_20, int all, double sum) {
  return absl::StrCat("h_bucket{le=\"10\"} ", to_10, "\nh_bucket{le=\"20\"} ", to_20,
                      "\nh_bucket{le=\"+Inf\"} ", all, "\nh_count ", all, "\nh_sum ", sum, "\n");
}

TEST(HistogramDelta, IsWhatCameBetweenTheScrapes) {
  const MetricsText before = MetricsText::Parse(Histogram(100, 100, 100, 500));
  const MetricsText now = MetricsText::Parse(Histogram(100, 104, 104, 560));
  const HistogramDelta delta = DeltaOf(before, now, "h");
  EXPECT_EQ(delta.count, 4);
  EXPECT_THAT(delta.mean(), Optional(DoubleNear(15, 1e-12)));
  EXPECT_THAT(delta.quantile(0.5), Optional(DoubleNear(15, 1e-12)));
  EXPECT_THAT(delta.quantile(1), Optional(DoubleNear(20, 1e-12)));
}

TEST(HistogramDelta, AboveTheLastBoundIsTheLastBound) {
  const HistogramDelta delta = DeltaOf({}, MetricsText::Parse(Histogram(0, 1, 9, 900)), "h");
  EXPECT_THAT(delta.quantile(0.99), Optional(20));
}

TEST(HistogramDelta, NothingHappenedIsNoFigure) {
  const MetricsText same = MetricsText::Parse(Histogram(1, 2, 3, 4));
  const HistogramDelta delta = DeltaOf(same, same, "h");
  EXPECT_EQ(delta.mean(), std::nullopt);
  EXPECT_EQ(delta.quantile(0.5), std::nullopt);
  EXPECT_EQ(DeltaOf(same, same, "absent").mean(), std::nullopt);
}

TEST(HistogramDelta, ARestartedServerCountsFromZero) {
  const MetricsText before = MetricsText::Parse(Histogram(50, 60, 70, 800));
  const MetricsText now = MetricsText::Parse(Histogram(2, 2, 2, 10));
  EXPECT_EQ(DeltaOf(before, now, "h").count, 2);
  EXPECT_EQ(CounterDelta(before, now, "h_count"), 2);
}

std::string Scrape(int steps, double wait_0, double wait_1) {
  std::string text = absl::StrCat(
      "vllm:num_requests_running{model_name=\"demo\",engine=\"0\"} 3\n"
      "lockstep_build_info{version=\"0.1.0\"} 1\nlockstep_ready 1\nlockstep_epoch 2\n"
      "lockstep_requests{state=\"running\"} 3\nlockstep_requests{state=\"waiting\"} 7\n"
      "vllm:generation_tokens_total{model_name=\"demo\"} ",
      steps * 3,
      "\nlockstep_kv_blocks{state=\"active\"} 40\nlockstep_kv_blocks{state=\"cached\"} 10\n"
      "lockstep_kv_blocks{state=\"free\"} 40\nlockstep_kv_blocks{state=\"pending\"} 10\n"
      "lockstep_step_seconds_count{kind=\"decode\"} ",
      steps, "\nlockstep_step_seconds_sum{kind=\"decode\"} ", steps * 0.004, "\n");
  for (const int rank : {0, 1}) {
    const std::string at = absl::StrCat("{rank=\"", rank, "\"} ");
    absl::StrAppend(&text, "lockstep_worker_up", at, 1, "\nlockstep_weight_bytes", at, 1 << 30,
                    "\nlockstep_collective_wait_seconds_count", at, steps,
                    "\nlockstep_collective_wait_seconds_sum", at, rank == 0 ? wait_0 : wait_1,
                    "\n");
  }
  return text;
}

TEST(Frame, ShowsLoadStepsRanksAndWhoIsSlow) {
  const MetricsText before = MetricsText::Parse(Scrape(100, 0.1, 0.1));
  const MetricsText now = MetricsText::Parse(Scrape(300, 0.5, 0.3));
  const std::string frame = RenderFrame("host:8000", before, now, 2);
  EXPECT_THAT(frame, HasSubstr("host:8000   demo   ready   epoch 2"));
  EXPECT_THAT(frame, HasSubstr("running 3     waiting 7"));
  EXPECT_THAT(frame, HasSubstr("out 300.0/s"));
  EXPECT_THAT(frame, HasSubstr("decode 4 ms x 100/s"));
  EXPECT_THAT(frame, HasSubstr("[##########++........] 50.0%"));
  EXPECT_THAT(frame, HasSubstr("1.00 GiB"));
  // 0.4 s and 0.2 s over 200 steps: rank 1 waits less.
  EXPECT_THAT(frame, HasSubstr("2 ms"));
  EXPECT_THAT(frame, HasSubstr("the others wait for rank 1: 1 ms a step"));
  EXPECT_THAT(frame, HasSubstr("first token p50 - p99 -"));
}

TEST(Frame, IsAtMostAHundredWide) {
  const MetricsText text = MetricsText::Parse(Scrape(100, 0.1, 0.2));
  std::string line;
  for (const char c : RenderFrame("127.0.0.1:8000", {}, text, 1)) {
    if (c != '\n') {
      line += c;
      continue;
    }
    EXPECT_LE(line.size(), 100u) << line;
    line.clear();
  }
}

TEST(Frame, OfAServerThatSaysNothingIsStillAFrame) {
  const std::string frame = RenderFrame("host:1", {}, {}, 0);
  EXPECT_THAT(frame, HasSubstr("NOT READY"));
  EXPECT_THAT(frame, Not(HasSubstr("nan")));
}

}  // namespace
}  // namespace lockstep
