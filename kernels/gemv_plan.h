// How a decode product is cut up: inside of kernels/gemv.h, for its kernels, their
// tests and their benchmark.
#ifndef LOCKSTEP_KERNELS_GEMV_PLAN_H_
#define LOCKSTEP_KERNELS_GEMV_PLAN_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/gemv.h"

namespace lockstep::kernels {

inline constexpr int kGemvWarps = 8;
inline constexpr int kGemvThreads = kGemvWarps * 32;
inline constexpr int kMaxGemvStages = 24;
// Of a block; more than half an SM's, so that one SM never holds two: blocks of the
// next kernel that were launched early would pile up on some of them.
inline constexpr size_t kMinGemvShared = 118 << 10;
inline constexpr size_t kMaxGemvShared = 223 << 10;

// One row (m == 1). A weight row is dealt to `split` warps, each of which takes
// `vectors` pieces of 32 lanes x 16 bytes; a stage is kStageVectors pieces of each of
// them, which is kStageVectors / vectors rows, or one. `stages` is a multiple of the
// groups of warps, so that a slot always belongs to one group.
inline constexpr int kStageVectors = 8;
constexpr int StageRows(int vectors) {
  return vectors < kStageVectors ? kStageVectors / vectors : 1;
}
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

// 2..16 rows. Weight rows go by tiles of 16. K is dealt to the warps, and where that
// is more than they hold of x, to phases: a warp's part is `pieces` chunks of 64 bytes
// of a weight row, and that part of a tile is a stage, of which a warp has `depth`.
inline constexpr int kSkinnyPieces = 16;  // a warp's at most; of e4m3 half of it
struct SkinnyPlan {
  int phases = 1;
  int pieces = 0;
  int depth = 0;
  size_t row_stride = 0;  // of a stage, bytes
  size_t stage_bytes = 0;
  size_t shared_bytes = 0;
  int blocks = 0;
};

RowPlan PlanRow(const GemvArgs& args, int sm_count);
SkinnyPlan PlanSkinny(const GemvArgs& args, int sm_count);

// One translation unit per weight type.
template <typename W, typename T>
cudaError_t LaunchRow(const Launch& launch, const GemvArgs& args, const RowPlan& plan);
template <typename W, typename T>
cudaError_t InitRow();
template <typename W, typename T>
cudaError_t LaunchSkinny(const Launch& launch, const GemvArgs& args, const SkinnyPlan& plan);
template <typename W, typename T>
cudaError_t InitSkinny();

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_GEMV_PLAN_H_
