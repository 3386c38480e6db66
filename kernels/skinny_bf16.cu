#include "kernels/skinny.cuh"

namespace lockstep::kernels {

template cudaError_t InitSkinny<__nv_bfloat16, __nv_bfloat16>();
template cudaError_t LaunchSkinny<__nv_bfloat16, __nv_bfloat16>(const Launch&, const GemvArgs&,
                                                                const SkinnyPlan&);

}  // namespace lockstep::kernels
