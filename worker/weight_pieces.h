// What loading weights is made of, whatever memory they end in: each slice of a
// shard plan is cut into pieces of about 1 MiB, each found and checked in the
// checkpoint, and copied row by row into the serving dtype.
#ifndef LOCKSTEP_WORKER_WEIGHT_PIECES_H_
#define LOCKSTEP_WORKER_WEIGHT_PIECES_H_

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "model/model_config.h"
#include "model/safetensors.h"
#include "model/shard_plan.h"

namespace lockstep {

// Pieces between two calls of `progress`.
inline constexpr size_t kBatchPieces = 32;

// Some rows of one slice, on their way to rows of a local tensor.
struct WeightPiece {
  const TensorSlice* slice = nullptr;
  const TensorInfo* info = nullptr;  // null: dummy
  const LocalTensor* local = nullptr;
  size_t tensor = 0;       // index of `local` in the plan
  size_t slice_index = 0;  // of `slice` in `local`
  DType to_dtype = DType::kFloat32;
  int64_t first_row = 0;  // of the slice's rows
  int64_t rows = 0;
  int64_t to_row = 0;  // slices stacked by rows
  int64_t cols() const { return local->cols; }
  int64_t bytes() const { return rows * cols() * DTypeBytes(to_dtype); }

  // Where the piece lies in its stored tensor, from its first byte to its last.
  uint64_t stored_begin() const;
  uint64_t stored_end() const;
  int64_t stored_bytes() const { return rows * cols() * DTypeBytes(info->dtype); }
};

// float32, float16, bfloat16.
bool IsWeightDType(DType dtype);

// Cuts every slice of the plan. `dtype_of`: what a local tensor is in memory.
absl::StatusOr<std::vector<WeightPiece>> CutIntoPieces(
    const ShardPlan& plan, absl::FunctionRef<DType(const LocalTensor&)> dtype_of,
    absl::FunctionRef<absl::StatusOr<const TensorInfo*>(const TensorSlice&)> find_info);

// MatchTensor, of a dtype that weights are read from and as many bytes as its shape
// has. takes_fp8: float8_e4m3fn will do as well.
absl::StatusOr<const TensorInfo*> FindChecked(const Checkpoint& checkpoint,
                                              const TensorSlice& slice, bool takes_fp8 = false);

// The scales of a slice that is stored as float8_e4m3fn, one for each of its rows
// [row_begin, row_end): NAME_scale beside NAME, one value or one a row of the whole
// tensor. InvalidArgument: none of these, or in blocks.
absl::StatusOr<std::vector<float>> ReadScales(const Checkpoint& checkpoint,
                                              const TensorSlice& slice);

// The piece's rows in to_dtype, one after the other, to `to` (rows * cols).
void CopyPiece(const Checkpoint& checkpoint, const WeightPiece& piece, std::byte* to);

// --load-format dummy: element (row, col) of the whole stored tensor is
// center + width * u, u in [-1, 1) from (DummyKey(name), row * cols + col).
// Matrices keep the variance of what they multiply; norms are near the identity.
struct DummySpread {
  float center = 0.0f, width = 0.0f;
};
DummySpread SpreadOf(const LocalTensor& local, const ModelConfig& config);
uint64_t DummyKey(std::string_view tensor_name);

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_WEIGHT_PIECES_H_
