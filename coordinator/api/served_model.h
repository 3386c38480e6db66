// What the doors know about the model they serve. Filled once by the
// coordinator's main (LoadServedModel reads the text files), immutable and
// shared from then on.
#ifndef LOCKSTEP_COORDINATOR_API_SERVED_MODEL_H_
#define LOCKSTEP_COORDINATOR_API_SERVED_MODEL_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/ids.h"
#include "coordinator/text/chat_template.h"
#include "coordinator/text/tokenizer.h"
#include "model/model_config.h"

namespace lockstep {

struct ServedModel {
  std::string name;          // --served-model-name, or the model directory's last part
  std::string architecture;  // as config.json names it
  std::string dtype;         // what is computed with: "float32", ...
  std::string kv_dtype;      // of keys and values in memory, likewise
  uint32_t vocab_size = 0;   // of the logits; ids at or above it are refused
  uint32_t max_model_len = 0;
  uint32_t tp_size = 1;
  uint32_t block_size = 16;
  bool enable_prefix_caching = true;
  // Sorted union of generation_config.json's, config.json's and the tokenizer's.
  std::vector<TokenId> eos_token_ids;
  std::shared_ptr<const Tokenizer> tokenizer;
  std::optional<ChatTemplate> chat_template;
};

// Reads tokenizer, chat template and generation_config.json of `model_dir` and
// what `config` says. The caller sets dtype and kv_dtype (here: the checkpoint's),
// max_model_len (here: the model's), tp_size, block_size and prefix caching.
// An empty `name` is the directory's last part. Errors name the file.
absl::StatusOr<ServedModel> LoadServedModel(const std::string& model_dir, const ModelConfig& config,
                                            const std::string& name);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_SERVED_MODEL_H_
