#include "worker/gpu.h"

namespace lockstep {

absl::StatusOr<std::unique_ptr<Gpu>> Gpu::Open(int) {
  return absl::UnimplementedError(
      "--backend cuda: this build has the cpu backend alone (configure with -DLOCKSTEP_CUDA=ON)");
}

}  // namespace lockstep
