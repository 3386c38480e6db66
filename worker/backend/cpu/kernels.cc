#include "worker/backend/cpu/kernels.h"

namespace lockstep::cpu {

#if defined(__x86_64__)
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx2Kernels;
#endif
extern const Kernels kGenericKernels;

std::vector<const Kernels*> AvailableKernels() {
  std::vector<const Kernels*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    sets.push_back(&kAvx512Kernels);
  }
  // Every processor with AVX2 and FMA3 has F16C too.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    sets.push_back(&kAvx2Kernels);
  }
#endif
  sets.push_back(&kGenericKernels);
  return sets;
}

const Kernels& BestKernels() {
  static const Kernels& best = *AvailableKernels().front();
  return best;
}

int64_t PackedScratchFloats(const Kernels& kernels, int64_t k, int64_t slices) {
  int64_t levels = 1;
  for (int64_t s = slices; s > 1; s = (s + 1) / 2) ++levels;
  const int64_t block = kernels.block_m * kernels.block_n;
  return kernels.block_n * PackedK(k, slices) + block * kLanes + levels * block;
}

}  // namespace lockstep::cpu
