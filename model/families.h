// The supported families: for each, how its config.json becomes a ModelConfig.
// Defaults are those of the family's configuration class in transformers,
// because a saved config leaves them out.
#ifndef LOCKSTEP_MODEL_FAMILIES_H_
#define LOCKSTEP_MODEL_FAMILIES_H_

#include <string_view>

#include "absl/types/span.h"
#include "model/config_reader.h"
#include "model/model_config.h"

namespace lockstep {

struct Family {
  std::string_view architecture;  // "LlamaForCausalLM"
  std::string_view model_type;    // "llama"
  // Reads every field of the family into the config. Errors stay in the reader;
  // what is read then is within the bounds that keep all later sums in 64 bits.
  void (*read)(ConfigReader& reader, ModelConfig& config);
};

absl::Span<const Family> Families();

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_FAMILIES_H_
