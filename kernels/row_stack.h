// Every layer of one decoded row in one kernel: QKV, attention, its output, the MLP and
// the head, from the embedded row to its logits. A block an SM streams its share of all
// the weights through its warps' rings in shared memory. What it waits for in between, sums of
// other blocks and of other ranks, it waits for with the ring filling up behind it, so
// that device memory is read without a break from the first layer to the last.
//
//   x = residual                                  fp32 between reading and one rounding
//   every layer:
//     qkv       = W_qkv . rms(x)                  one rounding to `type`, like the rest
//     heads     = attention(rotary(q), cache + rotary(k), v)
//     x        += sum over ranks (W_o . heads)
//     activated = act(W_gate . rms(x)) * (W_up . rms(x))
//     x        += sum over ranks (W_down . activated)
//   logits = W_head . rms(x)                      fp32
//
// Blocks hand their results to each other, and ranks theirs (kernels/gemv.h's exchange,
// numbers 0 .. 2 * layers - 1), as words in device memory of which each is its own flag:
// no barrier of the grid, no fence. All blocks must be on the device at once: at most
// one block an SM, and nothing else that stays.
//
// Deterministic: sums are formed in an order that only the shapes and, for attention, the
// position decide. Bytes moved: the weights and the row's part of the KV cache, once.
#ifndef LOCKSTEP_KERNELS_ROW_STACK_H_
#define LOCKSTEP_KERNELS_ROW_STACK_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/gemv.h"
#include "kernels/types.h"

namespace lockstep::kernels {

inline constexpr int kMaxStackLayers = 128;

// Row-major [n][k]; of e4m3 with a scale a row.
struct StackMatrix {
  const void* weights = nullptr;
  const float* scales = nullptr;
};

struct StackLayer {
  StackMatrix qkv, o, gate_up, down;  // gate_up: rows of both in turn, gate first
  const void* attention_norm = nullptr;
  const void* mlp_norm = nullptr;
  KvLayer kv = {};
  const float2* rotary = nullptr;  // [positions, head_dim / 2] cosine, sine; null: none
  float scale = 1.0f;              // of q . k
  int window = 0;  // positions seen, the row's own included; 0: all; the same in all layers
};

struct RowStackArgs {
  Type type = Type::kBF16;         // kBF16 or kF16
  Type weight_type = Type::kBF16;  // of the layers: `type` or kE4M3; the head is of `type`
  int hidden = 0, heads = 0, intermediate = 0, vocab = 0;  // of this rank
  GemvEpilogue gate = GemvEpilogue::kSiluGate;             // or kGeluGate
  float norm_eps = 1e-5f;
  bool norm_plus_one = false;
  const StackLayer* layers = nullptr;  // [num_layers], host memory, copied into the launch
  int num_layers = 0;                  // even: see GemvExchange
  const void* final_norm = nullptr;
  const void* head = nullptr;  // [vocab][hidden]

  StepRows rows = {};              // row 0; slot -1: nothing is computed, on no rank
  const void* residual = nullptr;  // [hidden], the embedded row
  float* logits = nullptr;         // [vocab]

  const GemvExchange* exchange = nullptr;  // of `hidden` elements
  void* workspace = nullptr;               // RowStackBytes, by ClearRowStack before the first
                                           // launch and after a failed one
  int max_blocks = 0;                      // 0: one an SM. Fewer where ranks share a GPU
};

// Whether these shapes can be served: multiples of 8, K up to 16,384,
// hidden up to 8,192; head_dim 64 or 128, up to 8 query heads a KV head, KV of `type` or
// kE4M3, blocks of a power of two of 16 positions and more, 16-byte aligned. Pointers that
// differ from step to step need not be set yet.
bool RowStackSupports(const RowStackArgs& args);

size_t RowStackBytes(const RowStackArgs& args);
cudaError_t ClearRowStack(const RowStackArgs& args, cudaStream_t stream);

// Loads the kernels on the current device. Once, before the first launch or capture.
cudaError_t InitRowStack();

// cudaErrorInvalidValue: RowStackSupports is false.
cudaError_t RowStack(const Launch& launch, const RowStackArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_ROW_STACK_H_
