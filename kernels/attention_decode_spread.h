// How many blocks of a kernel a multiprocessor takes at a time.
//
// A kernel begins while the one ahead of it ends, and a multiprocessor that is done early is
// given as many new blocks as it has room for. Where all would find room at once, those that
// are done late then get none and stay idle for as long as the kernel takes: of 256 blocks of
// which three fit, 44 of 132 multiprocessors. So blocks ask for shared memory that they do not
// need, enough that no more of them fit than must.
#ifndef LOCKSTEP_KERNELS_ATTENTION_DECODE_SPREAD_H_
#define LOCKSTEP_KERNELS_ATTENTION_DECODE_SPREAD_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>

#include "kernels/attention_decode_launch.h"
#include "kernels/device_attributes.h"

namespace lockstep::kernels::decode {

class Spread {
 public:
  // Asks the current device. kernel: any of which kMost fit but for their shared memory, and which
  // may have LargestBytes() of it.
  cudaError_t Init(Kernel kernel) {
    for (int count = 1; count < kMost; ++count) {
      room_[count][0] = count * SmCount();
      for (int log2 = 1; HasClusters() && log2 < kShifts; ++log2) {
        cudaLaunchAttribute attribute = {};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {1u << log2, 1, 1};
        cudaLaunchConfig_t config = {};
        config.gridDim = 1024u << log2;
        config.blockDim = kThreads;
        config.dynamicSmemBytes = BytesFor(count);
        config.attrs = &attribute;
        config.numAttrs = 1;
        int clusters = 0;
        const cudaError_t status = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
        if (status != cudaSuccess) return status;
        room_[count][log2] = clusters << log2;
      }
    }
    return cudaSuccess;
  }

  // What each of `blocks` in clusters of 1 << cluster_shift is to have at least, where `most` of
  // them fit a multiprocessor: 0 if all of those are needed.
  size_t Bytes(int blocks, int cluster_shift, int most) const {
    for (int count = 1; count < std::min(most, kMost); ++count)
      if (room_[count][cluster_shift] >= blocks) return BytesFor(count);
    return 0;
  }
  static size_t LargestBytes() { return BytesFor(1); }

 private:
  static constexpr int kMost = 4, kShifts = 5;
  static_assert(1 << (kShifts - 1) == kMaxCluster);

  // So that not one more than `count` fit.
  static size_t BytesFor(int count) {
    constexpr int kUnit = 1024;  // that shared memory is given out in, or a multiple
    static const int all = DeviceAttribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, 0);
    static const int reserved = DeviceAttribute(cudaDevAttrReservedSharedMemoryPerBlock, 0);
    return static_cast<size_t>(std::max(all / (count + 1) - reserved, 0) / kUnit + 1) * kUnit;
  }

  int room_[kMost][kShifts] = {};  // blocks that run at a time if so many fit a multiprocessor
};

}  // namespace lockstep::kernels::decode

#endif  // LOCKSTEP_KERNELS_ATTENTION_DECODE_SPREAD_H_
