// What the kernel of kernels/row_stack.h is told, and how its work is dealt out.
#ifndef LOCKSTEP_KERNELS_ROW_STACK_PLAN_H_
#define LOCKSTEP_KERNELS_ROW_STACK_PLAN_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attention_factors.h"
#include "kernels/exchange_words.cuh"
#include "kernels/row_stack.h"

namespace lockstep::kernels::stack {

inline constexpr int kWarps = 8;
inline constexpr int kThreads = kWarps * 32;  // that compute
// And warps that request what those read, each for two of them.
inline constexpr int kLaunched = kThreads + kWarps / 2 * 32;
inline constexpr int kPieceBytes = 4096;  // of weights or of the cache: a slot of a warp's ring
inline constexpr int kMaxDepth = 7;       // slots of a warp's ring
inline constexpr int kWindow = 4;         // of those, on their way at a time
inline constexpr int kTile = 16;          // positions of a piece of the cache
inline constexpr int kMaxShares = 32;     // blocks that share a KV head's context: a warp's lanes
inline constexpr int kMaxGroup = 8;       // query heads of a KV head
inline constexpr int kPartials = 8;       // of a row, that a warp hands on instead of their sum
inline constexpr int kMostSums = 4096;    // floats that wait for an epilogue
inline constexpr int kRowVectors = 4;     // 16-byte vectors of the row for each thread

// A layer's steps in their order, then the head. All but kCache, the reading of the cache,
// are products.
enum Step { kQkv, kCache, kOutput, kGateUp, kDown, kHead, kDone };

// A weight row goes by vectors of 32 lanes x 16 bytes, `count` of them to each of `parts`
// warps, of 1 << split_log2 that share a row; `capacity`, an instance of the code, is 4 or 8. A
// piece is 8 / capacity rows of a warp's part.
struct ProductPlan {
  int rows;  // of this rank
  int row_bytes;
  int unit;              // rows that stay in one block
  int share, remainder;  // units of a block; the first `remainder` blocks have one more
  int split_log2, parts, count, capacity;
};
constexpr int PieceRows(int capacity) { return 8 / capacity; }

struct Layer {
  const uint8_t* weights[kHead];  // by step
  const float* scales[kHead];
  const void* norms[2];  // attention, MLP
  void *k, *v;
  const float2* rotary;
  AttentionFactors factors;
};

// Results of blocks on their way to other blocks; two of each, for layers in turn.
struct Words {
  uint32_t* qkv[2];         // [qkv width / 2] pairs of T
  uint32_t* heads[2];       // [q width / 2]
  uint32_t* activated[2];   // [intermediate / 2]
  uint32_t* partials[2];    // [shares][q width] floats
  uint32_t* statistics[2];  // [shares][heads][2] floats: largest score, sum
};

struct Params {
  int num_layers, hidden, heads, kv_heads, head_dim, group, intermediate;
  int blocks, max_shares;
  int depth, window;  // slots of a warp's ring; of those, how many are on their way at most
  int block_shift;
  int seen;  // positions, the row's own included; 0: all
  float eps, weight_offset;
  GemvEpilogue gate;
  ProductPlan products[kDone];
  const uint8_t* head;
  const void* final_norm;
  float* logits;
  const void* residual;
  StepRows rows;
  Words words;
  ExchangeWords exchange;
  size_t x_bytes;  // of shared memory for a row and its sums, or attention's results
  int sums_at;     // in that
  int sums;        // floats, of kPartials a row and part of K
  int halves;      // bytes from the even vectors of a row of f16 to the odd ones: see Shared
  Layer layers[kMaxStackLayers];
};
static_assert(sizeof(Params) < 32'000, "a kernel's parameters end at 32,764 bytes");

// Dynamic; the barriers and what a block takes anyway make up an SM's 228 KiB.
inline constexpr size_t kMaxStackShared = (227 << 10) - 2048;
// Rows of a product that are worked on before their sums are added up.
constexpr int RowsOfChunk(const Params& p, int split_log2) {
  return p.sums / kPartials >> split_log2;
}
// Shared memory: rings | row, partial sums, sums; or attention's results | residual.
constexpr size_t SumsBytes(int sums) { return sizeof(float) * (sums + sums / kPartials); }
constexpr size_t SharedBytes(const Params& p) {
  return size_t{kWarps} * p.depth * kPieceBytes + p.x_bytes + size_t{2} * p.hidden;
}
// Attention in the row's place: query, the row's own k and v, then of each warp its
// heads' outputs, and all their statistics.
constexpr int OutStride(int head_dim) { return head_dim + 8; }
constexpr size_t AttentionBytes(int group, int head_dim) {
  return size_t{2} * (group + 2) * head_dim +
         sizeof(float) * kWarps * group * (OutStride(head_dim) + 2);
}

// One translation unit a pair of types. kv_e4m3: what the cache holds.
template <typename W, typename T>
cudaError_t LaunchStack(const Launch& launch, bool kv_e4m3, int head_dim, const Params& params);
template <typename W, typename T>
cudaError_t InitStack();

}  // namespace lockstep::kernels::stack

#endif  // LOCKSTEP_KERNELS_ROW_STACK_PLAN_H_
