#include <filesystem>

#include "absl/status/status.h"
#include "model/config_reader.h"
#include "model/file.h"
#include "model/json.h"
#include "model/model_config.h"

namespace lockstep {

absl::StatusOr<GenerationConfig> LoadGenerationConfig(const std::string& model_dir) {
  const std::string path = (std::filesystem::path(model_dir) / "generation_config.json").string();
  const absl::StatusOr<std::string> text = ReadSmallFile(path, kMaxConfigBytes);
  if (absl::IsNotFound(text.status())) return GenerationConfig();
  if (!text.ok()) return text.status();
  const absl::StatusOr<nlohmann::json> object = ParseJsonObject(*text, path);
  if (!object.ok()) return object.status();

  // Requests bring their own settings, so the other fields have no effect.
  ConfigReader reader(*object, path, "");
  GenerationConfig config;
  config.eos_token_ids = reader.TokenIds("eos_token_id");
  const auto number = [&](std::string_view key, double above, double max) -> std::optional<double> {
    if (!reader.HasValue(key)) return std::nullopt;
    return reader.Number(key, std::nullopt, above, max);
  };
  // Just below zero: a temperature of 0 is greedy.
  config.temperature = number("temperature", -1e-9, 100);
  config.top_p = number("top_p", 0, 1);
  config.repetition_penalty = number("repetition_penalty", 0, 100);
  if (reader.HasValue("top_k")) {
    config.top_k = reader.Int("top_k", std::nullopt, -1, int64_t{1} << 31);
  }
  if (!reader.ok()) return reader.status();
  return config;
}

}  // namespace lockstep
