// What a worker gets of a coordinator: a series of messages, each a record. Plans
// go through the codec into the books of the slots; the digest, which only an
// honest coordinator gets right, is put right where it is all that is wrong.
#include <google/protobuf/stubs/logging.h>

#include <string>
#include <string_view>

#include "absl/strings/numbers.h"
#include "common/check.h"
#include "proto/worker.pb.h"
#include "tests/fuzz/fuzz_input.h"
#include "wire/codec.h"
#include "wire/plan_digest.h"
#include "worker/model_host.h"
#include "worker/slot_book.h"
#include "worker/stream_exchange.h"

namespace lockstep::fuzz {
namespace {

constexpr ExecutorLimits kLimits = {.max_num_seqs = 4,
                                    .max_batched_tokens = 64,
                                    .max_model_len = 128,
                                    .block_size = 16,
                                    .num_kv_blocks = 32,
                                    .vocab_size = 100};

// "..., this worker's slots give DIGEST: ...".
uint64_t DigestIn(const absl::Status& disagreement) {
  constexpr std::string_view kBefore = "slots give ";
  const std::string text(disagreement.message());
  const size_t begin = text.find(kBefore);
  LOCKSTEP_CHECK(begin != std::string::npos);
  const size_t from = begin + kBefore.size();
  uint64_t digest = 0;
  LOCKSTEP_CHECK(absl::SimpleHexAtoi(text.substr(from, text.find(':', from) - from), &digest));
  return digest;
}

class Worker {
 public:
  void OnMessage(std::string_view bytes) {
    worker::v1::CoordinatorMessage message;
    if (!message.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) return;
    if (message.has_plan()) OnPlan(message.plan());
    if (message.has_configure()) {
      const absl::Status status = CheckConfigure(message.configure());
      if (!status.ok()) RequireRefusal(status);
    }
    if (message.has_comm_key() && exchange_.Deliver(message.comm_key())) {
      const auto value = exchange_.Await(message.comm_key().key());
      LOCKSTEP_CHECK(value.ok());
    }
  }

 private:
  void OnPlan(const worker::v1::StepPlan& encoded) {
    auto plan = wire::Decode(encoded);
    if (!plan.ok()) return RequireRefusal(plan.status());
    const auto again = wire::Decode(wire::Encode(*plan));
    LOCKSTEP_CHECK(again.ok() && *again == *plan);
    auto spans = book_.Check(*plan);
    if (absl::IsFailedPrecondition(spans.status())) {
      plan->digest = DigestIn(spans.status());
      spans = book_.Check(*plan);
      LOCKSTEP_CHECK(spans.ok());
    }
    if (!spans.ok()) return RequireRefusal(spans.status());
    book_.Apply(*plan, *spans);
  }

  SlotBook book_{kLimits, /*epoch=*/1};
  StreamExchange exchange_{1, [](const worker::v1::WorkerMessage&) {}};
};

}  // namespace
}  // namespace lockstep::fuzz

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // It has a line to say about each string that is no UTF-8.
  static const bool quiet = google::protobuf::SetLogHandler(nullptr) != nullptr;
  (void)quiet;
  lockstep::fuzz::Input input(data, size);
  lockstep::fuzz::Worker worker;
  while (!input.empty()) worker.OnMessage(input.Record());
  return 0;
}
