#include "worker/backend/cpu/kernels_inl.h"
#include "worker/backend/cpu/vec_avx2.h"

namespace lockstep::cpu {

constexpr Kernels kAvx2Kernels = MakeKernels<Avx2>("avx2");

}  // namespace lockstep::cpu
