#include "coordinator/api/api_keys.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <cstring>
#include <fstream>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/log.h"

namespace lockstep {
namespace {

constexpr size_t kMaxKeys = 10'000;
constexpr std::string_view kScheme = "bearer ";

bool IsHex(std::string_view text) {
  for (const char c : text) {
    if (!absl::ascii_isxdigit(static_cast<unsigned char>(c))) return false;
  }
  return true;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ApiKeys>> ApiKeys::Load(const std::string& path) {
  std::unique_ptr<ApiKeys> out(new ApiKeys(path));
  out->files_.Changed();
  absl::StatusOr<std::vector<Key>> keys = Read(path);
  if (!keys.ok()) return keys.status();
  if (keys->empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--api-key-file ", path, ": no key in it; add lines of SHA256 NAME"));
  }
  out->keys_ = *std::move(keys);
  return out;
}

absl::StatusOr<std::vector<ApiKeys::Key>> ApiKeys::Read(const std::string& path) {
  std::ifstream file(path);
  if (!file) {
    return absl::NotFoundError(absl::StrCat("--api-key-file ", path, ": cannot be read"));
  }
  std::vector<Key> keys;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    const std::string text(absl::StripAsciiWhitespace(line));
    if (text.empty() || text[0] == '#') continue;
    const std::string hex = text.substr(0, text.find_first_of(" \t,"));
    const std::string name(absl::StripAsciiWhitespace(
        hex.size() < text.size() ? text.substr(hex.size() + 1) : std::string()));
    // The line itself may be a key that somebody forgot to hash: not shown.
    if (hex.size() != 2 * sizeof(Digest) || !IsHex(hex) || name.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--api-key-file ", path, ": line ", number,
                       ": expected 64 hexadecimal digits (sha256 of the key) and a name"));
    }
    if (keys.size() == kMaxKeys) {
      return absl::InvalidArgumentError(
          absl::StrCat("--api-key-file ", path, ": more than ", kMaxKeys, " keys"));
    }
    Key key{.digest = {}, .name = name};
    const std::string bytes = absl::HexStringToBytes(hex);
    std::copy(bytes.begin(), bytes.end(), key.digest.begin());
    keys.push_back(std::move(key));
  }
  return keys;
}

ApiKeys::Digest ApiKeys::Hash(std::string_view key) {
  Digest digest;
  SHA256(reinterpret_cast<const unsigned char*>(key.data()), key.size(), digest.data());
  return digest;
}

// 64 bits of a sha256: two of the most keys there may be meet once in 10^11 files.
uint64_t ApiKeys::Salt(const Digest& digest) {
  uint64_t salt;
  std::memcpy(&salt, digest.data(), sizeof(salt));
  return salt;
}

absl::Status ApiKeys::Check(std::string_view authorization, uint64_t* cache_salt) {
  const std::string scheme =
      absl::AsciiStrToLower(std::string(authorization.substr(0, kScheme.size())));
  if (scheme != kScheme) {
    return absl::UnauthenticatedError(authorization.empty()
                                          ? "an API key is needed; send 'Authorization: Bearer KEY'"
                                          : "authorization: expected 'Bearer KEY'");
  }
  authorization.remove_prefix(kScheme.size());
  const size_t begin = authorization.find_first_not_of(' ');
  const Digest asked =
      Hash(begin == std::string_view::npos ? std::string_view() : authorization.substr(begin));
  const std::lock_guard lock(mutex_);
  if (files_.Changed()) {
    absl::StatusOr<std::vector<Key>> keys = Read(path_);
    if (keys.ok()) {
      keys_ = *std::move(keys);
      LogInfo(absl::StrCat("--api-key-file ", path_, ": changed; ", keys_.size(), " keys"));
    } else {
      LogWarning(
          absl::StrCat(std::string(keys.status().message()), "; the keys stay as they were"));
    }
  }
  // All of them, whichever fits.
  int found = 0;
  for (const Key& key : keys_) {
    found |= static_cast<int>(CRYPTO_memcmp(key.digest.data(), asked.data(), asked.size()) == 0);
  }
  if (found == 0) return absl::UnauthenticatedError("the API key is not valid");
  if (cache_salt != nullptr) *cache_salt = Salt(asked);
  return absl::OkStatus();
}

}  // namespace lockstep
