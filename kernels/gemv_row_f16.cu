#include "kernels/gemv_row.cuh"

namespace lockstep::kernels {

template cudaError_t InitRow<__half, __half>();
template cudaError_t LaunchRow<__half, __half>(const Launch&, const GemvArgs&, const RowPlan&);

}  // namespace lockstep::kernels
