// Few rows times a large matrix: out[m][n] = epilogue(prologue(x)[m][k] . weights[n][k]),
// the product of decoding. Bound by reading the weights once, so that is what the
// kernels are built around: one thread block an SM streams its share of the weight
// rows through a ring in shared memory, and requests the first 110-200 KB of them
// before it waits for the kernel ahead of it.
//
//   m == 1        every lane a dot product of its own, fp32 sums (gemv_row.cuh): FMA units;
//                 e4m3 on tensor cores, x there as f16 times a power of two
//   2 <= m <= 16  tensor cores, fp32 sums (skinny.cuh); a row's result does not
//                 depend on m nor on the other rows
//
// Deterministic: sums are formed in an order that only n, k, the weight type and
// m == 1 or not decide. Row-major weights, 16-byte aligned; e4m3 weights carry one
// fp32 scale a row, which multiplies the finished sum.
//
// Weights, scales, biases and norm weights are constants: read before the wait.
//
//   GemvArgs args = {.weights = w, .weight_type = Type::kBF16, .n = 6144, .k = 4096,
//                    .type = Type::kBF16, .x = normed, .out = qkv};
//   if (GemvSupports(args)) status = Gemv(launch, args);
#ifndef LOCKSTEP_KERNELS_GEMV_H_
#define LOCKSTEP_KERNELS_GEMV_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/peers.h"
#include "kernels/types.h"

namespace lockstep::kernels {

// What is done to x on the way in. All but kPlain: m == 1.
enum class GemvPrologue : uint8_t {
  kPlain,
  // x * rsqrt(mean(x^2) + eps) * (norm_weight [+ 1]), rounded once to `type`.
  kRmsNorm,
  // The second half of an all-reduce: the sum over ranks, in rank order and fp32, of
  // what they pushed for `exchange`, + residual_in -> rounded -> residual_out; its
  // RMS norm is what multiplies the weights. x is not read.
  kReduce,
};

// What becomes of the sums. A gate's row pairs lie next to each other in the
// weights: row 2i is gate i, row 2i + 1 is up i; n counts both.
enum class GemvEpilogue : uint8_t {
  kStore,     // out[m][n] of `type`, + bias where given
  kSiluGate,  // out[m][n / 2] = silu(gate) * up, of `type`
  kGeluGate,  // out[m][n / 2] = gelu_tanh(gate) * up, of `type`
  kLogits,    // out[m][n] in fp32; nullptr: not stored. And `keys`, where given
  // The first half of an all-reduce (m == 1, plain prologue, n % 8 == 0): sums
  // rounded to `type` go into every rank's slot of `exchange`.
  kPush,
};

constexpr bool IsGate(GemvEpilogue epilogue) {
  return epilogue == GemvEpilogue::kSiluGate || epilogue == GemvEpilogue::kGeluGate;
}

// The all-reduce that is folded into its neighbours. Its part of a rank's region
// is four slots of [size][width] elements, all ones where nothing has arrived.
//
// Exchanges are numbered: number e lives in slot e % 4, and the kReduce of e makes
// the slot of e - 1 ready again. So all ranks run kPush e, kReduce e, kPush e + 1,
// ... without a gap, also from one step to the next: a captured step whose count
// of exchanges is not a multiple of 4 needs one capture for each start (two, for an
// odd number of layers). After a failed step the region must be cleared anew.
//
// Residuals: residual_in and residual_out are two buffers that change roles from
// one kReduce to the next.
struct GemvExchange {
  Peers peers;        // size 1..8; of 1: only the sum of the step itself crosses
  size_t offset = 0;  // of this part in a region; a multiple of 256
  int width = 0;      // elements of an exchanged row: the hidden size, a multiple of 8
};

size_t GemvExchangeBytes(int size, int width);
// Makes one's own part ready; exchanges begin once every rank knows that it has
// completed everywhere.
cudaError_t ClearGemvExchange(const GemvExchange& exchange, cudaStream_t stream);

struct GemvArgs {
  const void* weights = nullptr;   // [n][k]
  Type weight_type = Type::kBF16;  // `type`, or kE4M3
  const float* scales = nullptr;   // [n]; kE4M3 only
  int n = 0;
  int k = 0;
  Type type = Type::kBF16;  // kBF16 or kF16: of everything not said to be fp32

  int m = 1;
  const void* x = nullptr;  // [m][k], rows x_stride elements apart, 16-byte aligned
  int64_t x_stride = 0;     // a multiple of 8; 0: k
  GemvPrologue prologue = GemvPrologue::kPlain;
  const void* norm_weight = nullptr;  // [k]
  float norm_eps = 1e-5f;
  bool norm_plus_one = false;
  const void* residual_in = nullptr;  // [k]
  void* residual_out = nullptr;       // [k], another buffer

  GemvEpilogue epilogue = GemvEpilogue::kStore;
  void* out = nullptr;         // rows out_stride elements apart
  int64_t out_stride = 0;      // 0: the row's width
  const void* bias = nullptr;  // [n], kStore only; or nullptr
  // kLogits: [m][GemvKeys(args)], the largest logit of each part of n as a word that
  // orders as (value, lower id first): see GemvKey. kPoisonedKey: a NaN or an
  // infinity is among them.
  uint64_t* keys = nullptr;
  int first_id = 0;  // the id of row 0

  const GemvExchange* exchange = nullptr;  // kReduce, kPush
  uint32_t exchange_number = 0;            // of the step; see GemvExchange

  int max_blocks = 0;  // 0: one an SM. Fewer where ranks share a GPU
};

inline constexpr uint64_t kPoisonedKey = ~uint64_t{0};
// High half: the value's bits, made to order as unsigned; low half: ~id.
constexpr uint32_t GemvKeyId(uint64_t key) { return ~static_cast<uint32_t>(key); }

// Loads the kernels and raises their shared memory limits on the current device.
// Once, before the first launch or capture.
cudaError_t InitGemv();

// Whether Gemv takes it; else a general matrix product must. k: a multiple of 8
// (m == 1; of 16 with kE4M3) or of 32 (of 64) up to 32,768; n of a gate even.
bool GemvSupports(const GemvArgs& args);

// Keys a row of kLogits; constant for given n, k, m, weight type and device.
int GemvKeys(const GemvArgs& args);

// cudaErrorInvalidValue: GemvSupports is false.
cudaError_t Gemv(const Launch& launch, const GemvArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_GEMV_H_
