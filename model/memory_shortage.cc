#include "model/memory_shortage.h"

#include <algorithm>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "model/byte_size.h"

namespace lockstep {

absl::Status ExplainShortage(const ModelConfig& config, const ServingShape& shape, int64_t tp_size,
                             int64_t rank, BackendKind backend, int64_t num_kv_blocks,
                             int64_t free_bytes, const absl::Status& failure) {
  const std::string cause(failure.message());
  const absl::StatusOr<RankMemory> memory =
      PredictRankMemory(config, shape, tp_size, rank, backend);
  if (!memory.ok()) return failure;
  const absl::StatusOr<int64_t> fit = KvBlocksThatFit(config, shape, tp_size, backend, free_bytes);
  // Not one sequence: the message says which other flags would help.
  if (!fit.ok()) {
    return absl::ResourceExhaustedError(absl::StrCat(fit.status().message(), "; ", cause));
  }
  const int64_t block_bytes = memory->kv_bytes_per_token * shape.block_size;
  const int64_t kv_bytes = num_kv_blocks * block_bytes;
  // What was predicted to fit and did not: somebody else takes memory too.
  const int64_t blocks = std::min(*fit, num_kv_blocks - num_kv_blocks / 10);
  return absl::ResourceExhaustedError(
      absl::StrCat("needs ", FormatBytes(memory->fixed_bytes() + kv_bytes), " (weights ",
                   FormatBytes(memory->weight_bytes), ", KV of ", num_kv_blocks, " blocks ",
                   FormatBytes(kv_bytes), ", activations and communication ",
                   FormatBytes(memory->overhead_bytes()), "), but ",
                   FormatBytes(std::max<int64_t>(0, free_bytes)), " were free; --num-kv-blocks ",
                   blocks, *fit < num_kv_blocks ? " would fit; " : " needs less; ", cause));
}

}  // namespace lockstep
