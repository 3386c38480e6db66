// The reference backend: float32 arithmetic on the processor, 16-bit weights and
// KV kept as they are in memory. A row's result depends neither on its batch
// mates, nor on how a prompt was cut into steps, nor on tp_size, nor on the
// number of threads: every sum has one order (see gemm.h, attention.h).
#ifndef LOCKSTEP_WORKER_BACKEND_CPU_CPU_BACKEND_H_
#define LOCKSTEP_WORKER_BACKEND_CPU_CPU_BACKEND_H_

#include <memory>

#include "absl/status/statusor.h"
#include "model/model_config.h"
#include "model/shard_plan.h"
#include "worker/backend/backend.h"
#include "worker/thread_pool.h"
#include "worker/weights.h"

namespace lockstep {

// kv_dtype: float32, float16 or bfloat16. `pool` outlives the backend.
// ResourceExhausted when the KV cache or the buffers cannot be allocated;
// InvalidArgument when the weights lack a tensor the config asks for.
absl::StatusOr<std::unique_ptr<Backend>> MakeCpuBackend(const ModelConfig& config,
                                                        const ShardPlan& plan,
                                                        std::unique_ptr<Weights> weights,
                                                        const BackendLimits& limits, DType kv_dtype,
                                                        ThreadPool* pool);

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_BACKEND_CPU_CPU_BACKEND_H_
