// How a decode product is cut up: inside of kernels/gemv.h, for its kernels, their
// tests and their benchmark.
#ifndef LOCKSTEP_KERNELS_GEMV_PLAN_H_
#define LOCKSTEP_KERNELS_GEMV_PLAN_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/gemv.h"

namespace lockstep::kernels {

inline constexpr int kGemvWarps = 8;  // that compute; one more requests weights
inline constexpr int kGemvThreads = (kGemvWarps + 1) * 32;
inline constexpr int kSkinnyThreads = kGemvWarps * 32;  // which request their own
inline constexpr int kMaxGemvStages = 24;
// Of a block; more than half an SM's, so that one SM never holds two: blocks of the
// next kernel that were launched early would pile up on some of them.
inline constexpr size_t kMinGemvShared = 118 << 10;
inline constexpr size_t kMaxGemvShared = 223 << 10;

// One row (m == 1). A weight row is dealt to `split` warps, each of which takes
// `vectors` pieces of 32 lanes x 16 bytes; a stage holds kGemvWarps / split rows.
struct RowPlan {
  int unit = 1;  // rows that stay in one block
  int split = 1;
  int vectors = 0;  // an instantiated capacity; 0: not supported
  int stages = 0;
  size_t stage_bytes = 0;
  size_t shared_bytes = 0;
  int blocks = 0;
};
// Rows whose sums wait for the epilogue.
inline constexpr int kRowChunk = 512;

// 2..16 rows. Weight rows go by tiles of 16. K is dealt to `cluster` blocks and, in
// each, to `split` warps; a warp's piece is `pieces` chunks of 64 bytes of each row
// of a tile, which is one stage.
struct SkinnyPlan {
  int cluster = 1;
  int split = 1;
  int pieces = 0;    // per warp; 0: not supported
  int capacity = 0;  // the instantiation's pieces
  int stages = 0;
  size_t stage_bytes = 0;
  size_t row_stride = 0;  // of a stage, bytes
  size_t shared_bytes = 0;
  int blocks = 0;
};
// Tiles of a cluster whose sums wait to be added up across its blocks.
inline constexpr int kSkinnySumBytes = 32 << 10;

RowPlan PlanRow(const GemvArgs& args, int sm_count);
// cluster, split: 0, or what a benchmark wants to try.
SkinnyPlan PlanSkinny(const GemvArgs& args, int sm_count, int cluster, int split);

// One translation unit per weight type.
template <typename W, typename T>
cudaError_t LaunchRow(const Launch& launch, const GemvArgs& args, const RowPlan& plan);
template <typename W, typename T>
cudaError_t InitRow();
template <typename W, typename T>
cudaError_t LaunchSkinny(const Launch& launch, const GemvArgs& args, const SkinnyPlan& plan);
template <typename W, typename T>
cudaError_t InitSkinny();

// As Gemv chooses for args.m > 1, but with the given plan.
cudaError_t GemvWithPlan(const Launch& launch, const GemvArgs& args, const SkinnyPlan& plan);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_GEMV_PLAN_H_
