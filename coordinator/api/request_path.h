// The one path that every generation request takes, whatever its door:
//
//   Admit -> (an intake thread) Build each -> Submit each -> Answer
//
// and the place where refusals are counted. Thread-safe.
#ifndef LOCKSTEP_COORDINATOR_API_REQUEST_PATH_H_
#define LOCKSTEP_COORDINATOR_API_REQUEST_PATH_H_

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/api/answer.h"
#include "coordinator/api/client_request.h"
#include "coordinator/api/metrics.h"
#include "coordinator/api/served_model.h"
#include "coordinator/api/work_pool.h"
#include "coordinator/engine_client.h"

namespace lockstep {

class RequestPath {
 public:
  using Phases = std::vector<std::pair<std::string, double>>;

  // `engine`, `model` and `metrics` outlive the path.
  RequestPath(EngineClient* engine, const ServedModel* model, Metrics* metrics, int text_threads);

  // Unavailable while loading, draining or failed.
  absl::Status Admit();
  // Runs `work` on an intake thread, where parsing and tokenising belong;
  // ResourceExhausted when too much waits for one already.
  absl::Status RunLater(std::function<void()> work);
  // A place for a message of `bytes` that waits to be read; given back with the
  // last copy. ResourceExhausted when large ones fill theirs already.
  absl::StatusOr<std::shared_ptr<void>> HoldMessage(size_t bytes);
  // Likewise for the log-probabilities of prompts that the answer to these is to list, once or
  // with each choice, until it has been made. InvalidArgument: more than any answer may list.
  enum class Listed { kOnce, kWithEachChoice };
  absl::StatusOr<std::shared_ptr<void>> HoldLogprobs(absl::Span<const Request> requests,
                                                     Listed listed);
  // InvalidArgument for a batch of more prompts than an idle group could admit:
  // those that start and those that wait. A later attempt would end alike.
  absl::Status CheckBatch(size_t prompts);
  absl::StatusOr<Request> Build(const ClientRequest& client, const DoorDefaults& defaults);
  absl::StatusOr<std::shared_ptr<Answer>> Submit(Request request);
  // Counts a refusal that a door made by itself, and returns it.
  absl::Status Refuse(absl::Status status);

  // Not ready any more, for whoever sends requests here; what comes is admitted.
  void BeginLeaving() { leaving_ = true; }
  void BeginDrain() { leaving_ = draining_ = true; }
  // Whether new requests should be sent here.
  bool IsReady() const { return !leaving_ && Info().state == EngineState::kReady; }
  // The engine's state, with our own draining in it.
  EngineInfo Info() const;
  // Waits for queued work; the doors are shut by now.
  void Stop();

  EngineClient& engine() const { return *engine_; }
  const ServedModel& model() const { return *model_; }
  Metrics& metrics() const { return *metrics_; }
  void SetStartup(Phases phases);
  Phases startup() const;

 private:
  EngineClient* const engine_;
  const ServedModel* const model_;
  Metrics* const metrics_;
  const std::shared_ptr<WorkPool> text_pool_;
  WorkPool intake_pool_;
  std::atomic<bool> leaving_ = false, draining_ = false;
  using Count = std::atomic<uint64_t>;
  const std::shared_ptr<Count> held_bytes_ = std::make_shared<Count>(0);
  const std::shared_ptr<Count> held_logprobs_ = std::make_shared<Count>(0);
  mutable std::mutex mutex_;
  Phases startup_;  // guarded by mutex_
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_REQUEST_PATH_H_
