#include "kernels/row_stack.cuh"

namespace lockstep::kernels::stack {

template cudaError_t InitStack<__nv_bfloat16, __nv_bfloat16>();
template cudaError_t LaunchStack<__nv_bfloat16, __nv_bfloat16>(const Launch&, bool, int,
                                                               const Params&);

}  // namespace lockstep::kernels::stack
