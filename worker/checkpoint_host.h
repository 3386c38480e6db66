// The real model host: a Hugging Face directory, one rank's shard of it in
// memory, and the decoder over the cpu backend.
//
// What was loaded stays: a Load whose Configure differs from the last one in
// nothing but the epoch and what belongs to it returns at once.
#ifndef LOCKSTEP_WORKER_CHECKPOINT_HOST_H_
#define LOCKSTEP_WORKER_CHECKPOINT_HOST_H_

#include <cstdint>
#include <memory>

#include "worker/model_host.h"

namespace lockstep {

class Gpu;  // worker/gpu.h

// gpu: where it computes, outlives the host; null: the cpu backend. threads: of the backend; 0:
// what Configure says, or all there are.
std::unique_ptr<ModelHost> MakeCheckpointHost(uint32_t threads, Gpu* gpu);

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_CHECKPOINT_HOST_H_
