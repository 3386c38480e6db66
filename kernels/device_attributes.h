// What the current device has; asked once, since all of a process's are alike.
#ifndef LOCKSTEP_KERNELS_DEVICE_ATTRIBUTES_H_
#define LOCKSTEP_KERNELS_DEVICE_ATTRIBUTES_H_

#include <cuda_runtime_api.h>

namespace lockstep::kernels {

// `unknown` if it cannot be told.
inline int DeviceAttribute(cudaDeviceAttr attribute, int unknown) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess)
    return unknown;
  return value;
}

// Multiprocessors to give blocks to.
inline int SmCount() {
  static const int count = DeviceAttribute(cudaDevAttrMultiProcessorCount, 1);
  return count;
}

// Whether blocks may form clusters (sm_90 and later).
inline bool HasClusters() {
  static const bool has = DeviceAttribute(cudaDevAttrClusterLaunch, 0) != 0;
  return has;
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_DEVICE_ATTRIBUTES_H_
