// What a step keeps between two kernels, sized once for the largest step.
#ifndef LOCKSTEP_WORKER_BACKEND_CUDA_ACTIVATIONS_H_
#define LOCKSTEP_WORKER_BACKEND_CUDA_ACTIVATIONS_H_

#include <algorithm>
#include <cstdint>

#include "absl/status/status.h"
#include "kernels/types.h"
#include "model/memory_model.h"
#include "model/model_config.h"
#include "model/shard_plan.h"
#include "worker/backend/backend.h"
#include "worker/backend/cuda/cuda_memory.h"

namespace lockstep::cuda {

struct Activations {
  Buffer<std::byte> residual, normed, partial;  // [rows, hidden]
  Buffer<std::byte> embedded;                   // [rows, embedding_dim], only with project_in
  Buffer<std::byte> qkv;                        // [rows, q + k + v]
  Buffer<std::byte> heads;                      // [rows, q]
  Buffer<std::byte> up;                         // [rows, gate + up]
  Buffer<std::byte> activated;                  // [rows, intermediate]
  Buffer<std::byte> chosen;                     // [logit rows, hidden]
  Buffer<std::byte> projected;                  // [logit rows, embedding_dim], with project_out
  Buffer<std::byte> quantized;                  // [rows, widest product] e4m3, with FP8 weights
  Buffer<float> quantized_scales;               // [rows]

  absl::Status Allocate(const ModelConfig& config, const ShardPlan& plan, kernels::Type type,
                        const BackendLimits& limits, int64_t logit_rows, bool fp8) {
    const size_t element = kernels::TypeBytes(type);
    const size_t rows = limits.max_batched_tokens, hidden = config.hidden_size;
    const size_t q = plan.local_heads * config.head_dim;
    const size_t kv = plan.local_kv_heads * config.head_dim;
    const size_t mlp = plan.local_intermediate;
    const bool projected_ids = config.embedding_dim != config.hidden_size;
    absl::Status status;
    const auto take = [&](Buffer<std::byte>* buffer, size_t count, size_t bytes) {
      if (status.ok()) status = buffer->AllocateZeroed(count * bytes, "activations");
    };
    for (Buffer<std::byte>* buffer : {&residual, &normed, &partial})
      take(buffer, rows * hidden, element);
    take(&qkv, rows * (q + 2 * kv), element);
    take(&heads, rows * q, element);
    take(&up, rows * mlp * (config.gated_mlp ? 2 : 1), element);
    take(&activated, rows * mlp, element);
    take(&chosen, logit_rows * hidden, element);
    if (projected_ids) {
      take(&embedded, rows * config.embedding_dim, element);
      take(&projected, logit_rows * config.embedding_dim, element);
    }
    if (fp8) {
      take(&quantized, rows * std::max({hidden, q, mlp}), 1);
      if (status.ok()) status = quantized_scales.AllocateZeroed(rows, "activations");
    }
    return status;
  }
};

}  // namespace lockstep::cuda

#endif  // LOCKSTEP_WORKER_BACKEND_CUDA_ACTIVATIONS_H_
