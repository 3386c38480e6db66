#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "worker/model_host.h"

namespace lockstep {

absl::Status CheckConfigure(const worker::v1::Configure& c) {
  const struct {
    const char* field;
    uint64_t value, least, most;
  } ranges[] = {{"epoch", c.epoch(), 1, UINT64_MAX},
                {"tp_size", c.tp_size(), 1, 256},
                {"rank", c.rank(), 0, c.tp_size() - uint64_t{1}},
                {"block_size", c.block_size(), 1, 4'096},
                {"num_kv_blocks", c.num_kv_blocks(), 1, 1 << 24},
                {"max_num_seqs", c.max_num_seqs(), 1, 1 << 16},
                {"max_batched_tokens", c.max_batched_tokens(), 1, 1 << 22},
                {"max_model_len", c.max_model_len(), 1, 1 << 22},
                {"cpu_threads", c.cpu_threads(), 0, 4'096},
                {"max_skew_ms", c.max_skew_ms(), 0, 24 * 3'600'000}};
  for (const auto& r : ranges) {
    if (r.value >= r.least && r.value <= r.most) continue;
    return absl::InvalidArgumentError(absl::StrCat("Configure.", r.field, ": ", r.value,
                                                   " is outside [", r.least, ", ", r.most, "]"));
  }
  const struct {
    const char* field;
    const std::string& value;
    size_t most;
  } texts[] = {{"model_path", c.model_path(), 4'096}, {"communicator", c.communicator(), 200}};
  for (const auto& t : texts) {
    if (!t.value.empty() && t.value.size() <= t.most) continue;
    return absl::InvalidArgumentError(absl::StrCat("Configure.", t.field, ": ", t.value.size(),
                                                   " bytes, expected 1 to ", t.most));
  }
  if (c.load_format() != "auto" && c.load_format() != "dummy") {
    return absl::InvalidArgumentError("Configure.load_format: expected auto or dummy");
  }
  if (!c.kv_dtype().empty() && c.kv_dtype() != "float8_e4m3fn") {
    return absl::InvalidArgumentError("Configure.kv_dtype: expected float8_e4m3fn, or nothing");
  }
  return absl::OkStatus();
}

}  // namespace lockstep
