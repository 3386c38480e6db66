#include "model/model_digest.h"

#include <fstream>
#include <sstream>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lockstep {

// FNV-1a.
absl::StatusOr<uint64_t> DigestModel(const std::string& model_dir, const Checkpoint* checkpoint) {
  std::ifstream file(model_dir + "/config.json", std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  if (!file) return absl::NotFoundError(absl::StrCat(model_dir, "/config.json: cannot be read"));
  uint64_t hash = 0xcbf29ce484222325u;
  const auto mix = [&hash](uint8_t byte) { hash = (hash ^ byte) * 0x100000001b3u; };
  for (const char c : text.str()) mix(static_cast<uint8_t>(c));
  if (checkpoint != nullptr) {
    const absl::StatusOr<uint64_t> weights = checkpoint->Digest();
    if (!weights.ok()) return weights.status();
    for (int shift = 0; shift < 64; shift += 8) mix(static_cast<uint8_t>(*weights >> shift));
  }
  return hash == 0 ? 1 : hash;  // 0 means that nobody knows
}

}  // namespace lockstep
