// Matrix products by cuBLASLt: everything that kernels/gemv.h does not take. The
// library is opened at run time, so that a worker starts, and says what is
// missing, on a machine that has none.
//
// Not thread-safe. A product's algorithm is chosen once for its shape and kept:
// call it for a shape before a graph is captured with it, or in the capture.
#ifndef LOCKSTEP_WORKER_BACKEND_CUDA_LT_MATMUL_H_
#define LOCKSTEP_WORKER_BACKEND_CUDA_LT_MATMUL_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/types.h"

namespace lockstep::cuda {

// out[m][n] = x[m][k] . weights[n][k]
struct MatmulArgs {
  int m = 0, n = 0, k = 0;
  kernels::Type type = kernels::Type::kBF16;      // of x and weights
  kernels::Type out_type = kernels::Type::kBF16;  // kF32, or `type` (kE4M3: kBF16 or kF16)
  const void* x = nullptr;
  int64_t x_stride = 0;  // elements
  const void* weights = nullptr;
  void* out = nullptr;
  int64_t out_stride = 0;
  // Of kE4M3; both or neither: then out is as if all were 1.
  const float* x_scales = nullptr;       // [m]
  const float* weight_scales = nullptr;  // [n]
  int multiprocessors = 0;               // to be used; 0: all
  // Room for [kernels::kProductParts][m][n], 16-byte aligned, if `out` need not be written but may
  // be left in parts; null: it may not.
  float* parts = nullptr;
};

class LtMatmul {
 public:
  static constexpr size_t kWorkspaceBytes = 64 << 20;

  // NotFound: no libcublasLt.so.13 here.
  static absl::StatusOr<std::unique_ptr<LtMatmul>> Create();
  ~LtMatmul();

  // Whether it is left in args.parts.
  absl::StatusOr<bool> Run(cudaStream_t stream, const MatmulArgs& args);
  // While on, the algorithm of a shape of 16 bits or e4m3 and more than 32 rows that comes up for
  // the first time is the fastest of some, by trying, in parts too where it may be: a few
  // milliseconds, in which args.out and args.parts are written. Nothing that uses them may be
  // under way; a capture may. Without, a product is not left in parts.
  void TimeNewShapes(bool on);
  std::string version() const;  // "cuBLASLt 13.1.0"

 private:
  struct Impl;
  explicit LtMatmul(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep::cuda

#endif  // LOCKSTEP_WORKER_BACKEND_CUDA_LT_MATMUL_H_
