#include "kernels/row_stack.cuh"

namespace lockstep::kernels::stack {

template cudaError_t InitStack<__nv_fp8_e4m3, __half>();
template cudaError_t LaunchStack<__nv_fp8_e4m3, __half>(const Launch&, bool, int, const Params&);

}  // namespace lockstep::kernels::stack
