// A cache of e4m3 in 16 bits, exactly, for the Hopper prefill kernel: the blocks that
// the spans of a launch see, one span after the other, into a scratch with a block
// table of its own. Blocks that a window hides keep a place and are not copied.
//
//   span s, its block j:  scratch block  sum over spans before s of their blocks, + j
//
// A thread block a block of the scratch: reads block_size * kv_heads * head_dim bytes each of
// k and v, writes twice as many. A thousandth of what attention over them computes.
#ifndef LOCKSTEP_KERNELS_ATTENTION_PREFILL_WIDEN_H_
#define LOCKSTEP_KERNELS_ATTENTION_PREFILL_WIDEN_H_

#include <cuda_runtime_api.h>

#include "kernels/attention_prefill.h"
#include "kernels/types.h"

namespace lockstep::kernels::prefill {

// args.scratch, from args.kv. A block's elements are a multiple of 16, and everything is 16-byte
// aligned.
cudaError_t LaunchWiden(const Launch& launch, const PrefillAttentionArgs& args);

}  // namespace lockstep::kernels::prefill

#endif  // LOCKSTEP_KERNELS_ATTENTION_PREFILL_WIDEN_H_
