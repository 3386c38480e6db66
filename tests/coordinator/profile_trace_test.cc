#include "coordinator/group/profile_trace.h"

#include "coordinator/group/clock_offsets.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace lockstep {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using worker::v1::ProfilePart;

ProfilePart Part(uint64_t id, std::vector<std::pair<uint64_t, uint64_t>> steps, bool last = true) {
  ProfilePart part;
  part.set_id(id);
  part.set_last(last);
  for (const auto& [begin, end] : steps) {
    worker::v1::ProfileStep* step = part.add_steps();
    step->set_step(static_cast<uint64_t>(part.steps_size()));
    step->set_begin_ns(begin);
    step->set_end_ns(end);
    step->mutable_timing()->set_compute_ns(end - begin);
    step->mutable_timing()->set_total_ns(end - begin);
  }
  return part;
}

void AddKernel(ProfilePart* part, uint64_t begin_ns, uint32_t stream) {
  part->add_names("Gemv\"Kernel");
  worker::v1::ProfileEvent* event = part->add_events();
  event->set_name(static_cast<uint32_t>(part->names_size()) - 1);
  event->set_begin_ns(begin_ns);
  event->set_duration_ns(500);
  event->set_stream(stream);
  event->set_blocks(132);
  event->set_threads(256);
}

double TimeOf(const json& trace, int pid, const std::string& name) {
  for (const json& event : trace.at("traceEvents")) {
    if (event.at("pid") == pid && event.at("name") == name) return event.at("ts");
  }
  return -1;
}

TEST(ProfileTraceTest, PutsRanksOnTheCoordinatorsClock) {
  ProfileTrace trace(7, 2, {{"rank 0", 0}, {"rank 1", -1'000'000}});
  ASSERT_TRUE(trace.Add(0, Part(7, {{10'000, 20'000}, {20'000, 30'000}})).ok());
  EXPECT_FALSE(trace.complete());
  ProfilePart late = Part(7, {{1'011'000, 1'021'000}, {1'021'000, 1'031'000}});
  AddKernel(&late, 1'011'500, 13);
  ASSERT_TRUE(trace.Add(1, late).ok());
  ASSERT_TRUE(trace.complete());
  EXPECT_EQ(trace.num_steps(), 2u);
  const json parsed = json::parse(trace.Json());
  EXPECT_DOUBLE_EQ(TimeOf(parsed, 0, "step 1"), 0.0);
  EXPECT_DOUBLE_EQ(TimeOf(parsed, 0, "step 2"), 10.0);
  EXPECT_DOUBLE_EQ(TimeOf(parsed, 1, "step 1"), 1.0);
  EXPECT_DOUBLE_EQ(TimeOf(parsed, 1, "Gemv\"Kernel"), 1.5);
}

TEST(ProfileTraceTest, PassesOverPartsOfOtherProfilesAndAfterTheLast) {
  ProfileTrace trace(7, 2, {{"rank 0", 0}});
  ASSERT_TRUE(trace.Add(0, Part(6, {{1, 2}})).ok());
  EXPECT_FALSE(trace.complete());
  ASSERT_TRUE(trace.Add(0, Part(7, {{1, 2}}, /*last=*/false)).ok());
  EXPECT_FALSE(trace.complete());
  ASSERT_TRUE(trace.Add(0, Part(7, {})).ok());
  EXPECT_TRUE(trace.complete());
  ASSERT_TRUE(trace.Add(0, Part(7, {{5, 4}})).ok());
  EXPECT_EQ(trace.num_steps(), 1u);
}

TEST(ProfileTraceTest, RefusesWhatARankCannotHaveMeasured) {
  const auto refused = [](const ProfilePart& part) {
    ProfileTrace trace(7, 2, {{"rank 0", 0}});
    return std::string(trace.Add(0, part).message());
  };
  EXPECT_THAT(refused(Part(7, {{1, 2}, {2, 3}, {3, 4}})), HasSubstr("rank 0"));
  EXPECT_THAT(refused(Part(7, {{5, 9}, {8, 12}})), HasSubstr("out of order"));
  EXPECT_THAT(refused(Part(7, {{9, 5}})), HasSubstr("out of order"));
  EXPECT_THAT(refused(Part(7, {{5, UINT64_MAX}})), HasSubstr("out of order"));
  ProfilePart nameless = Part(7, {});
  AddKernel(&nameless, 5, 1);
  nameless.mutable_events(0)->set_name(1);
  EXPECT_THAT(refused(nameless), HasSubstr("event"));
  ProfilePart stream = Part(7, {});
  AddKernel(&stream, 5, UINT32_MAX);
  EXPECT_THAT(refused(stream), HasSubstr("event"));
}

TEST(ClockOffsetsTest, TakesTheQuickestMessageAndForgetsOldOnes) {
  ClockOffsets clocks;
  EXPECT_EQ(clocks.OffsetNs(1), 0);
  clocks.Heard(1, 5'000'000'000, 1'000'300'000);
  clocks.Heard(1, 5'250'000'000, 1'250'050'000);
  EXPECT_EQ(clocks.OffsetNs(1), -3'999'950'000);
  for (int i = 0; i < 64; ++i) clocks.Heard(1, 6'000'000'000, 2'000'100'000);
  EXPECT_EQ(clocks.OffsetNs(1), -3'999'900'000);
  clocks.Forget(1);
  EXPECT_EQ(clocks.OffsetNs(1), 0);
}

TEST(ClockOffsetsTest, ProcessesOfOneHostShareAClock) {
  ClockOffsets clocks;
  clocks.Heard(2, 1'000'000'000, 1'000'150'000);
  EXPECT_EQ(clocks.OffsetNs(2), 0);
}

}  // namespace
}  // namespace lockstep
