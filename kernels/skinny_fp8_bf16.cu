#include "kernels/skinny.cuh"

namespace lockstep::kernels {

template cudaError_t InitSkinny<__nv_fp8_e4m3, __nv_bfloat16>();
template cudaError_t LaunchSkinny<__nv_fp8_e4m3, __nv_bfloat16>(const Launch&, const GemvArgs&,
                                                                const SkinnyPlan&);

}  // namespace lockstep::kernels
