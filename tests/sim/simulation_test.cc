#include "tests/sim/simulation.h"

#include <cstdlib>

#include "gtest/gtest.h"

namespace lockstep::sim {
namespace {

// LOCKSTEP_SIM_SEED=N moves the seeds that are run.
uint64_t FirstSeed() {
  const char* const seed = std::getenv("LOCKSTEP_SIM_SEED");
  return seed == nullptr ? 1 : std::strtoull(seed, nullptr, 10);
}

TEST(SimulationTest, KeepsEveryInvariantWhateverHappens) {
  RunReport sum;
  for (uint64_t seed = FirstSeed(); seed < FirstSeed() + 400; ++seed) {
    const RunReport report = Simulate({.seed = seed});
    ASSERT_EQ(report.violation, "") << "replay: sim --seed " << seed << " --trace";
    sum.Add(report);
  }
  // It met everything that it is there to survive.
  EXPECT_GT(sum.completed, 100u);
  EXPECT_GT(sum.failed, 100u);
  EXPECT_GT(sum.cancelled, 100u);
  EXPECT_GT(sum.rejected, 100u);
  EXPECT_GT(sum.preemptions, 100u);
  EXPECT_GT(sum.deaths, 100u);
  EXPECT_GT(sum.lies, 10u);
  EXPECT_GT(sum.stops, 100u);
  EXPECT_GT(sum.cache_hits, 100u);
  EXPECT_GT(sum.quarantined, 10u);
}

TEST(SimulationTest, FinishesEveryAcceptedRequestAtFourTimesThePool) {
  uint64_t preemptions = 0;
  for (uint64_t seed = FirstSeed(); seed < FirstSeed() + 40; ++seed) {
    const RunReport report = Simulate({.seed = seed, .scenario = Scenario::kOverloaded});
    ASSERT_EQ(report.violation, "") << "replay: sim --overloaded --seed " << seed << " --trace";
    EXPECT_LE(report.most_preemptions, 3);
    EXPECT_EQ(report.completed, report.received);
    preemptions += report.preemptions;
  }
  EXPECT_GT(preemptions, 100u);
}

TEST(SimulationTest, APoisonRequestFailsAlone) {
  uint64_t deaths = 0, failed = 0, completed = 0;
  for (uint64_t seed = FirstSeed(); seed < FirstSeed() + 100; ++seed) {
    const RunReport report = Simulate({.seed = seed, .scenario = Scenario::kPoisoned});
    ASSERT_EQ(report.violation, "") << "replay: sim --poisoned --seed " << seed << " --trace";
    deaths += report.deaths;
    failed += report.failed;
    completed += report.completed;
  }
  EXPECT_LE(deaths, 2 * failed);
  EXPECT_GT(failed, 100u);
  EXPECT_GT(completed, 1'000u);
}

TEST(SimulationTest, TheSameSeedLeavesTheSameTrace) {
  for (uint64_t seed = FirstSeed(); seed < FirstSeed() + 10; ++seed) {
    const RunReport once = Simulate({.seed = seed, .keep_trace = true});
    const RunReport again = Simulate({.seed = seed, .keep_trace = true});
    EXPECT_EQ(once.trace, again.trace);
    EXPECT_NE(once.trace, "");
    EXPECT_NE(once.trace_hash, Simulate({.seed = seed + 1}).trace_hash);
  }
}

}  // namespace
}  // namespace lockstep::sim
