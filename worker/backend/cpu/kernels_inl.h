// The table of kernels over one vector type. Included by kernels_*.cc alone.
#ifndef LOCKSTEP_WORKER_BACKEND_CPU_KERNELS_INL_H_
#define LOCKSTEP_WORKER_BACKEND_CPU_KERNELS_INL_H_

#include "worker/backend/cpu/attention_inl.h"
#include "worker/backend/cpu/gemm_inl.h"
#include "worker/backend/cpu/kernels.h"
#include "worker/backend/cpu/rows_inl.h"

namespace lockstep::cpu {

template <class V>
constexpr Kernels MakeKernels(const char* name) {
  return {.name = name,
          .tile_m = V::kTileM,
          .tile_n = V::kTileN,
          .block_m = Blocks<V>::kM,
          .block_n = Blocks<V>::kN,
          .block_k = Blocks<V>::kKVectors * kLanes,
          .gemm_direct = GemmDirect<V>,
          .pack = PackX<V>,
          .gemm_packed = GemmPacked<V>,
          .attention = Attention<V>,
          .rms_norm = RmsNorm<V>,
          .layer_norm = LayerNorm<V>,
          .activate = Activate<V>,
          .rope = Rope<V>,
          .widen = Widen<V>,
          .narrow = Narrow<V>,
          .all_finite = AllFinite<V>,
          .max = Max<V>,
          .exp_sum = ExpSum<V>};
}

// Defined in kernels_<set>.cc.
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kGenericKernels;

}  // namespace lockstep::cpu

#endif  // LOCKSTEP_WORKER_BACKEND_CPU_KERNELS_INL_H_
