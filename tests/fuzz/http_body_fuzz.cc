// A body of the HTTP door, from JSON to what the engine would get. The first
// byte says which path it was posted to.
#include <string>

#include "common/check.h"
#include "coordinator/api/http/chat_request.h"
#include "coordinator/api/http/completion_request.h"
#include "coordinator/api/http/token_bodies.h"
#include "coordinator/api/limits.h"
#include "nlohmann/json.hpp"
#include "tests/fuzz/fuzz_input.h"
#include "tests/fuzz/fuzz_model.h"

namespace lockstep::fuzz {
namespace {

void Generate(const absl::StatusOr<CompletionRequest>& read) {
  if (!read.ok()) return RequireRefusal(read.status());
  LOCKSTEP_CHECK(!read->prompts.empty() && read->prompts.size() <= limits::kPromptsPerBatch);
  LOCKSTEP_CHECK(read->prompts.size() * read->n <= limits::kBatchTimesN);
  for (const ClientRequest& client : read->prompts) {
    const auto request =
        BuildRequest(client, Model(), {.max_tokens = 16, .prompt_field = "prompt"}, 0);
    if (!request.ok()) {
      RequireRefusal(request.status());
    } else {
      RequireServable(*request);
    }
  }
}

void Text(const absl::StatusOr<std::string>& answer) {
  if (!answer.ok()) return RequireRefusal(answer.status());
  LOCKSTEP_CHECK(nlohmann::json::accept(*answer));
}

}  // namespace
}  // namespace lockstep::fuzz

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lockstep;
  fuzz::Input input(data, size);
  const char path = static_cast<char>(input.Byte());
  const std::string body(input.Rest());
  switch (path) {
    case 'c':
      fuzz::Generate(ReadChatRequest(body));
      break;
    case 't':
      fuzz::Text(TokenizeBody(body, fuzz::Model()));
      break;
    case 'd':
      fuzz::Text(DetokenizeBody(body, fuzz::Model()));
      break;
    default:
      fuzz::Generate(ReadCompletionRequest(body));
  }
  return 0;
}
