// Runs the production scheduler through a seeded, single-threaded imitation of
// everything around it: clients that come, leave and set deadlines, a text stage
// that finds stop strings, a group of workers that answers late, lies and dies,
// the engine's loop between them. After every event the books
// (Scheduler::CheckIntegrity) and the promises (Ledger) are checked.
//
//   RunReport report = Simulate({.seed = 7});
//   report.violation   empty, or the first thing that was wrong
//   report.trace       every event, a line each; same seed, same bytes
#ifndef LOCKSTEP_TESTS_SIM_SIMULATION_H_
#define LOCKSTEP_TESTS_SIM_SIMULATION_H_

#include <cstdint>
#include <string>

namespace lockstep::sim {

enum class Scenario {
  kMixed,       // every kind of event, in random proportions
  kOverloaded,  // KV demand four times the pool, nobody leaves: all must finish
  kPoisoned,    // the group dies of some requests and of nothing else: only they may fail
};

struct RunOptions {
  uint64_t seed = 1;
  Scenario scenario = Scenario::kMixed;
  bool keep_trace = false;  // otherwise only its hash
};

// The flag that chooses it, of the program `sim`; "" for kMixed.
const char* FlagOf(Scenario scenario);

// What a run went through: a simulation that never preempts proves nothing.
struct RunReport {
  std::string violation;
  std::string trace;
  uint64_t trace_hash = 0;
  uint64_t events = 0, steps = 0;
  uint64_t received = 0, completed = 0, failed = 0, cancelled = 0, rejected = 0;
  uint64_t preemptions = 0, deaths = 0, lies = 0, stops = 0, cache_hits = 0, quarantined = 0;
  int most_preemptions = 0;  // of one sequence

  // Counts the other run in; violation, trace and hash stay.
  void Add(const RunReport& other);
};

RunReport Simulate(const RunOptions& options);

}  // namespace lockstep::sim

#endif  // LOCKSTEP_TESTS_SIM_SIMULATION_H_
