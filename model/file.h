// Small files read whole, with a bound: config.json and its like.
#ifndef LOCKSTEP_MODEL_FILE_H_
#define LOCKSTEP_MODEL_FILE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace lockstep {

// NotFound: no such file. InvalidArgument: not a regular file, or longer than
// max_bytes. Both name the path.
absl::StatusOr<std::string> ReadSmallFile(const std::string& path, int64_t max_bytes);

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_FILE_H_
