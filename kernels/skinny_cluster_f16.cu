#include "kernels/skinny_cluster.cuh"

namespace lockstep::kernels {

template cudaError_t InitCluster<__half, __half>(int (&)[kMaxClusterSplit + 1]);
template cudaError_t LaunchCluster<__half, __half>(const Launch&, int, int, size_t,
                                                   const ClusterParams&);

}  // namespace lockstep::kernels
