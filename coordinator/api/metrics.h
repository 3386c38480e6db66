// What the doors and the engine report, as Prometheus text: the vllm: names
// that routers, autoscalers and dashboards read, and the lockstep_ family.
//
// Requests are counted by the text stage, as the client sees them, so that
// counters equal what was sent. Gauges and the scheduler's own totals are read
// when somebody scrapes. Thread-safe; the EngineObserver half is called from
// the engine thread.
#ifndef LOCKSTEP_COORDINATOR_API_METRICS_H_
#define LOCKSTEP_COORDINATOR_API_METRICS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/engine.h"
#include "coordinator/engine_client.h"
#include "coordinator/group_watch.h"

namespace lockstep {

struct MetricsLabels {
  std::string model_name;
  uint32_t block_size = 16;
  bool enable_prefix_caching = true;
};

enum class RequestOutcome { kStop, kLength, kAbort, kError };

class Metrics : public EngineObserver {
 public:
  explicit Metrics(const MetricsLabels& labels);
  ~Metrics() override;

  void OnStep(const StepPlan& plan, const GroupStep& step, double plan_seconds,
              double step_seconds) override;
  void OnRejected(const absl::Status& status) override;

  // From the text stage, in this order for a request; seconds since arrival,
  // start or the token before.
  void RequestStarted(uint32_t prompt_tokens, double queue_seconds);
  void FirstToken(double since_arrival, double since_start);
  void NextToken(double since_last);
  void TokensDelivered(uint32_t count);
  void SequenceFinished(RequestOutcome outcome, uint32_t tokens, double decode_seconds);
  void RequestFinished(double since_arrival, double since_first_token);

  // A refusal by a door or at the inbox.
  void Rejected(const absl::Status& status);
  void HttpResponse(int code);
  void SetStartup(const std::vector<std::pair<std::string, double>>& phases);

  // From here on the exposition has the devices' figures; before the first
  // scrape. `watch` outlives the last one.
  void WatchDevices(GroupWatch* watch);
  // The exposition, with the engine's numbers of now.
  std::string Expose(const EngineInfo& info, const SchedulerStats& stats);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_METRICS_H_
