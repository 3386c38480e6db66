#include "worker/backend/cpu/kernels_inl.h"
#include "worker/backend/cpu/vec_avx512.h"

namespace lockstep::cpu {

constexpr Kernels kAvx512Kernels = MakeKernels<Avx512>("avx512");

}  // namespace lockstep::cpu
