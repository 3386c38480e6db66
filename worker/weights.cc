#include "worker/weights.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "worker/backend/cpu/kernels.h"
#include "worker/weight_pieces.h"

namespace lockstep {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kAlignment = 64;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

absl::Status RunPieces(const std::vector<WeightPiece>& pieces, int64_t total_bytes,
                       const WeightOptions& options, ThreadPool* pool,
                       absl::FunctionRef<absl::Status(absl::Span<const WeightPiece>)> before_batch,
                       absl::FunctionRef<void(const WeightPiece&)> run) {
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

// In [-1, 1): the top 24 bits of splitmix64's finaliser.
float UniformAt(uint64_t stream, uint64_t index) {
  uint64_t z = stream + (index + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<float>(static_cast<int64_t>(z >> 40) - (1 << 23)) * 0x1p-23f;
}

void FillDummy(const WeightPiece& piece, const ModelConfig& config, std::byte* to) {
  const TensorSlice& slice = *piece.slice;
  const DummySpread spread = SpreadOf(*piece.local, config);
  const uint64_t stream = DummyKey(slice.name);
  std::vector<float> row(piece.cols());
  const int64_t row_bytes = piece.cols() * DTypeBytes(piece.to_dtype);
  for (int64_t r = 0; r < piece.rows; ++r) {
    const int64_t global_row = slice.row_begin + piece.first_row + r;
    for (int64_t c = 0; c < piece.cols(); ++c) {
      const uint64_t index = static_cast<uint64_t>(global_row * slice.cols + slice.col_begin + c);
      row[c] = spread.center + spread.width * UniformAt(stream, index);
    }
    cpu::BestKernels().narrow(row.data(), piece.cols(), piece.to_dtype, to + r * row_bytes);
  }
}

// Matrices in the serving dtype, vectors in float32.
auto DTypeOf(const WeightOptions& options) {
  return [&options](const LocalTensor& local) {
    return local.is_matrix ? options.dtype : DType::kFloat32;
  };
}

}  // namespace

std::byte* Weights::RowsOf(const WeightPiece& piece) const {
  const WeightTensor* to = Find(piece.local->name);
  return to->data + piece.to_row * to->cols * DTypeBytes(to->dtype);
}

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
  absl::StatusOr<std::vector<WeightPiece>> pieces = CutIntoPieces(
      plan, DTypeOf(options), [&](const TensorSlice& s) { return FindChecked(checkpoint, s); });
  if (!pieces.ok()) return pieces.status();
  weights->phases_.emplace_back("check tensors", SecondsSince(start));

  start = Clock::now();
  const auto expect = [&](absl::Span<const WeightPiece> batch) {
    for (const WeightPiece& p : batch)
      checkpoint.WillNeed(*p.info, p.stored_begin(), p.stored_end());
    return checkpoint.CheckUnchanged();
  };
  const auto copy = [&](const WeightPiece& piece) {
    CopyPiece(checkpoint, piece, weights->RowsOf(piece));
  };
  absl::Status status = RunPieces(*pieces, weights->allocated_bytes_, options, pool, expect, copy);
  if (!status.ok()) return status;
  for (const WeightPiece& piece : *pieces) {
    weights->checkpoint_bytes_ += piece.stored_bytes();
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
  absl::StatusOr<std::vector<WeightPiece>> pieces = CutIntoPieces(
      plan, DTypeOf(options),
      [](const TensorSlice&) -> absl::StatusOr<const TensorInfo*> { return nullptr; });
  if (!pieces.ok()) return pieces.status();
  absl::Status status = RunPieces(
      *pieces, weights->allocated_bytes_, options, pool,
      [](absl::Span<const WeightPiece>) { return absl::OkStatus(); },
      [&](const WeightPiece& piece) { FillDummy(piece, config, weights->RowsOf(piece)); });
  if (!status.ok()) return status;
  weights->phases_.emplace_back("make dummy weights", SecondsSince(start));
  return weights;
}

}  // namespace lockstep
