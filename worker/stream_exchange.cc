#include "worker/stream_exchange.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "wire/protocol.h"

namespace lockstep {

absl::Status StreamExchange::Publish(const std::string& key, const std::string& value) {
  if (key.size() > wire::kMaxCommKeyBytes || value.size() > wire::kMaxCommValueBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("communicator key \"", key, "\" of ", value.size(), " bytes: at most ",
                     wire::kMaxCommKeyBytes, " and ", wire::kMaxCommValueBytes));
  }
  worker::v1::WorkerMessage message;
  message.mutable_comm_key()->set_epoch(epoch_);
  message.mutable_comm_key()->set_key(key);
  message.mutable_comm_key()->set_value(value);
  send_(message);
  return absl::OkStatus();
}

absl::StatusOr<std::string> StreamExchange::Await(const std::string& key) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return cancelled_ || values_.count(key) > 0; });
  if (cancelled_) return absl::AbortedError(absl::StrCat("epoch ", epoch_, " is over"));
  return values_[key];
}

void StreamExchange::Cancel() {
  const std::lock_guard<std::mutex> lock(mutex_);
  cancelled_ = true;
  changed_.notify_all();
}

bool StreamExchange::Deliver(const worker::v1::CommKey& key) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (key.key().size() > wire::kMaxCommKeyBytes || key.value().size() > wire::kMaxCommValueBytes ||
      values_.size() >= wire::kMaxCommKeys) {
    return false;
  }
  values_[key.key()] = key.value();
  changed_.notify_all();
  return true;
}

}  // namespace lockstep
