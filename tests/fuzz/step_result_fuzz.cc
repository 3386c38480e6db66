// A step's result from a worker: what the codec accepts is what it was sent, and
// means the same when it is encoded again.
#include <google/protobuf/stubs/logging.h>

#include "common/check.h"
#include "proto/step_plan.pb.h"
#include "tests/fuzz/fuzz_input.h"
#include "wire/codec.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // It has a line to say about each string that is no UTF-8.
  static const bool quiet = google::protobuf::SetLogHandler(nullptr) != nullptr;
  (void)quiet;
  using namespace lockstep;
  worker::v1::StepResult message;
  if (!message.ParseFromArray(data, static_cast<int>(size))) return 0;
  const auto result = wire::Decode(message);
  if (!result.ok()) {
    fuzz::RequireRefusal(result.status());
    return 0;
  }
  const auto again = wire::Decode(wire::Encode(*result));
  LOCKSTEP_CHECK(again.ok() && *again == *result);
  return 0;
}
