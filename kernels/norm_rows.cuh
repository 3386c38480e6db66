// What the two kernels of norm.h share: their argument, and which of them runs.
#ifndef LOCKSTEP_KERNELS_NORM_ROWS_CUH_
#define LOCKSTEP_KERNELS_NORM_ROWS_CUH_

#include "kernels/norm.h"
#include "kernels/vector.cuh"

namespace lockstep::kernels {

// The chain of norm.h; what is null or kNone is not there.
struct RowArgs {
  int hidden = 0;
  const int32_t* slot = nullptr;
  const void* x = nullptr;
  ProductScales x_scales = {};
  float scale = 1.0f;
  const void* bias = nullptr;
  NormSpec post = {};
  const void* residual_in = nullptr;
  const void* position_table = nullptr;
  const int32_t* position = nullptr;
  int position_offset = 0;
  void* residual_out = nullptr;
  NormSpec next = {};
  bool norm_is_residual = false;
  void* normed = nullptr;
  QuantizedRows quantized = {};
};

// Most layers of most models need no more of the chain than
//
//   residual += x;  normed = rms(residual)      -> T, e4m3, or both
//
// for which a kernel a quarter as long exists. False: not this row.
bool IsPlain(Type type, const RowArgs& args);
cudaError_t LaunchPlain(const Launch& launch, Type type, int num_rows, const RowArgs& args);

// Whether all of a row may be accessed 16 bytes at a time.
bool IsWide(Type type, const RowArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_NORM_ROWS_CUH_
