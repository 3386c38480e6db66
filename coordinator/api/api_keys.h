// Who may ask: the keys of --api-key-file, one a line, hashed:
//
//   # printf %s "$KEY" | sha256sum
//   9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08  team-a
//
// The file is looked at with each request and read again when it has changed. A
// file that cannot be read or is malformed changes nothing but the log; one that
// is empty by then leaves nobody a key. Thread-safe. Keys are never logged.
#ifndef LOCKSTEP_COORDINATOR_API_API_KEYS_H_
#define LOCKSTEP_COORDINATOR_API_API_KEYS_H_

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/api/watched_file.h"

namespace lockstep {

class ApiKeys {
 public:
  // One line that names --api-key-file and the file's line.
  static absl::StatusOr<std::unique_ptr<ApiKeys>> Load(const std::string& path);

  // Unauthenticated unless `authorization`, the header or metadata of that name,
  // is "Bearer KEY" with a key of the file. The time taken tells nothing of how
  // much of a key was right. With OK, *cache_salt is that key's alone, so that no
  // key can tell from times or cached tokens what another one asked.
  absl::Status Check(std::string_view authorization, uint64_t* cache_salt = nullptr);

 private:
  using Digest = std::array<unsigned char, 32>;
  struct Key {
    Digest digest;
    std::string name;
  };

  explicit ApiKeys(const std::string& path) : path_(path), files_({path}) {}
  static absl::StatusOr<std::vector<Key>> Read(const std::string& path);
  static Digest Hash(std::string_view key);
  static uint64_t Salt(const Digest& digest);

  const std::string path_;
  std::mutex mutex_;
  WatchedFiles files_;  // guarded by mutex_, as what follows
  std::vector<Key> keys_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_API_KEYS_H_
