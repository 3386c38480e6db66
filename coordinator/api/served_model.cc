#include "coordinator/api/served_model.h"

#include <algorithm>
#include <filesystem>
#include <utility>

namespace lockstep {
namespace {

std::string LastPart(const std::string& model_dir) {
  std::filesystem::path path = std::filesystem::path(model_dir).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();
  return path.has_filename() ? path.filename().string() : model_dir;
}

}  // namespace

absl::StatusOr<ServedModel> LoadServedModel(const std::string& model_dir, const ModelConfig& config,
                                            const std::string& name) {
  absl::StatusOr<std::shared_ptr<const Tokenizer>> tokenizer = Tokenizer::Load(model_dir);
  if (!tokenizer.ok()) return tokenizer.status();
  absl::StatusOr<std::optional<ChatTemplate>> chat_template = ChatTemplate::Load(model_dir);
  if (!chat_template.ok()) return chat_template.status();
  absl::StatusOr<GenerationConfig> generation = LoadGenerationConfig(model_dir);
  if (!generation.ok()) return generation.status();

  ServedModel model;
  model.name = name.empty() ? LastPart(model_dir) : name;
  model.architecture = config.architecture;
  model.dtype = model.kv_dtype = std::string(DTypeName(config.dtype));
  model.vocab_size = static_cast<uint32_t>(config.vocab_size);
  model.max_model_len = static_cast<uint32_t>(config.max_position_embeddings);
  model.tokenizer = *std::move(tokenizer);
  model.chat_template = *std::move(chat_template);

  std::vector<TokenId> eos = model.tokenizer->eos_token_ids();
  eos.insert(eos.end(), config.eos_token_ids.begin(), config.eos_token_ids.end());
  eos.insert(eos.end(), generation->eos_token_ids.begin(), generation->eos_token_ids.end());
  std::sort(eos.begin(), eos.end());
  eos.erase(std::unique(eos.begin(), eos.end()), eos.end());
  // An id that the weights do not have is never sampled.
  std::erase_if(eos, [&](TokenId id) { return id >= model.vocab_size; });
  model.eos_token_ids = std::move(eos);
  return model;
}

}  // namespace lockstep
