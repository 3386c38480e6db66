// What the coordinator says on stderr when a group has formed: per rank its
// share, weight and KV memory, collective library and load phases; and where
// the start-up seconds went. Pure text.
#ifndef LOCKSTEP_COORDINATOR_STARTUP_REPORT_H_
#define LOCKSTEP_COORDINATOR_STARTUP_REPORT_H_

#include <string>
#include <utility>
#include <vector>

#include "coordinator/engine_client.h"

namespace lockstep {

using Phases = std::vector<std::pair<std::string, double>>;  // name, seconds

// One line a rank and phase list; no trailing newline on a line.
std::vector<std::string> DescribeRanks(const EngineInfo& info);

// The coordinator's own phases until now, whose seconds add up to the last
// line's total: what came before the workers, waiting for them to attach, and
// the load of the slowest rank.
//   before: phases up to the point where workers could attach
//   since:  seconds from that point to the group being whole
Phases StartupPhases(const Phases& before, double since, const EngineInfo& info);
std::string DescribePhases(const Phases& phases);  // "read model 0.01 s + load 1.20 s = 1.21 s"

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_STARTUP_REPORT_H_
