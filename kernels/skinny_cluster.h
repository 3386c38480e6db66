// A few rows times a large matrix, 2 to 64 of them: out[m][n] = epilogue(x[m][k] .
// weights[n][k]). What kernels/gemv.h is for one row; here x is too large for every SM
// to read all of it, so a cluster of blocks shares a product: each has a part of K.
//
// Tensor cores (wgmma) read weights and x from shared memory as they arrived, so e4m3
// weights want x as e4m3 too, with a scale a row of either: kernels/quantize.h. Up to 16 rows of 16
// bits are quantised as they are staged, each block's part of a row with a scale of its own, which
// spares a kernel ahead.
//
// fp32 sums; those of e4m3, which the tensor cores add with fewer bits, leave them
// every 512 elements. Deterministic. A row's result depends on n, k, the types and on
// whether m is up to 16, 32 or 64, but not on the other rows.
//
// Weights are constants: they are requested before the wait for the kernel ahead.
// Hopper only (sm_90a), as Supports says.
//
//   SkinnyClusterArgs args = {.weights = w, .n = 6144, .k = 4096, .m = 16, .x = normed,
//                             .out = qkv};
//   if (SkinnyClusterSupports(args)) status = SkinnyCluster(launch, args);
#ifndef LOCKSTEP_KERNELS_SKINNY_CLUSTER_H_
#define LOCKSTEP_KERNELS_SKINNY_CLUSTER_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/all_reduce.h"
#include "kernels/gemv.h"
#include "kernels/types.h"

namespace lockstep::kernels {

// Whose sums a product sends to the other ranks itself.
inline constexpr int kMaxPushedRows = 32;

struct SkinnyClusterArgs {
  const void* weights = nullptr;  // [n][k], 16-byte aligned
  Type type = Type::kBF16;        // of weights and x: kBF16, kF16 or kE4M3
  int n = 0;
  int k = 0;  // rows of a multiple of 16 bytes

  int m = 0;
  const void* x = nullptr;               // [m][k], rows x_stride elements apart, 16-byte aligned
  int64_t x_stride = 0;                  // 0: k; a multiple of 16 bytes
  const float* weight_scales = nullptr;  // [n], kE4M3 only
  const float* x_scales = nullptr;       // [m], kE4M3 only; null: x is of out_type

  // kPush, of up to kMaxPushedRows: into every rank's region by `push`, for an all-reduce that is
  // told so; n a multiple of 8, no bias.
  GemvEpilogue epilogue = GemvEpilogue::kStore;
  ExchangePush push = {};
  Type out_type = Type::kBF16;  // kBF16 or kF16, `type` unless that is kE4M3; kLogits: fp32
  void* out = nullptr;
  int64_t out_stride = 0;      // 0: the row's width
  const void* bias = nullptr;  // [n] of out_type, kStore only; or nullptr

  int split = 0;  // blocks that share K: 2, 4 or 8; 0: what fits the shape
};

// Loads the kernels on the current device and asks how many clusters it holds. Once,
// before the first launch or capture.
cudaError_t InitSkinnyCluster();

bool SkinnyClusterSupports(const SkinnyClusterArgs& args);

// cudaErrorInvalidValue: SkinnyClusterSupports is false.
cudaError_t SkinnyCluster(const Launch& launch, const SkinnyClusterArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_SKINNY_CLUSTER_H_
