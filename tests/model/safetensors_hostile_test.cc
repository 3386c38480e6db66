// Headers that lie, files cut anywhere, bits flipped: every one of them is one
// line of error or a correct view, never a crash. Run under ASan and UBSan.
#include <algorithm>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/safetensors.h"
#include "model/safetensors_header.h"
#include "tests/fakes/temp_dir.h"
#include "tests/model/model_testing.h"

namespace lockstep {
namespace {

using testing::HasSubstr;

std::string Tensor(const std::string& fields) { return "{\"t\":{" + fields + "}}"; }

struct Lie {
  const char* name;
  std::string header;
  size_t data_bytes;
  const char* says;
};

void PrintTo(const Lie& lie, std::ostream* out) { *out << lie.name; }

const char kF32[] = "\"dtype\":\"F32\",";
const char kTwo[] = "\"dtype\":\"F32\",\"shape\":[2],";

std::vector<Lie> Lies() {
  const std::string bomb(200'000, '[');
  const std::string objects = [] {
    std::string text;
    for (int i = 0; i < 50'000; ++i) text += "{\"a\":";
    return text;
  }();
  std::string metadata;
  for (int i = 0; i < 4'097; ++i) absl::StrAppend(&metadata, i == 0 ? "" : ",", "\"", i, "\":\"\"");
  return {
      {"empty", "", 0, "begin with {"},
      {"list", "[]", 0, "begin with {"},
      {"space_first", " {}", 0, "begin with {"},
      {"unfinished", "{", 0, "not JSON"},
      {"trailing", "{}x", 0, "not JSON"},
      {"two_documents", "{}{}", 0, "not JSON"},
      {"nul_byte", std::string("{\0}", 3), 0, "not JSON"},
      {"nul_padding", std::string("{}\0\0", 4), 0, "not JSON"},
      {"bad_utf8", "{\"\xff\":1}", 0, "not JSON"},
      {"nan", Tensor(std::string(kF32) + "\"shape\":[NaN],\"data_offsets\":[0,4]"), 4, "not JSON"},
      {"list_bomb", "{\"t\":" + bomb, 0, "out of place"},
      {"object_bomb", objects, 0, ""},
      {"shape_bomb", Tensor(std::string(kF32) + "\"shape\":" + bomb), 0, "out of place"},
      {"tensor_is_number", "{\"t\":1}", 0, "out of place"},
      {"tensor_is_null", "{\"t\":null}", 0, "out of place"},
      {"empty_tensor", "{\"t\":{}}", 0, "dtype is missing"},
      {"no_dtype", Tensor("\"shape\":[2],\"data_offsets\":[0,8]"), 8, "dtype is missing"},
      {"no_shape", Tensor(std::string(kF32) + "\"data_offsets\":[0,8]"), 8, "shape is missing"},
      {"no_offsets", Tensor(std::string(kF32) + "\"shape\":[2]"), 8, "data_offsets is missing"},
      {"unknown_dtype", Tensor("\"dtype\":\"F31\",\"shape\":[2],\"data_offsets\":[0,8]"), 8, "F31"},
      {"dtype_number", Tensor("\"dtype\":32,\"shape\":[2],\"data_offsets\":[0,8]"), 8,
       "out of place"},
      {"unknown_field", Tensor(std::string(kTwo) + "\"data_offsets\":[0,8],\"x\":1"), 8, "x is"},
      {"field_twice", Tensor(std::string(kTwo) + "\"shape\":[2],\"data_offsets\":[0,8]"), 8,
       "twice"},
      {"offsets_twice", Tensor(std::string(kTwo) + "\"data_offsets\":[0,8],\"data_offsets\":[0,8]"),
       8, "twice"},
      {"tensor_twice",
       "{\"t\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
       "\"t\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}",
       2, "twice"},
      {"metadata_twice", "{\"__metadata__\":{},\"__metadata__\":{}}", 0, "twice"},
      {"metadata_key_twice", "{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}}", 0, "twice"},
      {"metadata_of_many_keys", "{\"__metadata__\":{" + metadata + "}}", 0, "more than 4096 keys"},
      {"metadata_number", "{\"__metadata__\":{\"a\":1}}", 0, "out of place"},
      {"metadata_list", "{\"__metadata__\":[]}", 0, "out of place"},
      {"metadata_nested", "{\"__metadata__\":{\"a\":{}}}", 0, "out of place"},
      {"empty_name", "{\"\":{" + std::string(kTwo) + "\"data_offsets\":[0,8]}}", 8, "name"},
      {"escaped_nul_name", "{\"a\\u0000b\":{" + std::string(kTwo) + "\"data_offsets\":[0,8]}}", 8,
       "name"},
      {"newline_name", "{\"a\\nb\":{" + std::string(kTwo) + "\"data_offsets\":[0,8]}}", 8, "name"},
      {"long_name", "{\"" + std::string(5000, 'n') + "\":{}}", 0, "name"},
      {"negative_offset", Tensor(std::string(kTwo) + "\"data_offsets\":[-8,0]"), 8,
       "negative number"},
      {"negative_dimension", Tensor(std::string(kF32) + "\"shape\":[-2],\"data_offsets\":[0,8]"), 8,
       "negative number"},
      {"float_offset", Tensor(std::string(kTwo) + "\"data_offsets\":[0,8.0]"), 8, "not whole"},
      {"float_dimension", Tensor(std::string(kF32) + "\"shape\":[2.0],\"data_offsets\":[0,8]"), 8,
       "not whole"},
      {"exponent", Tensor(std::string(kTwo) + "\"data_offsets\":[0,8e0]"), 8, "not whole"},
      {"string_offset", Tensor(std::string(kTwo) + "\"data_offsets\":[0,\"8\"]"), 8,
       "out of place"},
      {"one_offset", Tensor(std::string(kTwo) + "\"data_offsets\":[8]"), 8, "fewer than two"},
      {"no_offset_numbers", Tensor(std::string(kTwo) + "\"data_offsets\":[]"), 8, "fewer than two"},
      {"three_offsets", Tensor(std::string(kTwo) + "\"data_offsets\":[0,8,8]"), 8, "more than two"},
      {"end_before_begin", Tensor(std::string(kTwo) + "\"data_offsets\":[8,0]"), 8,
       "before it begins"},
      {"beyond_file", Tensor(std::string(kTwo) + "\"data_offsets\":[8,16]"), 8, "cut short"},
      {"far_beyond_file",
       Tensor(std::string(kTwo) + "\"data_offsets\":[18446744073709551600,18446744073709551608]"),
       8, "cut short"},
      {"beyond_64_bits", Tensor(std::string(kTwo) + "\"data_offsets\":[0,99999999999999999999]"), 8,
       "not whole"},
      {"range_too_long", Tensor(std::string(kTwo) + "\"data_offsets\":[0,12]"), 12, "need 8"},
      {"range_too_short", Tensor(std::string(kTwo) + "\"data_offsets\":[0,4]"), 4, "need 8"},
      {"product_overflows",
       Tensor(std::string(kF32) +
              "\"shape\":[4294967296,4294967296,4294967296],\"data_offsets\":[0,0]"),
       0, "overflows"},
      // 2^62 elements of 4 bytes wrap to zero bytes in 64 bits.
      {"bytes_wrap_to_zero",
       Tensor(std::string(kF32) + "\"shape\":[4611686018427387904],\"data_offsets\":[0,0]"), 0,
       "overflows"},
      {"dimension_beyond_63_bits",
       Tensor(std::string(kF32) + "\"shape\":[9223372036854775808],\"data_offsets\":[0,0]"), 0,
       "63 bits"},
      {"many_dimensions",
       Tensor(std::string(kF32) + "\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]"), 4,
       "dimensions"},
      {"half_a_byte", Tensor("\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,1]"), 1, "need"},
      {"hole_at_start", Tensor(std::string(kTwo) + "\"data_offsets\":[4,12]"), 12, "hole"},
      {"hole_at_end", Tensor(std::string(kTwo) + "\"data_offsets\":[0,8]"), 12, "12"},
      {"no_tensor_for_data", "{}", 4, "end at byte 0"},
      {"overlap",
       "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
       "\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[2,6]}}",
       6, "overlap"},
      {"same_range",
       "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
       "\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}",
       4, "overlap"},
      {"hole_between",
       "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
       "\"b\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[5,9]}}",
       9, "hole"},
  };
}

class LyingHeaderTest : public testing::TestWithParam<Lie> {};

TEST_P(LyingHeaderTest, IsRefusedInOneLine) {
  const Lie& lie = GetParam();
  const auto entries = ParseSafetensorsHeader(lie.header, 8 + lie.header.size() + lie.data_bytes,
                                              "model.safetensors");
  ASSERT_FALSE(entries.ok());
  const std::string message = Message(entries.status());
  EXPECT_THAT(message, testing::StartsWith("model.safetensors: "));
  EXPECT_THAT(message, HasSubstr(lie.says));
  EXPECT_LT(message.size(), 400u);
  EXPECT_TRUE(std::all_of(message.begin(), message.end(),
                          [](unsigned char c) { return c >= 0x20 && c < 0x7f; }));
}

INSTANTIATE_TEST_SUITE_P(All, LyingHeaderTest, testing::ValuesIn(Lies()),
                         [](const testing::TestParamInfo<Lie>& test) {
                           return std::string(test.param.name);
                         });

TEST(SafetensorsLengthTest, IsCheckedBeforeAnythingIsReadByIt) {
  const auto length = [](uint64_t value, uint64_t file_bytes) {
    std::string bytes;
    for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>(value >> (8 * i)));
    return ParseSafetensorsLength(bytes, file_bytes, "f");
  };
  EXPECT_EQ(*length(0, 8), 0u);
  EXPECT_EQ(*length(2, 10), 2u);
  EXPECT_FALSE(length(3, 10).ok());
  EXPECT_FALSE(length(~uint64_t{0}, 10).ok());
  EXPECT_FALSE(length(~uint64_t{0} - 7, ~uint64_t{0}).ok());
  EXPECT_TRUE(length(kMaxSafetensorsHeaderBytes, kMaxSafetensorsHeaderBytes + 8).ok());
  EXPECT_FALSE(length(kMaxSafetensorsHeaderBytes + 1, kMaxSafetensorsHeaderBytes + 9).ok());
  EXPECT_FALSE(ParseSafetensorsLength("1234567", 7, "f").ok());
}

std::string GoodFile() {
  SafetensorsWriter writer;
  writer.Add("model.embed_tokens.weight", "F32", {3, 4}, std::string(48, 'e'));
  writer.Add("model.norm.weight", "BF16", {4}, std::string(8, 'n'));
  writer.Add("buffer", "I64", {1}, std::string(8, 'b'));
  return writer.Bytes();
}

// Opens a file of these bytes; whatever the answer, all it promises is read.
absl::Status OpenAndTouch(const TempDir& dir, const std::string& bytes) {
  WriteFileOrDie(dir.File("model.safetensors"), bytes);
  const absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = Checkpoint::Open(dir.path());
  if (!checkpoint.ok()) return checkpoint.status();
  unsigned sum = 0;
  for (const auto& [name, info] : (*checkpoint)->tensors()) {
    for (const std::byte byte : (*checkpoint)->Bytes(info)) sum += static_cast<unsigned>(byte);
  }
  EXPECT_GE(sum, 0u);
  return absl::OkStatus();
}

TEST(HostileFileTest, CutAtAnyByteIsRefused) {
  const TempDir dir;
  const std::string good = GoodFile();
  ASSERT_TRUE(OpenAndTouch(dir, good).ok());
  for (size_t length = 0; length < good.size(); ++length) {
    const absl::Status status = OpenAndTouch(dir, good.substr(0, length));
    ASSERT_FALSE(status.ok()) << "cut at " << length;
    ASSERT_THAT(Message(status), HasSubstr("model.safetensors"));
  }
  EXPECT_FALSE(OpenAndTouch(dir, good + "x").ok());
}

std::string Flipped(std::string bytes, std::mt19937* random) {
  const int flips = 1 + static_cast<int>((*random)() % 4);
  for (int i = 0; i < flips; ++i) {
    bytes[(*random)() % bytes.size()] ^= static_cast<char>(1u << ((*random)() % 8));
  }
  return bytes;
}

TEST(HostileFileTest, FlippedBitsOfAFileNeverCrash) {
  const TempDir dir;
  std::mt19937 random(7);
  int refused = 0;
  for (int i = 0; i < 1000; ++i) {
    refused += OpenAndTouch(dir, Flipped(GoodFile(), &random)).ok() ? 0 : 1;
  }
  EXPECT_GT(refused, 300);
  EXPECT_LT(refused, 1000);  // a flip in the data alone is a good file
}

// A header either is refused or describes ranges within its file.
bool HeaderHolds(const std::string& header, uint64_t data_bytes) {
  const uint64_t file_bytes = 8 + header.size() + data_bytes;
  const auto entries = ParseSafetensorsHeader(header, file_bytes, "f");
  if (!entries.ok()) return false;
  for (const auto& [name, info] : *entries) {
    EXPECT_GE(info.offset, 8 + header.size());
    EXPECT_LE(info.offset, file_bytes);
    EXPECT_LE(info.num_bytes, file_bytes - info.offset);
  }
  return true;
}

TEST(HostileFileTest, FlippedBitsOfAHeaderNeverCrash) {
  SafetensorsWriter writer;
  writer.Add("model.embed_tokens.weight", "F32", {3, 4}, std::string(48, 'e'));
  writer.Add("model.norm.weight", "BF16", {4}, std::string(8, 'n'));
  const std::string header = writer.Header();
  std::mt19937 random(8);
  int refused = 0;
  for (int i = 0; i < 20'000; ++i) refused += HeaderHolds(Flipped(header, &random), 56) ? 0 : 1;
  EXPECT_GT(refused, 10'000);
}

TEST(HostileFileTest, ReplacedPiecesNeverCrash) {
  const std::string header = [] {
    SafetensorsWriter writer;
    writer.Add("a", "F32", {3, 4}, std::string(48, 'e'));
    writer.Add("b", "F16", {4}, std::string(8, 'n'));
    return writer.Header();
  }();
  const std::vector<std::string> pieces = {"{",
                                           "}",
                                           "[",
                                           "]",
                                           ",",
                                           ":",
                                           "\"",
                                           "0",
                                           "-1",
                                           "1e9",
                                           "18446744073709551615",
                                           "null",
                                           "true",
                                           "\"dtype\"",
                                           "\"shape\"",
                                           "\"data_offsets\"",
                                           "\"F32\"",
                                           "__metadata__",
                                           "\\u0000",
                                           "\xff"};
  std::mt19937 random(11);
  int refused = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::string bytes = header;
    const size_t at = random() % bytes.size();
    bytes.replace(at, random() % 12, pieces[random() % pieces.size()]);
    refused += HeaderHolds(bytes, 56) ? 0 : 1;
  }
  EXPECT_GT(refused, 10'000);
}

TEST(HostileFileTest, MoreTensorsThanAnyModelHasAreRefused) {
  std::string header = "{";
  for (int i = 0; i <= 1 << 18; ++i) {
    absl::StrAppend(&header, i == 0 ? "" : ",", "\"", i,
                    "\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}");
  }
  header += "}";
  EXPECT_THAT(Message(ParseSafetensorsHeader(header, 8 + header.size(), "f").status()),
              HasSubstr("more than 262144 tensors"));
}

// Headers of tensors that truly tile the data, in any order, are accepted.
TEST(HostileFileTest, AnyOrderOfAGoodTilingIsAccepted) {
  std::mt19937 random(3);
  for (int i = 0; i < 200; ++i) {
    std::vector<std::string> entries;
    uint64_t end = 0;
    const int count = 1 + static_cast<int>(random() % 20);
    for (int t = 0; t < count; ++t) {
      const uint64_t size = random() % 5;  // zero too
      entries.push_back(absl::StrCat("\"t", t, "\":{\"data_offsets\":[", end, ",", end + size,
                                     "],\"shape\":[", size, "],\"dtype\":\"U8\"}"));
      end += size;
    }
    std::shuffle(entries.begin(), entries.end(), random);
    const std::string header = absl::StrCat("{", absl::StrJoin(entries, ","), "}  ");
    const auto parsed = ParseSafetensorsHeader(header, 8 + header.size() + end, "f");
    ASSERT_TRUE(parsed.ok()) << parsed.status() << header;
    EXPECT_EQ(parsed->size(), static_cast<size_t>(count));
  }
}

}  // namespace
}  // namespace lockstep
