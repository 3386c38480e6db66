// The ranks' address exchange over the Attach stream: what this rank publishes
// goes to the coordinator as a CommKey, which relays it to the other ranks.
#ifndef LOCKSTEP_WORKER_STREAM_EXCHANGE_H_
#define LOCKSTEP_WORKER_STREAM_EXCHANGE_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>

#include "proto/worker.pb.h"
#include "worker/comm/rank_communicator.h"

namespace lockstep {

class StreamExchange final : public AddressExchange {
 public:
  using Send = std::function<void(const worker::v1::WorkerMessage&)>;

  StreamExchange(uint64_t epoch, Send send) : epoch_(epoch), send_(std::move(send)) {}

  absl::Status Publish(const std::string& key, const std::string& value) override;
  absl::StatusOr<std::string> Await(const std::string& key) override;
  void Cancel() override;

  // A relayed key. Refuses (false) what is above the protocol's bounds.
  bool Deliver(const worker::v1::CommKey& key);

 private:
  const uint64_t epoch_;
  const Send send_;
  std::mutex mutex_;  // guards the fields below
  std::condition_variable changed_;
  std::map<std::string, std::string> values_;
  bool cancelled_ = false;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_STREAM_EXCHANGE_H_
