// One choice of an answer on its way to JSON: gathers what the answer adds, and
// Take turns what was gathered since the last Take into an element of `choices`:
// once for a whole answer, once a chunk for a stream, so that both are made
// alike. Used by the exchange's puller alone.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_CHOICE_BUILDER_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_CHOICE_BUILDER_H_

#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "coordinator/api/answer.h"

namespace lockstep {

using OrderedJson = nlohmann::ordered_json;

class ChoiceBuilder {
 public:
  virtual ~ChoiceBuilder() = default;

  // `prompt_text`: what echo shows.
  virtual void AddPrompt(const Answer& answer, const PromptInfo& info,
                         const std::string& prompt_text) = 0;
  virtual void AddDelta(const TextDelta& delta) = 0;
  virtual void AddEnd(const SequenceEnd& end, const SamplingParams& sampling) = 0;

  // Whether a chunk is due: the prompt alone waits for the first delta.
  virtual bool HasDelta() const = 0;
  // What a stream says of this choice before its first delta, once.
  virtual std::optional<OrderedJson> TakeOpening() { return {}; }
  virtual OrderedJson Take() = 0;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_CHOICE_BUILDER_H_
