// One measuring command at work: its target, its load client, and rounds of
// requests of equal lengths. Single-threaded; Ctrl-C ends a round with Cancelled.
#ifndef LOCKSTEP_CLI_BENCH_BENCH_SESSION_H_
#define LOCKSTEP_CLI_BENCH_BENCH_SESSION_H_

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/bench/bench_target.h"
#include "cli/bench/load_client.h"
#include "cli/bench/prompts.h"
#include "cli/terminal.h"

namespace lockstep {

// Requests that were sent together and have all been answered.
struct Round {
  std::vector<RequestLog> logs;
  double wall_s = 0;
  double client_cpu_s = 0;  // what this process spent
  uint64_t output_tokens = 0;
  uint64_t cached_tokens = 0;  // prompt tokens that a cache spared the server

  double last_first_token_s() const;  // until every request had its first token
  // Output tokens over the time from the first request to the last token.
  double tokens_per_s() const;
};

// The client's own cost, which must stay small beside the step it measures.
struct ClientCost {
  double cores = 0;         // busy on average
  double us_per_token = 0;  // processor time
};
ClientCost CostOf(const std::vector<Round>& rounds);

class BenchSession {
 public:
  static absl::StatusOr<std::unique_ptr<BenchSession>> Open(const BenchFlags& flags,
                                                            const ServerNeeds& needs);

  ~BenchSession();  // keeps the server's log where --server-log says

  // All at once; an error when any of them failed.
  absl::StatusOr<Round> Run(int64_t count, const Lengths& lengths);
  // A round that does not count, then flags.runs that do. Says on stderr what it does.
  absl::StatusOr<std::vector<Round>> Measure(const std::string& name, int64_t count,
                                             const Lengths& lengths);

  // On stderr: the end of what a server of our own has said; of another, nothing.
  void PrintLogTail() const;

  const BenchTarget& target() const { return target_; }
  LoadClient* client() { return client_.get(); }
  std::mt19937_64* random() { return &random_; }

 private:
  BenchSession(const BenchFlags& flags, BenchTarget target);

  const BenchFlags flags_;
  BenchTarget target_;
  std::mt19937_64 random_;
  std::unique_ptr<LoadClient> client_;
  std::unique_ptr<InterruptGuard> interrupt_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_BENCH_BENCH_SESSION_H_
