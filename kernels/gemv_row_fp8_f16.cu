#include "kernels/gemv_row.cuh"

namespace lockstep::kernels {

template cudaError_t InitRow<__nv_fp8_e4m3, __half>();
template cudaError_t LaunchRow<__nv_fp8_e4m3, __half>(const Launch&, const GemvArgs&,
                                                      const RowPlan&);

}  // namespace lockstep::kernels
