#include "kernels/gemv_row.cuh"

namespace lockstep::kernels {

template cudaError_t InitRow<__nv_fp8_e4m3, __nv_bfloat16>();
template cudaError_t LaunchRow<__nv_fp8_e4m3, __nv_bfloat16>(const Launch&, const GemvArgs&,
                                                             const RowPlan&);

}  // namespace lockstep::kernels
