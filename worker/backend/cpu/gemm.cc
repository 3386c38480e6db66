#include "worker/backend/cpu/gemm.h"

#include <algorithm>

#include "common/check.h"

namespace lockstep::cpu {
namespace {

// Rows from which packing pays: it costs each weight a load and a store, beside
// one multiply-add a row.
constexpr int64_t kPackedRows = 16;
// Weights a thread takes at a time: long enough to stream, short enough to deal.
constexpr int64_t kDirectBlockBytes = 256 * 1024;

int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace

void GemmWorkspace::Reserve(int64_t m, int64_t k, int64_t slices) {
  if (m < kPackedRows) return;
  const auto grow = [](std::vector<float>& buffer, int64_t floats) {
    if (static_cast<int64_t>(buffer.size()) < floats) buffer.resize(floats);
  };
  grow(packed_x_, RoundUp(m, kernels_.tile_m) * PackedK(k, slices));
  for (auto& scratch : scratch_) grow(scratch, PackedScratchFloats(kernels_, k, slices));
}

int64_t GemmWorkspace::bytes() const {
  size_t floats = packed_x_.size();
  for (const auto& scratch : scratch_) floats += scratch.size();
  return static_cast<int64_t>(floats * sizeof(float));
}

void Gemm(const Kernels& kernels, ThreadPool& pool, GemmWorkspace& workspace, const float* x,
          int64_t ldx, int64_t m, const WeightTensor& w, int64_t slices, float* y, int64_t ldy) {
  const int64_t n = w.rows, k = w.cols;
  LOCKSTEP_CHECK(slices >= 1 && k % slices == 0);
  if (m == 0) return;
  const int64_t row_bytes = k * DTypeBytes(w.dtype);

  if (m < kPackedRows) {
    const int64_t block =
        RoundUp(std::clamp<int64_t>(kDirectBlockBytes / row_bytes, 1, 1024), kernels.tile_n * 2);
    pool.ParallelFor((n + block - 1) / block, [&](int64_t b, int) {
      const int64_t first = b * block;
      kernels.gemm_direct({.x = x,
                           .ldx = ldx,
                           .m = m,
                           .w = w.data + first * row_bytes,
                           .dtype = w.dtype,
                           .ldw = k,
                           .n = std::min(block, n - first),
                           .k = k,
                           .slices = slices,
                           .y = y + first,
                           .ldy = ldy});
    });
    return;
  }

  workspace.Reserve(m, k, slices);
  const int64_t packed_k = PackedK(k, slices);
  const int64_t tile = kernels.tile_m;
  float* packed = workspace.packed_x_.data();
  pool.ParallelFor((m + tile - 1) / tile, [&](int64_t panel, int) {
    const int64_t first = panel * tile;
    kernels.pack(x + first * ldx, ldx, std::min(tile, m - first), k, slices,
                 packed + first * packed_k);
  });
  const int64_t block = kernels.block_n;
  pool.ParallelFor((n + block - 1) / block, [&](int64_t b, int thread) {
    const int64_t first = b * block;
    kernels.gemm_packed({.packed_x = packed,
                         .m = m,
                         .w = w.data + first * row_bytes,
                         .dtype = w.dtype,
                         .ldw = k,
                         .n = std::min(block, n - first),
                         .k = k,
                         .slices = slices,
                         .y = y + first,
                         .ldy = ldy,
                         .scratch = workspace.scratch_[thread].data()});
  });
}

}  // namespace lockstep::cpu
