// Scales that a checkpoint's makers measured for keys and values of one byte.
#ifndef LOCKSTEP_WORKER_KV_SCALES_H_
#define LOCKSTEP_WORKER_KV_SCALES_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "model/safetensors.h"

namespace lockstep {

// value = stored * scale. Normal numbers above zero.
struct KvScales {
  float k = 1.0f, v = 1.0f;
  bool operator==(const KvScales&) const = default;
};

// One entry a layer, or nothing where the checkpoint has no such tensor: then values
// are stored as they are. A layer's are "layers.N.self_attn.k_scale" and ".v_scale", below
// whatever prefix and with or without a module between (".k_proj.k_scale",
// ".attn.k_scale"), or ".kv_scale" for both; each of one element in F32, F16 or BF16.
// InvalidArgument names the file and the tensor: one a head, or no normal number above 0.
absl::StatusOr<std::vector<KvScales>> ReadKvScales(const Checkpoint& checkpoint,
                                                   int64_t num_layers);

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_KV_SCALES_H_
