// Rounds of exchanges whose inputs are made, and whose results are checked, on
// the device: a stale slot or a torn message shows as an error in the count.
#ifndef LOCKSTEP_TESTS_KERNELS_EXCHANGE_ROUNDS_H_
#define LOCKSTEP_TESTS_KERNELS_EXCHANGE_ROUNDS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/all_reduce.h"

namespace lockstep::kernels::testing {

struct RoundsProgress {
  unsigned long long round, errors;
  unsigned long long digest;  // of the results' bits; the same on every rank
};

// Device memory of one rank.
struct RoundsBuffers {
  static constexpr size_t kBytes = 2 << 20;         // of in, residual and out
  static constexpr size_t kWeightBytes = 64 << 10;  // filled by the caller
  void* in = nullptr;
  void* residual = nullptr;
  void* out = nullptr;
  void* weight = nullptr;
  RoundsProgress* progress = nullptr;  // zeroed by the caller
};

// Fits every message of the rounds.
inline constexpr ExchangeLayout kRoundsLayout{
    .offset = 256, .one_shot_bytes = 1 << 20, .two_shot_bytes = 2 << 20};

// Enqueues every kind of exchange, an odd number of times each, so that the next
// call begins in the other slot. type: kF32 or kBF16. threads: of all blocks of a
// grid at once. *rounds: by how much progress->round grows.
cudaError_t EnqueueRounds(const Launch& launch, const Peers& peers, const ExchangeLayout& layout,
                          Type type, int threads, const RoundsBuffers& buffers, int* rounds);

}  // namespace lockstep::kernels::testing

#endif  // LOCKSTEP_TESTS_KERNELS_EXCHANGE_ROUNDS_H_
