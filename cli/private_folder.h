// A folder in /tmp that only this user can enter, for the socket that workers
// dial. Gone with the object; what a killed predecessor left behind goes when the
// next one is made. Who lives holds a lock on his folder, which the kernel drops
// with the process.
#ifndef LOCKSTEP_CLI_PRIVATE_FOLDER_H_
#define LOCKSTEP_CLI_PRIVATE_FOLDER_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace lockstep {

class PrivateFolder {
 public:
  // Named PREFIX-XXXXXX; `prefix` is a path, short: a socket's has 107 bytes.
  static absl::StatusOr<std::unique_ptr<PrivateFolder>> Make(const std::string& prefix);
  ~PrivateFolder();
  PrivateFolder(const PrivateFolder&) = delete;
  PrivateFolder& operator=(const PrivateFolder&) = delete;

  const std::string& path() const { return path_; }

 private:
  PrivateFolder(std::string path, int lock) : path_(std::move(path)), lock_(lock) {}
  const std::string path_;
  const int lock_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_PRIVATE_FOLDER_H_
