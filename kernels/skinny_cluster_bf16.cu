#include "kernels/skinny_cluster.cuh"

namespace lockstep::kernels {

template cudaError_t InitCluster<__nv_bfloat16, __nv_bfloat16>(int (&)[kMaxClusterSplit + 1]);
template cudaError_t LaunchCluster<__nv_bfloat16, __nv_bfloat16>(const Launch&, int, int, size_t,
                                                                 const ClusterParams&);

}  // namespace lockstep::kernels
