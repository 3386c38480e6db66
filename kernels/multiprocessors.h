// How many multiprocessors there are to give blocks to.
#ifndef LOCKSTEP_KERNELS_MULTIPROCESSORS_H_
#define LOCKSTEP_KERNELS_MULTIPROCESSORS_H_

#include <cuda_runtime_api.h>

namespace lockstep::kernels {

// Of the current device; asked once, since all of a process's are alike. 1 if it cannot be told.
inline int SmCount() {
  static const int count = [] {
    int device = 0, sms = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
      return 1;
    return sms;
  }();
  return count;
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_MULTIPROCESSORS_H_
