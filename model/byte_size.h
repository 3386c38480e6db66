// Bytes as people write and read them.
#ifndef LOCKSTEP_MODEL_BYTE_SIZE_H_
#define LOCKSTEP_MODEL_BYTE_SIZE_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace lockstep {

// "80GiB", "80 GB", "1.5TiB", "512MiB", "1048576" (bytes). Units KiB to TiB
// count by 1024, KB to TB by 1000; their case does not matter. InvalidArgument
// for anything else, for a bare K, M, G or T, and outside [1, 2^60].
absl::StatusOr<int64_t> ParseByteSize(std::string_view text);

// "65.71 GiB", "512 B": two decimals in the largest unit that is not below one.
std::string FormatBytes(int64_t bytes);

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_BYTE_SIZE_H_
