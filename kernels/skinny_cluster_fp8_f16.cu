#include "kernels/skinny_cluster.cuh"

namespace lockstep::kernels {

template cudaError_t InitCluster<__nv_fp8_e4m3, __half>(int (&)[kMaxClusterSplit + 1]);
template cudaError_t LaunchCluster<__nv_fp8_e4m3, __half>(const Launch&, int, int, size_t,
                                                          const ClusterParams&);

}  // namespace lockstep::kernels
