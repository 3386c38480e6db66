#include "worker/weight_pieces.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/tensor_match.h"
#include "worker/backend/cpu/kernels.h"

namespace lockstep {
namespace {

constexpr int64_t kPieceBytes = 1 << 20;  // what one thread converts at a time

void CopyRow(const std::byte* from, DType from_dtype, int64_t n, std::byte* to, DType to_dtype) {
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, n * DTypeBytes(to_dtype));
    return;
  }
  const cpu::Kernels& kernels = cpu::BestKernels();
  if (to_dtype == DType::kFloat32) {
    kernels.widen(from, from_dtype, n, reinterpret_cast<float*>(to));
    return;
  }
  constexpr int64_t kRun = 1024;
  float wide[kRun];
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t count = std::min(kRun, n - i);
    kernels.widen(from + i * DTypeBytes(from_dtype), from_dtype, count, wide);
    kernels.narrow(wide, count, to_dtype, to + i * DTypeBytes(to_dtype));
  }
}

}  // namespace

bool IsWeightDType(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

uint64_t WeightPiece::stored_begin() const {
  const int64_t at = (slice->row_begin + first_row) * slice->cols + slice->col_begin;
  return static_cast<uint64_t>(at * DTypeBytes(info->dtype));
}

uint64_t WeightPiece::stored_end() const {
  const int64_t elements = (rows - 1) * slice->cols + cols();
  return stored_begin() + static_cast<uint64_t>(elements * DTypeBytes(info->dtype));
}

absl::StatusOr<std::vector<WeightPiece>> CutIntoPieces(
    const ShardPlan& plan, absl::FunctionRef<DType(const LocalTensor&)> dtype_of,
    absl::FunctionRef<absl::StatusOr<const TensorInfo*>(const TensorSlice&)> find_info) {
  std::vector<WeightPiece> pieces;
  for (size_t t = 0; t < plan.tensors.size(); ++t) {
    const LocalTensor& local = plan.tensors[t];
    const DType dtype = dtype_of(local);
    int64_t to_row = 0;
    for (size_t s = 0; s < local.slices.size(); ++s) {
      const TensorSlice& slice = local.slices[s];
      const int64_t rows = slice.row_end - slice.row_begin;
      const int64_t cols = slice.col_end - slice.col_begin;
      if (cols != local.cols || to_row + rows > local.rows) {
        return absl::InternalError(absl::StrCat("slice \"", slice.name, "\" of ", rows, " x ", cols,
                                                " does not fit local tensor \"", local.name,
                                                "\" of ", local.rows, " x ", local.cols));
      }
      absl::StatusOr<const TensorInfo*> info = find_info(slice);
      if (!info.ok()) return info.status();
      if (*info != nullptr &&
          ((*info)->dtype == DType::kFloat8E4M3) != (dtype == DType::kFloat8E4M3)) {
        return absl::InvalidArgumentError(
            absl::StrCat("tensor ", slice.name, ": is ", std::string((*info)->dtype_name),
                         "; float8 is read for matrices of layers alone, and for all that are "
                         "one matrix here (",
                         local.name, ")"));
      }
      const int64_t step = std::max<int64_t>(1, kPieceBytes / (cols * DTypeBytes(dtype)));
      for (int64_t row = 0; row < rows; row += step) {
        pieces.push_back({.slice = &slice,
                          .info = *info,
                          .local = &local,
                          .tensor = t,
                          .slice_index = s,
                          .to_dtype = dtype,
                          .first_row = row,
                          .rows = std::min(step, rows - row),
                          .to_row = to_row + row});
      }
      to_row += rows;
    }
  }
  return pieces;
}

absl::StatusOr<const TensorInfo*> FindChecked(const Checkpoint& checkpoint,
                                              const TensorSlice& slice, bool takes_fp8) {
  absl::StatusOr<const TensorInfo*> found = MatchTensor(checkpoint, slice);
  if (!found.ok()) return found;
  const TensorInfo& info = **found;
  const std::string tensor =
      absl::StrCat(checkpoint.files()[info.file], ": tensor \"", slice.name, "\"");
  if (!IsWeightDType(info.dtype) && !(takes_fp8 && info.dtype == DType::kFloat8E4M3)) {
    return absl::InvalidArgumentError(
        absl::StrCat(tensor, " is ", std::string(info.dtype_name),
                     "; weights are read as float32, float16 and bfloat16"));
  }
  const int64_t bytes = slice.rows * slice.cols * DTypeBytes(info.dtype);
  if (static_cast<int64_t>(info.num_bytes) != bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(tensor, " has ", info.num_bytes, " bytes, its shape ", bytes));
  }
  return found;
}

absl::StatusOr<std::vector<float>> ReadScales(const Checkpoint& checkpoint,
                                              const TensorSlice& slice) {
  std::vector<std::string> names = {slice.name};
  names.insert(names.end(), slice.alternatives.begin(), slice.alternatives.end());
  const TensorInfo* info = nullptr;
  std::string name;
  for (size_t i = 0; i < names.size() && info == nullptr; ++i) {
    name = names[i] + "_scale";
    info = checkpoint.Find(name);
  }
  if (info == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor \"", slice.name, "\" is float8_e4m3fn, and \"", slice.name,
                     "_scale\" is missing; supported: one scale a tensor or one a row"));
  }
  int64_t count = 1;
  for (const int64_t size : info->shape) count *= size;
  const bool fits = (count == 1 || count == slice.rows) &&
                    (info->shape.size() < 2 || (info->shape.size() == 2 && info->shape[1] == 1));
  if (!fits || !info->loadable || !IsWeightDType(info->dtype) ||
      static_cast<int64_t>(info->num_bytes) != count * DTypeBytes(info->dtype)) {
    return absl::InvalidArgumentError(
        absl::StrCat(checkpoint.files()[info->file], ": tensor \"", name, "\" is ",
                     std::string(info->dtype_name), " of shape [", absl::StrJoin(info->shape, ", "),
                     "]; supported: one scale, or ", slice.rows, " of them, in F32, F16 or BF16"));
  }
  std::vector<float> stored(count);
  CopyRow(checkpoint.Bytes(*info).data(), info->dtype, count,
          reinterpret_cast<std::byte*>(stored.data()), DType::kFloat32);
  if (count == 1) return std::vector<float>(slice.row_end - slice.row_begin, stored[0]);
  return std::vector<float>(stored.begin() + slice.row_begin, stored.begin() + slice.row_end);
}

void CopyPiece(const Checkpoint& checkpoint, const WeightPiece& piece, std::byte* to) {
  const DType from_dtype = piece.info->dtype;
  const int64_t from_row = piece.slice->cols * DTypeBytes(from_dtype);
  const int64_t to_row = piece.cols() * DTypeBytes(piece.to_dtype);
  const std::byte* from = checkpoint.Bytes(*piece.info).data() + piece.stored_begin();
  for (int64_t r = 0; r < piece.rows; ++r, from += from_row, to += to_row) {
    CopyRow(from, from_dtype, piece.cols(), to, piece.to_dtype);
  }
  // Copied bytes need not count as resident twice.
  checkpoint.DoneWith(*piece.info, piece.stored_begin(), piece.stored_end());
}

uint64_t DummyKey(std::string_view tensor_name) {  // FNV-1a
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : tensor_name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

DummySpread SpreadOf(const LocalTensor& local, const ModelConfig& config) {
  if (local.is_matrix) {
    return {0.0f, static_cast<float>(std::sqrt(3.0 / static_cast<double>(local.slices[0].cols)))};
  }
  if (absl::EndsWith(local.name, ".bias")) return {0.0f, 0.05f};
  const bool plus_one = config.norm_weight_plus_one;
  return {plus_one ? 0.0f : 1.0f, 0.1f};
}

}  // namespace lockstep
