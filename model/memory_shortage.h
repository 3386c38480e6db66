// What a rank says whose memory ran out while it loaded: what it needs, part by
// part, what was free before, and the value of a flag that would fit.
#ifndef LOCKSTEP_MODEL_MEMORY_SHORTAGE_H_
#define LOCKSTEP_MODEL_MEMORY_SHORTAGE_H_

#include <cstdint>

#include "absl/status/status.h"
#include "model/memory_model.h"
#include "model/model_config.h"

namespace lockstep {

// Of a rank that was told to hold num_kv_blocks. `shape`: as it was configured.
// `free_bytes`: for this rank, before it loaded anything. `failure`: the call that
// failed, which ends the message; ResourceExhausted, as the result is.
absl::Status ExplainShortage(const ModelConfig& config, const ServingShape& shape, int64_t tp_size,
                             int64_t rank, BackendKind backend, int64_t num_kv_blocks,
                             int64_t free_bytes, const absl::Status& failure);

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_MEMORY_SHORTAGE_H_
