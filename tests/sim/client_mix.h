// Draws what varies from run to run: the size of the group, and the requests.
#ifndef LOCKSTEP_TESTS_SIM_CLIENT_MIX_H_
#define LOCKSTEP_TESTS_SIM_CLIENT_MIX_H_

#include <cstdint>
#include <vector>

#include "coordinator/scheduler.h"
#include "tests/sim/ledger.h"
#include "tests/sim/sim_random.h"
#include "tests/sim/sim_worker.h"
#include "tests/sim/simulation.h"

namespace lockstep::sim {

SchedulerConfig DrawConfig(Scenario scenario, Random* random);

// How likely each kind of event is in one run, in percent or as a weight.
struct Weather {
  uint32_t arrivals = 0, cancels = 0, deaths = 0, lies = 0;
  uint32_t schedules = 0, answers = 0;
  uint32_t deadlines = 0, poison = 0, killers = 0, stops = 0;
  uint32_t num_requests = 0;
};
Weather DrawWeather(Scenario scenario, Random* random);

class ClientMix {
 public:
  ClientMix(const SchedulerConfig& config, Scenario scenario, const Weather& weather,
            Random* random);

  // A request that may or may not fit; `poison` learns where it meets NaN.
  Ledger::Entry Draw(int64_t now_ms, PoisonSet* poison);

 private:
  std::vector<TokenId> DrawPrompt(uint32_t longest);

  const SchedulerConfig config_;
  const Scenario scenario_;
  const Weather weather_;
  Random* const random_;
  std::vector<std::vector<TokenId>> openings_;  // prompts begin alike
  uint64_t next_id_ = 1;
};

}  // namespace lockstep::sim

#endif  // LOCKSTEP_TESTS_SIM_CLIENT_MIX_H_
