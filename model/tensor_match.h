// A checkpoint against what a shard plan wants of it: names, shapes, dtypes.
#ifndef LOCKSTEP_MODEL_TENSOR_MATCH_H_
#define LOCKSTEP_MODEL_TENSOR_MATCH_H_

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/model_config.h"
#include "model/safetensors.h"
#include "model/shard_plan.h"

namespace lockstep {

// The stored tensor a slice is cut from: the first that exists of its name and
// alternatives, of the shape the slice expects and a dtype weights may have.
// NotFound / InvalidArgument / Unimplemented name the tensor and its file.
absl::StatusOr<const TensorInfo*> MatchTensor(const Checkpoint& checkpoint,
                                              const TensorSlice& slice);

// MatchTensor for every tensor of the model, and that the checkpoint has no
// bias or norm inside the model's layers that config.json does not ask for: it
// would be left out of the maths. Reads headers alone.
absl::Status MatchCheckpoint(const Checkpoint& checkpoint, const ModelConfig& config);

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_TENSOR_MATCH_H_
