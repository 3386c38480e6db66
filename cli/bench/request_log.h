// What a load generator noted of one request, and the figures made of it.
// Times are nanoseconds of the steady clock (NowNs); durations are seconds.
// Plain data: whoever holds it may read it from any thread.
#ifndef LOCKSTEP_CLI_BENCH_REQUEST_LOG_H_
#define LOCKSTEP_CLI_BENCH_REQUEST_LOG_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"

namespace lockstep {

int64_t NowNs();

// One message of a stream that brought tokens; a client that lags gets several
// tokens in one.
struct TokenArrival {
  int64_t ns = 0;
  uint32_t tokens = 0;
};

struct RequestLog {
  int64_t due_ns = 0;  // when it should have been sent: latencies count from here
  int64_t sent_ns = 0;
  int64_t end_ns = 0;
  uint32_t prompt_tokens = 0;
  uint32_t cached_tokens = 0;
  uint32_t output_tokens = 0;
  uint32_t asked_tokens = 0;  // that the answer was to have exactly; 0: any number
  std::vector<TokenArrival> arrivals;
  absl::Status status;

  // `status`, or DataLoss for an answer that came without an error but is not
  // the one that was asked for.
  absl::Status Outcome() const;
  bool ok() const { return Outcome().ok(); }
  // The following hold for ok() requests.
  double first_token_s() const;  // TTFT: due until the first token, queueing included
  double latency_s() const;      // due until the last token
  // TPOT: (latency - TTFT) / (tokens after the first message). Nothing when all
  // tokens came in one message.
  std::optional<double> per_token_s() const;
};

// The stretch in which every one of the requests was decoding: from the last
// first token to the earliest last token. Empty (end <= begin) when there was none.
struct TimeWindow {
  int64_t begin_ns = 0, end_ns = 0;
  double seconds() const { return static_cast<double>(end_ns - begin_ns) * 1e-9; }
};
TimeWindow AllRunning(const std::vector<RequestLog>& logs);

// A request's time per token within the window; nothing below two arrivals there.
std::optional<double> PerTokenWithin(const RequestLog& log, const TimeWindow& window);

// Seconds between successive messages within the window, of all requests.
std::vector<double> GapsWithin(const std::vector<RequestLog>& logs, const TimeWindow& window);

// The first outcome that is not ok.
absl::Status FirstFailure(const std::vector<RequestLog>& logs);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_BENCH_REQUEST_LOG_H_
