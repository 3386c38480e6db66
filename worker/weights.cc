#include "worker/weights.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/types/span.h"
#include "worker/backend/cpu/kernels.h"

namespace lockstep {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kAlignment = 64;
constexpr int64_t kPieceBytes = 1 << 20;  // what one thread converts at a time
constexpr size_t kBatchPieces = 32;       // between two calls of `progress`

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Some rows of one slice, on their way to rows of a local tensor.
struct Piece {
  const TensorSlice* slice = nullptr;
  const TensorInfo* info = nullptr;  // null: dummy
  const LocalTensor* local = nullptr;
  WeightTensor to;
  int64_t first_row = 0;  // of the slice's rows
  int64_t rows = 0;
  int64_t to_row = 0;
  int64_t bytes() const { return rows * to.cols * DTypeBytes(to.dtype); }

  // Where the piece lies in its stored tensor, from its first byte to its last.
  uint64_t stored_begin() const {
    const int64_t at = (slice->row_begin + first_row) * slice->cols + slice->col_begin;
    return static_cast<uint64_t>(at * DTypeBytes(info->dtype));
  }
  uint64_t stored_end() const {
    const int64_t elements = (rows - 1) * slice->cols + to.cols;
    return stored_begin() + static_cast<uint64_t>(elements * DTypeBytes(info->dtype));
  }
};

bool IsWeightDType(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

// Cuts every slice of the plan into pieces.
template <typename FindInfo>
absl::StatusOr<std::vector<Piece>> CutIntoPieces(const ShardPlan& plan, const Weights& weights,
                                                 FindInfo find_info) {
  std::vector<Piece> pieces;
  for (const LocalTensor& local : plan.tensors) {
    const WeightTensor* to = weights.Find(local.name);
    int64_t to_row = 0;
    for (const TensorSlice& slice : local.slices) {
      const int64_t rows = slice.row_end - slice.row_begin;
      const int64_t cols = slice.col_end - slice.col_begin;
      if (cols != local.cols || to_row + rows > local.rows) {
        return absl::InternalError(absl::StrCat("slice \"", slice.name, "\" of ", rows, " x ", cols,
                                                " does not fit local tensor \"", local.name,
                                                "\" of ", local.rows, " x ", local.cols));
      }
      absl::StatusOr<const TensorInfo*> info = find_info(slice);
      if (!info.ok()) return info.status();
      const int64_t step = std::max<int64_t>(1, kPieceBytes / (cols * DTypeBytes(to->dtype)));
      for (int64_t row = 0; row < rows; row += step) {
        pieces.push_back(
            {&slice, *info, &local, *to, row, std::min(step, rows - row), to_row + row});
      }
      to_row += rows;
    }
  }
  return pieces;
}

absl::Status RunPieces(const std::vector<Piece>& pieces, int64_t total_bytes,
                       const WeightOptions& options, ThreadPool* pool,
                       absl::FunctionRef<absl::Status(absl::Span<const Piece>)> before_batch,
                       absl::FunctionRef<void(const Piece&)> run) {
  int64_t done = 0;
  if (options.progress) options.progress(0, total_bytes);
  for (size_t first = 0; first < pieces.size(); first += kBatchPieces) {
    const size_t count = std::min(kBatchPieces, pieces.size() - first);
    const auto batch = absl::MakeConstSpan(pieces).subspan(first, count);
    if (absl::Status status = before_batch(batch); !status.ok()) return status;
    pool->ParallelFor(static_cast<int64_t>(count), [&](int64_t i, int) { run(pieces[first + i]); });
    for (size_t i = 0; i < count; ++i) done += pieces[first + i].bytes();
    if (options.progress) options.progress(done, total_bytes);
  }
  // Rows that pad the vocabulary have no piece: they are zero as allocated.
  if (options.progress && done != total_bytes) options.progress(total_bytes, total_bytes);
  return absl::OkStatus();
}

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

// A stored vector is [rows]; everything else has the slice's own shape.
bool ShapeMatches(const TensorInfo& info, const TensorSlice& slice) {
  if (info.shape.size() == 1) return slice.cols == 1 && info.shape[0] == slice.rows;
  return info.shape.size() == 2 && info.shape[0] == slice.rows && info.shape[1] == slice.cols;
}

absl::StatusOr<const TensorInfo*> FindChecked(const Checkpoint& checkpoint,
                                              const TensorSlice& slice) {
  const std::vector<std::string>& files = checkpoint.files();
  const TensorInfo* info = checkpoint.Find(slice.name);
  std::string found = slice.name;
  for (size_t i = 0; info == nullptr && i < slice.alternatives.size(); ++i) {
    found = slice.alternatives[i];
    info = checkpoint.Find(found);
  }
  if (info == nullptr) {
    const std::string tried =
        slice.alternatives.empty()
            ? ""
            : absl::StrCat(" (nor \"", absl::StrJoin(slice.alternatives, "\", \""), "\")");
    const std::string where = files.empty() ? "the checkpoint"
                              : files.size() == 1
                                  ? files[0]
                                  : absl::StrCat(files.size(), " files beside ", files[0]);
    return absl::NotFoundError(absl::StrCat("tensor \"", slice.name, "\"", tried,
                                            " is missing from ", where,
                                            "; config.json asks for it"));
  }
  const std::string& file = files[info->file];
  if (!ShapeMatches(*info, slice)) {
    const std::string expected =
        slice.cols == 1 ? absl::StrCat(slice.rows) : absl::StrCat(slice.rows, ", ", slice.cols);
    return absl::InvalidArgumentError(absl::StrCat(file, ": tensor \"", found, "\" has shape [",
                                                   absl::StrJoin(info->shape, ", "),
                                                   "]; config.json asks for [", expected, "]"));
  }
  if (!info->loadable || !IsWeightDType(info->dtype)) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": tensor \"", found, "\" is ", std::string(info->dtype_name),
                     "; the cpu backend reads float32, float16 and bfloat16"));
  }
  const int64_t bytes = slice.rows * slice.cols * DTypeBytes(info->dtype);
  if (static_cast<int64_t>(info->num_bytes) != bytes) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": tensor \"", found, "\" has ",
                                                   info->num_bytes, " bytes, its shape ", bytes));
  }
  return info;
}

uint64_t HashName(std::string_view name) {  // FNV-1a
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

// In [-1, 1): the top 24 bits of splitmix64's finaliser.
float UniformAt(uint64_t stream, uint64_t index) {
  uint64_t z = stream + (index + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<float>(static_cast<int64_t>(z >> 40) - (1 << 23)) * 0x1p-23f;
}

struct Spread {
  float center, width;
};

// Matrices keep the variance of what they multiply; norms are near the identity.
Spread DummySpread(const LocalTensor& local, const ModelConfig& config) {
  if (local.is_matrix) {
    return {0.0f, static_cast<float>(std::sqrt(3.0 / static_cast<double>(local.slices[0].cols)))};
  }
  if (absl::EndsWith(local.name, ".bias")) return {0.0f, 0.05f};
  const bool plus_one = config.norm_weight_plus_one;
  return {plus_one ? 0.0f : 1.0f, 0.1f};
}

void FillDummy(const Piece& piece, const ModelConfig& config) {
  const TensorSlice& slice = *piece.slice;
  const Spread spread = DummySpread(*piece.local, config);
  const uint64_t stream = HashName(slice.name);
  std::vector<float> row(piece.to.cols);
  const int64_t row_bytes = piece.to.cols * DTypeBytes(piece.to.dtype);
  for (int64_t r = 0; r < piece.rows; ++r) {
    const int64_t global_row = slice.row_begin + piece.first_row + r;
    for (int64_t c = 0; c < piece.to.cols; ++c) {
      const uint64_t index = static_cast<uint64_t>(global_row * slice.cols + slice.col_begin + c);
      row[c] = spread.center + spread.width * UniformAt(stream, index);
    }
    cpu::BestKernels().narrow(row.data(), piece.to.cols, piece.to.dtype,
                              piece.to.data + (piece.to_row + r) * row_bytes);
  }
}

}  // namespace

Weights::~Weights() {
  if (arena_ != nullptr) munmap(arena_, arena_bytes_);
}

const WeightTensor* Weights::Find(std::string_view name) const {
  const auto it = tensors_.find(absl::string_view(name.data(), name.size()));
  return it == tensors_.end() ? nullptr : &it->second;
}

absl::Status Weights::Allocate(const ShardPlan& plan, DType matrix_dtype) {
  if (!IsWeightDType(matrix_dtype)) {
    return absl::InvalidArgumentError(
        absl::StrCat("dtype ", std::string(DTypeName(matrix_dtype)),
                     ": the cpu backend keeps weights as float32, float16 or bfloat16"));
  }
  std::vector<int64_t> offsets;
  int64_t end = 0;
  for (const LocalTensor& local : plan.tensors) {
    const DType dtype = local.is_matrix ? matrix_dtype : DType::kFloat32;
    const int64_t bytes = local.rows * local.cols * DTypeBytes(dtype);
    offsets.push_back(end);
    allocated_bytes_ += bytes;
    end += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  arena_bytes_ = static_cast<size_t>(std::max<int64_t>(end, 1));
  void* memory = mmap(nullptr, arena_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                      /*fd=*/-1, /*offset=*/0);
  if (memory == MAP_FAILED) {
    arena_bytes_ = 0;
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for ", allocated_bytes_, " bytes of weights: ", strerror(errno),
                     "; a larger --tensor-parallel-size needs less on each rank"));
  }
  arena_ = static_cast<std::byte*>(memory);
  // Weights are streamed whole at every step: fewer, larger pages cost less to walk.
  madvise(arena_, arena_bytes_, MADV_HUGEPAGE);
  for (size_t i = 0; i < plan.tensors.size(); ++i) {
    const LocalTensor& local = plan.tensors[i];
    tensors_[local.name] = {arena_ + offsets[i], local.is_matrix ? matrix_dtype : DType::kFloat32,
                            local.rows, local.cols};
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Weights>> Weights::Load(const Checkpoint& checkpoint,
                                                       const ShardPlan& plan,
                                                       const WeightOptions& options,
                                                       ThreadPool* pool) {
  auto start = Clock::now();
  std::unique_ptr<Weights> weights(new Weights);
  if (absl::Status status = weights->Allocate(plan, options.dtype); !status.ok()) return status;
  absl::StatusOr<std::vector<Piece>> pieces = CutIntoPieces(
      plan, *weights, [&](const TensorSlice& s) { return FindChecked(checkpoint, s); });
  if (!pieces.ok()) return pieces.status();
  weights->phases_.emplace_back("check tensors", SecondsSince(start));

  start = Clock::now();
  const auto expect = [&](absl::Span<const Piece> batch) {
    for (const Piece& p : batch) checkpoint.WillNeed(*p.info, p.stored_begin(), p.stored_end());
    return checkpoint.CheckUnchanged();
  };
  const auto copy = [&](const Piece& piece) {
    const DType from_dtype = piece.info->dtype;
    const int64_t from_row = piece.slice->cols * DTypeBytes(from_dtype);
    const int64_t to_row = piece.to.cols * DTypeBytes(piece.to.dtype);
    const std::byte* from = checkpoint.Bytes(*piece.info).data() + piece.stored_begin();
    std::byte* to = piece.to.data + piece.to_row * to_row;
    for (int64_t r = 0; r < piece.rows; ++r, from += from_row, to += to_row) {
      CopyRow(from, from_dtype, piece.to.cols, to, piece.to.dtype);
    }
    // Copied bytes need not count as resident twice.
    checkpoint.DoneWith(*piece.info, piece.stored_begin(), piece.stored_end());
  };
  absl::Status status = RunPieces(*pieces, weights->allocated_bytes_, options, pool, expect, copy);
  if (!status.ok()) return status;
  for (const Piece& piece : *pieces) {
    weights->checkpoint_bytes_ += piece.rows * piece.to.cols * DTypeBytes(piece.info->dtype);
  }
  weights->phases_.emplace_back("read weights", SecondsSince(start));
  return weights;
}

absl::StatusOr<std::unique_ptr<Weights>> Weights::Dummy(const ShardPlan& plan,
                                                        const ModelConfig& config,
                                                        const WeightOptions& options,
                                                        ThreadPool* pool) {
  const auto start = Clock::now();
  std::unique_ptr<Weights> weights(new Weights);
  if (absl::Status status = weights->Allocate(plan, options.dtype); !status.ok()) return status;
  absl::StatusOr<std::vector<Piece>> pieces = CutIntoPieces(
      plan, *weights,
      [](const TensorSlice&) -> absl::StatusOr<const TensorInfo*> { return nullptr; });
  if (!pieces.ok()) return pieces.status();
  absl::Status status = RunPieces(
      *pieces, weights->allocated_bytes_, options, pool,
      [](absl::Span<const Piece>) { return absl::OkStatus(); },
      [&](const Piece& piece) { FillDummy(piece, config); });
  if (!status.ok()) return status;
  weights->phases_.emplace_back("make dummy weights", SecondsSince(start));
  return weights;
}

}  // namespace lockstep
