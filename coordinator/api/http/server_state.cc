#include "coordinator/api/http/server_state.h"

#include <malloc.h>

#include "coordinator/api/limits.h"

namespace lockstep {
namespace {

constexpr size_t kLargeBodyBytes = 512 * 1024;

}  // namespace

BodyLease::~BodyLease() {
  state_->body_bytes -= held_;
  // What came of a large body was many times its size.
  if (held_ >= kLargeBodyBytes) malloc_trim(0);
}

bool BodyLease::Resize(size_t bytes) {
  if (bytes <= held_) return true;
  const size_t more = bytes - std::exchange(held_, bytes);
  return (state_->body_bytes += more) <= limits::kBodyBytesInFlight;
}

BusyGuard::BusyGuard(std::shared_ptr<ServerState> state) : state_(std::move(state)) {
  const std::lock_guard lock(state_->mutex);
  ++state_->exchanges;
}

BusyGuard::~BusyGuard() {
  const std::lock_guard lock(state_->mutex);
  --state_->exchanges;
  state_->changed.notify_all();
}

}  // namespace lockstep
