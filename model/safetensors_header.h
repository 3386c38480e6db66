// The header of one safetensors file, from bytes alone.
//
//   | length, 8 bytes little endian | header: a JSON object | data ... end of file |
//
// The header maps tensor names to {dtype, shape, data_offsets [begin, end)},
// offsets counted from the end of the header; "__metadata__" maps strings to
// strings. The tensors must fill the data exactly: no hole, no overlap.
#ifndef LOCKSTEP_MODEL_SAFETENSORS_HEADER_H_
#define LOCKSTEP_MODEL_SAFETENSORS_HEADER_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "model/safetensors.h"

namespace lockstep {

constexpr uint64_t kSafetensorsLengthBytes = 8;
constexpr uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;

// Bytes of the header, from the first eight bytes of a file that long.
// InvalidArgument, starting with `where`, when they cannot be true.
absl::StatusOr<uint64_t> ParseSafetensorsLength(std::string_view first_bytes, uint64_t file_bytes,
                                                std::string_view where);

// `header` is the JSON text. Offsets in the answer count from the start of the
// file; names are in the order of the header; TensorInfo::file is zero.
absl::StatusOr<std::vector<std::pair<std::string, TensorInfo>>> ParseSafetensorsHeader(
    std::string_view header, uint64_t file_bytes, std::string_view where);

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_SAFETENSORS_HEADER_H_
