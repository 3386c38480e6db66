// A message of the gRPC door, from its bytes to what the engine would get. The
// first byte says which message.
#include <google/protobuf/stubs/logging.h>

#include "coordinator/api/grpc_convert.h"
#include "tests/fuzz/fuzz_input.h"
#include "tests/fuzz/fuzz_model.h"

namespace lockstep::fuzz {
namespace {

void Generate(std::string_view bytes) {
  v1::GenerateRequest message;
  if (!message.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) return;
  const auto request =
      BuildRequest(FromProto(message), Model(), {.max_tokens = {}, .prompt_field = "text"}, 0);
  if (!request.ok()) return RequireRefusal(request.status());
  RequireServable(*request);
}

void Tokenize(std::string_view bytes) {
  v1::TokenizeRequest message;
  if (!message.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) return;
  const auto ids = EncodePrompt(FromProto(message), Model(), "text", TokenizeLimit(Model()));
  if (!ids.ok()) RequireRefusal(ids.status());
}

}  // namespace
}  // namespace lockstep::fuzz

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // It has a line to say about each string that is no UTF-8.
  static const bool quiet = google::protobuf::SetLogHandler(nullptr) != nullptr;
  (void)quiet;
  lockstep::fuzz::Input input(data, size);
  if (input.Byte() == 't') {
    lockstep::fuzz::Tokenize(input.Rest());
  } else {
    lockstep::fuzz::Generate(input.Rest());
  }
  return 0;
}
