// What every kernel family shares with the code that calls it: element types,
// where and how a launch goes, one layer's KV cache. Plain C++: compiled by nvcc
// and by the host compiler alike.
#ifndef LOCKSTEP_KERNELS_TYPES_H_
#define LOCKSTEP_KERNELS_TYPES_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace lockstep::kernels {

enum class Type : uint8_t { kF32, kF16, kBF16, kE4M3 };

constexpr size_t TypeBytes(Type type) {
  switch (type) {
    case Type::kF32:
      return 4;
    case Type::kF16:
    case Type::kBF16:
      return 2;
    case Type::kE4M3:
      return 1;
  }
  return 0;
}

// As model/model_config.h's: x * sigmoid(x); gelu by tanh; gelu by erf; max(0, x).
enum class Activation : uint8_t { kSilu, kGeluTanh, kGelu, kRelu };

// Where a kernel is enqueued. pdl: it may start before the kernel ahead of it in
// the stream has ended (programmatic dependent launch); each kernel waits for
// that one itself before it reads or overwrites anything of it.
// brief: among kernels of a few microseconds. An SM that divides its memory anew
// between two kernels first runs empty, so all of these divide it as the largest
// do. A kernel that streams for long needs the L1 for loads in flight more.
struct Launch {
  cudaStream_t stream = nullptr;
  bool pdl = false;
  bool brief = false;
};

// The KV cache of one layer on one rank: k and v are each
// [blocks][kv_heads][block_size][head_dim] of `type`.
struct KvLayer {
  void* k = nullptr;
  void* v = nullptr;
  Type type = Type::kBF16;
  int kv_heads = 0;
  int block_size = 16;
  int head_dim = 0;
  // For kE4M3: value = stored * scale.
  float k_scale = 1.0f;
  float v_scale = 1.0f;
};

// Rows of e4m3 with a scale each (value = stored * scale), where they are wanted
// beside or instead of rows of T: the very values that QuantizeRows of those
// would give.
struct QuantizedRows {
  void* values = nullptr;   // [rows, width] e4m3, contiguous; null: not wanted
  float* scales = nullptr;  // [rows]
};

// What a product of e4m3 has left to whoever reads it: element [r][c] of what it made, in bf16,
// stands for itself times rows[r] * columns[c]. Both, 16-byte aligned, or neither.
struct ProductScales {
  const float* rows = nullptr;     // [rows]
  const float* columns = nullptr;  // [columns]
};
// Whether a kernel can take them with elements of `type`.
constexpr bool Scalable(const ProductScales& scales, Type type) {
  return scales.rows == nullptr || (scales.columns != nullptr && type == Type::kBF16);
}
// Where a product is left in parts it is the sum of so many, each of a part of K: fp32
// [parts][rows][columns].
constexpr int kProductParts = 2;

// Which positions a step's rows are, on the device, at addresses that do not
// change from step to step (CUDA graphs read them).
struct StepRows {
  const int32_t* slot = nullptr;         // [rows]; -1: padding, computes nothing
  const int32_t* position = nullptr;     // [rows]
  const int32_t* block_table = nullptr;  // [slots][table_stride], block ids
  int table_stride = 0;
};

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_TYPES_H_
