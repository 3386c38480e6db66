#include "coordinator/text/utf8.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

#include "tests/text/text_test_util.h"

namespace lockstep {
namespace {

constexpr std::string_view kBad = "\xEF\xBF\xBD";

std::string Repeat(std::string_view text, size_t count) {
  std::string out;
  for (size_t i = 0; i < count; ++i) out += text;
  return out;
}

std::string Whole(std::string_view bytes, Utf8Replacement replacement) {
  std::string out;
  Utf8Stream stream(replacement);
  stream.Push(bytes, &out);
  stream.Finish(&out);
  return out;
}

// The oracle: tries every character length at every place, by decoding.
std::string SlowRepair(std::string_view bytes, Utf8Replacement replacement) {
  auto decodes = [](std::string_view c) {
    const uint8_t lead = c[0];
    const size_t size = lead < 0x80 ? 1 : lead < 0xC0 ? 0 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    if (size != c.size() || lead > 0xF4) return false;
    if (size == 1) return true;
    uint32_t code = lead & (0xFF >> (size + 1));
    for (char next : c.substr(1)) {
      if ((static_cast<uint8_t>(next) & 0xC0) != 0x80) return false;
      code = code << 6 | (next & 0x3F);
    }
    static constexpr uint32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
    return code >= kLeast[size] && code <= 0x10FFFF && (code < 0xD800 || code > 0xDFFF);
  };
  // Could `c` be completed to a character by some bytes?
  auto begins = [&](std::string_view c) {
    std::string longer(c);
    while (longer.size() < 4) {
      for (uint8_t first : {0x80, 0x90, 0xA0, 0xBF}) {
        std::string tried = longer + static_cast<char>(first);
        for (; tried.size() <= 4; tried += '\x80') {
          if (decodes(tried)) return true;
        }
      }
      longer += '\x80';
    }
    return false;
  };
  std::string out;
  for (size_t i = 0; i < bytes.size();) {
    size_t good = 0, part = 1;
    for (size_t n = 1; n <= 4 && i + n <= bytes.size(); ++n) {
      if (decodes(bytes.substr(i, n))) good = n;
      if (n < 4 && begins(bytes.substr(i, n))) part = n;
    }
    out += good > 0 ? std::string(bytes.substr(i, good))
                    : Repeat(kBad, replacement == Utf8Replacement::kPerByte ? part : 1);
    i += good > 0 ? good : part;
  }
  return out;
}

TEST(Utf8Test, TellsValidFromInvalid) {
  for (std::string_view good :
       {"", "a", "é", "€", "😀", "\xED\x9F\xBF", "\xF4\x8F\xBF\xBF", "a\u0000b"}) {
    EXPECT_TRUE(IsValidUtf8(good)) << good;
  }
  for (std::string_view bad :
       {"\x80", "\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xF0\x8F\xBF\xBF",
        "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xE2\x82", "\xFF", "a\xE2", "\xE2\x28\xA1"}) {
    EXPECT_FALSE(IsValidUtf8(bad)) << Whole(bad, Utf8Replacement::kPerByte);
  }
}

TEST(Utf8Test, ReplacesMaximalPiecesOrSingleBytes) {
  EXPECT_EQ(Whole("\xE2\x82", Utf8Replacement::kPerSubpart), kBad);
  EXPECT_EQ(Whole("\xE2\x82", Utf8Replacement::kPerByte), Repeat(kBad, 2));
  EXPECT_EQ(Whole("\xF0\x9F\x98x", Utf8Replacement::kPerSubpart), Repeat(kBad, 1) + "x");
  EXPECT_EQ(Whole("\xF0\x9F\x98x", Utf8Replacement::kPerByte), Repeat(kBad, 3) + "x");
  EXPECT_EQ(Whole("\xE0\x80\xC3\xA9", Utf8Replacement::kPerSubpart), Repeat(kBad, 2) + "é");
}

TEST(Utf8Test, HoldsBackOnlyACharacterThatCanStillBeCompleted) {
  std::string out;
  Utf8Stream stream(Utf8Replacement::kPerSubpart);
  stream.Push("a\xF0\x9F\x98", &out);
  EXPECT_EQ(out, "a");
  EXPECT_EQ(stream.held_bytes(), 3u);
  stream.Push("\x80", &out);
  EXPECT_EQ(out, "a😀");
  EXPECT_EQ(stream.held_bytes(), 0u);
  stream.Push("\xED", &out);
  stream.Push("\xA0", &out);  // a surrogate: known to be bad at its second byte
  EXPECT_EQ(out, "a😀" + Repeat(kBad, 2));
}

TEST(Utf8Test, LongRunsOfContinuationBytesAreNotHeld) {
  std::string out;
  Utf8Stream stream(Utf8Replacement::kPerSubpart);
  for (int i = 0; i < 10'000; ++i) {
    stream.Push("\x80", &out);
    ASSERT_EQ(stream.held_bytes(), 0u);
  }
  EXPECT_EQ(out, Repeat(kBad, 10'000));
}

// Bytes near the edges of every rule, so that short strings meet them all.
TEST(Utf8Test, EveryShortStringAndEverySplitAgreesWithDecoding) {
  const std::string alphabet(
      "a\x7F\x80\x8F\x90\x9F\xA0\xBF\xC1\xC2\xE0\xE2\xED\xEF\xF0\xF1\xF4\xF5");
  for (auto replacement : {Utf8Replacement::kPerSubpart, Utf8Replacement::kPerByte}) {
    for (size_t size = 0; size <= 4; ++size) {
      std::vector<size_t> digits(size, 0);
      for (bool more = true; more;) {
        std::string bytes;
        for (size_t d : digits) bytes += alphabet[d];
        const std::string expected = SlowRepair(bytes, replacement);
        ASSERT_TRUE(IsValidUtf8(expected));
        ASSERT_EQ(IsValidUtf8(bytes), bytes == expected);
        for (size_t cut = 0; cut <= size; ++cut) {
          std::string out;
          Utf8Stream stream(replacement);
          stream.Push(std::string_view(bytes).substr(0, cut), &out);
          ASSERT_TRUE(IsValidUtf8(out));
          stream.Push(std::string_view(bytes).substr(cut), &out);
          ASSERT_LE(stream.held_bytes(), 3u);
          stream.Finish(&out);
          ASSERT_EQ(out, expected) << testing::PrintToString(bytes) << " cut at " << cut;
        }
        more = false;
        for (size_t i = 0; i < size && !more; ++i) {
          more = ++digits[i] < alphabet.size();
          if (!more) digits[i] = 0;
        }
      }
    }
  }
}

}  // namespace
}  // namespace lockstep
