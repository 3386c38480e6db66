#include "coordinator/text/stop_matcher.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

#include "tests/text/text_test_util.h"

namespace lockstep {
namespace {

struct Result {
  std::string text;
  std::optional<size_t> matched;
  bool operator==(const Result&) const = default;
};

std::ostream& operator<<(std::ostream& out, const Result& r) {
  return out << '"' << r.text << "\" " << (r.matched ? std::to_string(*r.matched) : "none");
}

// The rule of the header, over the whole text at once.
Result Oracle(const std::string& text, const std::vector<std::string>& stops, bool include) {
  size_t best_begin = std::string::npos, best = 0;
  for (size_t i = 0; i < stops.size(); ++i) {
    if (stops[i].empty()) continue;
    const size_t begin = text.find(stops[i]);
    if (begin == std::string::npos) continue;
    if (begin < best_begin || (begin == best_begin && stops[i].size() < stops[best].size())) {
      best_begin = begin;
      best = i;
    }
  }
  if (best_begin == std::string::npos) return {text, std::nullopt};
  return {text.substr(0, best_begin + (include ? stops[best].size() : 0)), best};
}

Result Match(const std::vector<std::string>& pieces, const std::vector<std::string>& stops,
             bool include) {
  StopMatcher matcher(stops, include);
  Result result;
  for (const std::string& piece : pieces) {
    StopMatcher::Output out = matcher.Push(piece);
    result.text += out.text;
    if (out.matched) result.matched = out.matched;
  }
  StopMatcher::Output out = matcher.Flush();
  result.text += out.text;
  if (out.matched) result.matched = out.matched;
  EXPECT_EQ(matcher.held_bytes(), 0u);
  return result;
}

TEST(StopMatcherTest, CutsBeforeTheStopAcrossPieces) {
  StopMatcher matcher({"User:"}, false);
  EXPECT_EQ(matcher.Push("Fine.\nUs").text, "Fine.\n");
  EXPECT_EQ(matcher.Push("e").text, "");
  StopMatcher::Output out = matcher.Push("r: and more");
  EXPECT_EQ(out.text, "");
  EXPECT_EQ(out.matched, 0u);
}

TEST(StopMatcherTest, IncludesTheStopWhereAsked) {
  StopMatcher matcher({"END"}, true);
  EXPECT_EQ(matcher.Push("the E").text, "the ");
  StopMatcher::Output out = matcher.Push("ND. More");
  EXPECT_EQ(out.text, "END");
  EXPECT_EQ(out.matched, 0u);
}

TEST(StopMatcherTest, HoldsOnlyWhatMayBecomeAMatch) {
  StopMatcher matcher({"abc", "\n\n"}, false);
  EXPECT_EQ(matcher.Push("xab").text, "x");
  EXPECT_EQ(matcher.held_bytes(), 2u);
  EXPECT_EQ(matcher.Push("ab").text, "ab");
  EXPECT_EQ(matcher.Push("d\n").text, "abd");
  EXPECT_EQ(matcher.held_bytes(), 1u);
  EXPECT_EQ(matcher.Flush().text, "\n");
}

TEST(StopMatcherTest, TheShorterOfTwoThatBeginTogetherWins) {
  StopMatcher matcher({"abc", "ab"}, false);
  StopMatcher::Output out = matcher.Push("xab");
  EXPECT_EQ(out.text, "x");
  EXPECT_EQ(out.matched, 1u);
}

TEST(StopMatcherTest, AStopInsideALongerOneWaitsForIt) {
  StopMatcher one({"abcd", "bc"}, false);
  StopMatcher::Output out = one.Push("abc");
  EXPECT_EQ(out.text, "");
  EXPECT_FALSE(out.matched);
  out = one.Push("d");
  EXPECT_EQ(out.text, "");
  EXPECT_EQ(out.matched, 0u);

  StopMatcher other({"abcd", "bc"}, false);
  other.Push("abc");
  out = other.Push("x");
  EXPECT_EQ(out.text, "a");
  EXPECT_EQ(out.matched, 1u);

  StopMatcher ends({"abcd", "bc"}, false);
  ends.Push("abc");
  out = ends.Flush();
  EXPECT_EQ(out.text, "a");
  EXPECT_EQ(out.matched, 1u);
}

TEST(StopMatcherTest, NothingFollowsAMatch) {
  StopMatcher matcher({"."}, false);
  EXPECT_EQ(matcher.Push("a.b").matched, 0u);
  StopMatcher::Output out = matcher.Push("c.");
  EXPECT_EQ(out.text, "");
  EXPECT_EQ(out.matched, 0u);
  EXPECT_EQ(matcher.Flush().text, "");
}

TEST(StopMatcherTest, EmptyStopsAndNoStopsMatchNothing) {
  EXPECT_EQ(Match({"a", "b"}, {}, false), (Result{"ab", std::nullopt}));
  EXPECT_EQ(Match({"a", "b"}, {""}, false), (Result{"ab", std::nullopt}));
  EXPECT_EQ(Match({"a", "b"}, {"", "b"}, false), (Result{"a", 1}));
}

TEST(StopMatcherTest, NeverCutsInsideACharacter) {
  // "é" and "è" share their first byte; a held byte alone would be broken text.
  StopMatcher matcher({"é!"}, false);
  EXPECT_EQ(matcher.Push("caf").text, "caf");
  EXPECT_EQ(matcher.Push("é").text, "");
  EXPECT_EQ(matcher.Push("è").text, "éè");
  for (std::string piece : {"日本", "語", "😀"}) EXPECT_EQ(matcher.Push(piece).text, piece);
}

TEST(StopMatcherTest, EverySplitOfEveryShortTextAgreesWithTheOracle) {
  const std::vector<std::vector<std::string>> cases = {
      {"a"},         {"ab"},          {"aa"},           {"aba"},          {"aab", "ab"},
      {"abab", "b"}, {"abb", "bb"},   {"aabb", "ab"},   {"a", "ab", "b"}, {"baab", "aa", "ab"},
      {"bb", "bb"},  {"aaab", "aab"}, {"abaabb", "aa"}, {"", "ba"},       {"bab", "aba", "aab"}};
  for (const auto& stops : cases) {
    for (uint32_t size = 0; size <= 8; ++size) {
      for (uint32_t bits = 0; bits < (1u << size); ++bits) {
        std::string text;
        for (uint32_t i = 0; i < size; ++i) text += (bits >> i & 1) ? 'b' : 'a';
        const Result expected = Oracle(text, stops, false);
        const Result included = Oracle(text, stops, true);
        // Each bit set cuts the text at that place.
        for (uint32_t cuts = 0; cuts < (size == 0 ? 1u : 1u << (size - 1)); ++cuts) {
          std::vector<std::string> pieces(1);
          for (uint32_t i = 0; i < size; ++i) {
            pieces.back() += text[i];
            if (cuts >> i & 1) pieces.emplace_back();
          }
          ASSERT_EQ(Match(pieces, stops, false), expected) << text << " cuts " << cuts;
          ASSERT_EQ(Match(pieces, stops, true), included) << text << " cuts " << cuts;
        }
      }
    }
  }
}

TEST(StopMatcherTest, RandomLongTextsAgreeWithTheOracle) {
  Random random(7);
  for (int round = 0; round < 3000; ++round) {
    auto word = [&](uint32_t most) {
      std::string out;
      for (uint32_t n = random.Below(most) + 1; n > 0; --n) out += "abc"[random.Below(3)];
      return out;
    };
    std::vector<std::string> stops;
    for (uint32_t n = random.Below(16) + 1; n > 0; --n) stops.push_back(word(9));
    std::vector<std::string> pieces;
    std::string text;
    for (uint32_t n = random.Below(40); n > 0; --n) {
      pieces.push_back(word(4));
      text += pieces.back();
    }
    const bool include = random.Below(2) == 0;
    ASSERT_EQ(Match(pieces, stops, include), Oracle(text, stops, include)) << text;
  }
}

TEST(StopMatcherTest, HoldsLessThanTheLongestStop) {
  StopMatcher matcher({std::string(255, 'a') + "b", "ab"}, false);
  std::string emitted;
  for (int i = 0; i < 5000; ++i) {
    emitted += matcher.Push("a").text;
    ASSERT_LT(matcher.held_bytes(), 256u);
  }
  EXPECT_EQ(emitted, std::string(5000 - 255, 'a'));
  EXPECT_EQ(matcher.Push("b").matched, 0u);
}

}  // namespace
}  // namespace lockstep
