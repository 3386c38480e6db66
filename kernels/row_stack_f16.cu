#include "kernels/row_stack.cuh"

namespace lockstep::kernels::stack {

template cudaError_t InitStack<__half, __half>();
template cudaError_t LaunchStack<__half, __half>(const Launch&, bool, int, const Params&);

}  // namespace lockstep::kernels::stack
