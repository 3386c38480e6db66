// Keeps one host's daemons alive: a coordinator and its workers as children for
// `lockstep serve`, workers alone for `lockstep worker-group`. A worker that dies is
// started again, at once the first time and with growing pauses when it keeps dying
// young; a crash loop ends the whole and is named. A coordinator that is killed is
// started again too (its workers fence and re-attach); one that exits by itself ends
// the whole. Where the coordinator is elsewhere, a worker that it told to end ends the
// whole: started again it would join the next coordinator, to be lost to it soon after.
//
// A young death, soon after the start or before the group was whole, counts
// towards a crash loop unless somebody killed a child that had become ready
// (SIGKILL or SIGTERM), and a step that is served forgives all before it: random
// kills are no crash loop. The coordinator tells of both (common/supervisor_link.h);
// where it is elsewhere, nobody does, and only a life's length counts.
#ifndef LOCKSTEP_CLI_SUPERVISOR_H_
#define LOCKSTEP_CLI_SUPERVISOR_H_

#include <cstdint>
#include <string>
#include <vector>

namespace lockstep {

struct SupervisorOptions {
  std::string command = "serve";                  // what its own lines begin with
  std::vector<std::string> coordinator;           // argv; empty: it is elsewhere
  std::vector<std::vector<std::string>> workers;  // argv of each
  bool log_json = false;                          // its own lines on stderr, as --log-format has it
  int64_t young_ms = 2'000;                       // a life shorter than this is a young death
  int crash_loop_deaths = 6;                      // young deaths with no step served between
  int64_t max_pause_ms = 5'000;                   // between restarts
  int64_t kill_after_ms = 2'000;                  // SIGTERM to SIGKILL for workers at the end
  int64_t kill_stopped_after_ms = 2'500;          // a worker that a signal stopped is replaced
};

// Returns when every child is gone, with the exit code of the whole. SIGTERM
// and SIGINT ask the coordinator to drain, or the workers to end where there is none;
// a second one ends everything at once.
int RunSupervisor(const SupervisorOptions& options);

// Says, in the format of the log, which variables of the environment nobody reads.
void SayUnknownVariables(const std::string& command, bool log_json);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_SUPERVISOR_H_
