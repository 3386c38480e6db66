// How two configurations' answers are held against each other.
#include "cli/compare/compare_figures.h"

#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

PositionView View(double chosen, std::vector<std::pair<uint32_t, double>> top) {
  return {std::move(top), chosen};
}

ComparedPrompt Same() {
  const PositionView view = View(-0.1, {{5, -0.1}, {6, -2.5}});
  return {"same", {5, 5}, {5, 5}, {view, view}, {view, view}};
}

TEST(Compare, FindsNoDifferenceWhereThereIsNone) {
  const CompareFigures figures = Compare({Same()});
  EXPECT_EQ(figures.same_answers, 1);
  EXPECT_EQ(figures.same_next, 2);
  EXPECT_EQ(figures.positions, 2);
  EXPECT_EQ(figures.max_error, 0);
  EXPECT_EQ(figures.earliest_divergence(), std::nullopt);
  EXPECT_TRUE(figures.disagreements.empty());
}

TEST(Compare, FindsTheFirstDivergenceOfEachAnswer) {
  ComparedPrompt late = Same(), shorter = Same();
  late.tokens_b = {5, 7};
  shorter.tokens_b = {5};
  const CompareFigures figures = Compare({Same(), late, shorter});
  EXPECT_THAT(figures.divergences, ElementsAre(-1, 1, 1));
  EXPECT_EQ(figures.same_answers, 1);
  EXPECT_EQ(figures.earliest_divergence(), 1);
}

TEST(Compare, ErrorsAreOverTokensBothListed) {
  ComparedPrompt prompt = Same();
  prompt.view_b[1] = View(-0.15, {{5, -0.15}, {7, -2.0}, {6, -2.8}});
  const CompareFigures figures = Compare({prompt});
  EXPECT_NEAR(figures.max_error, 0.3, 1e-12);
  EXPECT_EQ(figures.worst_prompt, "same");
  EXPECT_EQ(figures.worst_position, 1u);
  EXPECT_EQ(figures.same_next, 2);
}

TEST(Compare, ADisagreementCarriesTheReferencesGap) {
  ComparedPrompt prompt = Same();
  prompt.view_a[0] = View(-0.6, {{5, -0.6}, {6, -0.9}});
  prompt.view_b[0] = View(-0.8, {{6, -0.7}, {5, -0.8}});
  const CompareFigures figures = Compare({prompt});
  ASSERT_EQ(figures.disagreements.size(), 1u);
  EXPECT_EQ(figures.disagreements[0].token_a, 5u);
  EXPECT_EQ(figures.disagreements[0].token_b, 6u);
  EXPECT_NEAR(figures.largest_gap(), 0.3, 1e-12);
  EXPECT_EQ(figures.same_next, 1);
}

TEST(Compare, ATokenTheReferenceDidNotListHasAtLeastTheLastOnesGap) {
  ComparedPrompt prompt = Same();
  prompt.view_b[0] = View(-3, {{99, -0.1}, {5, -3}});
  EXPECT_NEAR(Compare({prompt}).largest_gap(), 2.4, 1e-12);
}

TEST(Compare, NotANumberIsTheWorstError) {
  ComparedPrompt prompt = Same();
  prompt.view_b[0].chosen = std::numeric_limits<double>::quiet_NaN();
  const CompareFigures figures = Compare({prompt});
  EXPECT_TRUE(std::isnan(figures.max_error));
}

TEST(Compare, ReportsSayWhatWasFound) {
  ComparedPrompt prompt = Same();
  prompt.tokens_b = {5, 7};
  prompt.view_b[1] = View(-1, {{7, -0.5}, {5, -1}});
  const CompareFigures figures = Compare({prompt, Same()});
  const std::string table = ToTable(figures);
  EXPECT_THAT(table, HasSubstr("1 of 2 prompts"));
  EXPECT_THAT(table, HasSubstr("3 of 4 positions (75.00 %)"));
  EXPECT_THAT(table, HasSubstr("after 1 tokens"));
  EXPECT_EQ(ToJson(figures)["earliest_divergence"], 1);
  EXPECT_EQ(ToJson(figures)["disagreements"].size(), 1u);
}

}  // namespace
}  // namespace lockstep
