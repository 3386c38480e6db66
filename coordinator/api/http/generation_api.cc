#include "coordinator/api/http/generation_api.h"

#include "coordinator/api/http/chat_format.h"
#include "coordinator/api/http/chat_request.h"
#include "coordinator/api/http/completion_format.h"

namespace lockstep {
namespace {

template <typename Choice>
std::unique_ptr<ChoiceBuilder> MakeChoice(uint32_t index, const CompletionRequest& request,
                                          const ServedModel& model) {
  return std::make_unique<Choice>(index, request, model);
}

}  // namespace

const GenerationApi& CompletionsApi() {
  static constexpr GenerationApi kApi = {
      // What OpenAI's API does without max_tokens.
      .defaults = {.max_tokens = 16, .prompt_field = "prompt"},
      .id_prefix = "cmpl-",
      .object = "text_completion",
      .chunk_object = "text_completion",
      .read = &ReadCompletionRequest,
      .make_choice = &MakeChoice<CompletionChoice>,
  };
  return kApi;
}

const GenerationApi& ChatApi() {
  static constexpr GenerationApi kApi = {
      .defaults = {.max_tokens = {}, .prompt_field = "messages"},
      .id_prefix = "chatcmpl-",
      .object = "chat.completion",
      .chunk_object = "chat.completion.chunk",
      .read = &ReadChatRequest,
      .make_choice = &MakeChoice<ChatChoice>,
  };
  return kApi;
}

}  // namespace lockstep
