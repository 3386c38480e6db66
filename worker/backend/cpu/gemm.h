// y = x w^T over the threads of a pool: rows of w are dealt out in blocks. Picks
// the direct or the packed form by the number of rows; both do the same
// arithmetic, bit for bit (kernels.h).
//
// An own product and not a BLAS: a BLAS sums a row in an order that changes with
// the number of rows, so a token's value would depend on its batch mates, and a
// replay would not repeat it. bench_gemm prints what that costs.
#ifndef LOCKSTEP_WORKER_BACKEND_CPU_GEMM_H_
#define LOCKSTEP_WORKER_BACKEND_CPU_GEMM_H_

#include <cstdint>
#include <vector>

#include "worker/backend/cpu/kernels.h"
#include "worker/thread_pool.h"
#include "worker/weights.h"

namespace lockstep::cpu {

// Memory of the packed form, sized once. Not thread-safe.
class GemmWorkspace {
 public:
  GemmWorkspace(const Kernels& kernels, int threads) : kernels_(kernels), scratch_(threads) {}

  // Makes room for products of up to m rows over k in `slices`.
  void Reserve(int64_t m, int64_t k, int64_t slices);
  int64_t bytes() const;

 private:
  friend void Gemm(const Kernels&, ThreadPool&, GemmWorkspace&, const float*, int64_t, int64_t,
                   const WeightTensor&, int64_t, float*, int64_t);
  const Kernels& kernels_;
  std::vector<float> packed_x_;
  std::vector<std::vector<float>> scratch_;  // per thread
};

// x: [m, w.cols], rows ldx apart. y: [m, w.rows], rows ldy apart.
void Gemm(const Kernels& kernels, ThreadPool& pool, GemmWorkspace& workspace, const float* x,
          int64_t ldx, int64_t m, const WeightTensor& w, int64_t slices, float* y, int64_t ldy);

}  // namespace lockstep::cpu

#endif  // LOCKSTEP_WORKER_BACKEND_CPU_GEMM_H_
