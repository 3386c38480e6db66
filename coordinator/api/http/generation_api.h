// How /v1/completions and /v1/chat/completions differ; all else is one path.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_GENERATION_API_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_GENERATION_API_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "coordinator/api/client_request.h"
#include "coordinator/api/http/choice_builder.h"
#include "coordinator/api/http/completion_request.h"
#include "coordinator/api/served_model.h"

namespace lockstep {

struct GenerationApi {
  DoorDefaults defaults;
  const char* id_prefix;
  const char* object;        // of a whole answer
  const char* chunk_object;  // of a stream's
  absl::StatusOr<CompletionRequest> (*read)(const std::string& body);
  // What is referred to outlives the builder.
  std::unique_ptr<ChoiceBuilder> (*make_choice)(uint32_t index, const CompletionRequest& request,
                                                const ServedModel& model);
};

const GenerationApi& CompletionsApi();
const GenerationApi& ChatApi();

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_GENERATION_API_H_
