#include "worker/backend/cpu/kernels_inl.h"
#include "worker/backend/cpu/vec_generic.h"

namespace lockstep::cpu {

constexpr Kernels kGenericKernels = MakeKernels<Generic>("generic");

}  // namespace lockstep::cpu
