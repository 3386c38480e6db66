// The Hopper prefill kernel. Called by PrefillAttention alone.
#ifndef LOCKSTEP_KERNELS_ATTENTION_PREFILL_WGMMA_H_
#define LOCKSTEP_KERNELS_ATTENTION_PREFILL_WGMMA_H_

#include <cuda_runtime_api.h>

#include "kernels/attention_prefill.h"
#include "kernels/attention_prefill_launch.h"
#include "kernels/types.h"

namespace lockstep::kernels::prefill {

// Once a process and device.
cudaError_t InitWgmma();

// bf16 or f16 over a cache of the same type, head_dim 64 or 128, blocks of 8, 16,
// 32, 64 or 128 positions, on a device of compute capability 9.0.
bool WgmmaTakes(const PrefillAttentionArgs& args);

cudaError_t LaunchWgmma(const Launch& launch, const PrefillAttentionArgs& args, const Params& p);

}  // namespace lockstep::kernels::prefill

#endif  // LOCKSTEP_KERNELS_ATTENTION_PREFILL_WGMMA_H_
