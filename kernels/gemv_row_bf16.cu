#include "kernels/gemv_row.cuh"

namespace lockstep::kernels {

template cudaError_t InitRow<__nv_bfloat16, __nv_bfloat16>();
template cudaError_t LaunchRow<__nv_bfloat16, __nv_bfloat16>(const Launch&, const GemvArgs&,
                                                             const RowPlan&);

}  // namespace lockstep::kernels
