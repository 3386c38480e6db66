// out = activation(gate) * up, or activation(x) where the MLP has no gate.
// fp32 between reading and one rounding; exp, erf and division at full fp32
// accuracy for T = f32. Bytes a row: 3 (2) * width * sizeof(T).
#ifndef LOCKSTEP_KERNELS_ACTIVATION_H_
#define LOCKSTEP_KERNELS_ACTIVATION_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/types.h"

namespace lockstep::kernels {

enum class GateLayout : uint8_t {
  kNone,         // in: [width]
  kHalves,       // in: [gate: width | up: width]
  kInterleaved,  // in: gate 0, up 0, gate 1, up 1, ... of 2 * width
};

struct ActivateArgs {
  Type type = Type::kBF16;
  Activation activation = Activation::kSilu;
  GateLayout layout = GateLayout::kHalves;
  int num_rows = 0;
  int width = 0;                  // of the output
  const int32_t* slot = nullptr;  // [num_rows]; rows of slot -1 are skipped; null: none
  const void* in = nullptr;       // [num_rows, in_stride]
  int64_t in_stride = 0;          // elements
  ProductScales in_scales = {};   // its columns laid out as a row of `in`
  const void* bias = nullptr;     // of T, laid out as a row of `in`; or null
  void* out = nullptr;            // [num_rows, out_stride]; may be `in` for kNone and kHalves
  int64_t out_stride = 0;
  // Instead of `out`, which is then not written: types of 16 bits, width at most
  // 32768 and a multiple of 16, addresses of 16 bytes; else cudaErrorInvalidValue. Its scales may
  // be in_scales.rows.
  QuantizedRows quantized = {};
};
cudaError_t Activate(const Launch& launch, const ActivateArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_ACTIVATION_H_
