#include "kernels/skinny.cuh"

namespace lockstep::kernels {

template cudaError_t InitSkinny<__half, __half>();
template cudaError_t LaunchSkinny<__half, __half>(const Launch&, const GemvArgs&,
                                                  const SkinnyPlan&);

}  // namespace lockstep::kernels
