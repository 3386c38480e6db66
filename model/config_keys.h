// Fields of a config.json that cannot change what a forward pass computes:
// bookkeeping, training-time settings, and the generation defaults that older
// transformers wrote into every config.
#ifndef LOCKSTEP_MODEL_CONFIG_KEYS_H_
#define LOCKSTEP_MODEL_CONFIG_KEYS_H_

#include <string_view>

namespace lockstep {

bool IsHarmlessConfigKey(std::string_view key);

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_CONFIG_KEYS_H_
