#include "model/byte_size.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

TEST(ByteSizeTest, ReadsBinaryAndDecimalUnits) {
  EXPECT_EQ(*ParseByteSize("80GiB"), int64_t{80} << 30);
  EXPECT_EQ(*ParseByteSize("80GB"), 80'000'000'000);
  EXPECT_EQ(*ParseByteSize("80 gib"), int64_t{80} << 30);
  EXPECT_EQ(*ParseByteSize("512MiB"), 512 << 20);
  EXPECT_EQ(*ParseByteSize("1.5TiB"), int64_t{3} << 39);
  EXPECT_EQ(*ParseByteSize("0.5KiB"), 512);
  EXPECT_EQ(*ParseByteSize("123"), 123);
  EXPECT_EQ(*ParseByteSize("123B"), 123);
  EXPECT_EQ(*ParseByteSize("2kb"), 2000);
}

TEST(ByteSizeTest, RefusesWhatIsNotASize) {
  for (const char* text :
       {"", "GiB", "80G", "80 G", "-1GiB", "0", "0GiB", "1..5GiB", "80GiBs", "1e9", "nan", "inf",
        "0x10", "99999999999TiB", "80GiB 1", "0.1B", "111111111111111111111"}) {
    const absl::StatusOr<int64_t> size = ParseByteSize(text);
    EXPECT_FALSE(size.ok()) << text;
    EXPECT_THAT(std::string(size.status().message()), testing::HasSubstr("80GiB")) << text;
  }
}

TEST(ByteSizeTest, WritesTheLargestUnitThatIsNotBelowOne) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1024), "1.00 KiB");
  EXPECT_EQ(FormatBytes((int64_t{80} << 30) + (int64_t{1} << 29)), "80.50 GiB");
  EXPECT_EQ(FormatBytes(int64_t{1} << 40), "1.00 TiB");
  EXPECT_EQ(FormatBytes(int64_t{1} << 60), "1048576.00 TiB");
}

}  // namespace
}  // namespace lockstep
