#include "worker/backend/cuda/device_weights.h"

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/fill.h"
#include "kernels/quantize.h"
#include "model/byte_size.h"
#include "model/memory_model.h"
#include "worker/weight_pieces.h"

namespace lockstep::cuda {

using kernels::Type;

kernels::Type ToType(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return Type::kF32;
    case DType::kFloat16:
      return Type::kF16;
    case DType::kBFloat16:
      return Type::kBF16;
    case DType::kFloat8E4M3:
      return Type::kE4M3;
  }
  return Type::kF32;
}

namespace {

constexpr int64_t kAlignment = 256;

int64_t Aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Gate and up, fused row by row.
bool IsInterleaved(const LocalTensor& local) { return absl::StrContains(local.name, ".gate_up."); }

// Where a slice's first row goes, and how far apart its rows are, in rows.
struct Placement {
  int64_t first = 0, step = 1;
};
Placement PlaceOf(const LocalTensor& local, size_t slice) {
  if (IsInterleaved(local)) return {static_cast<int64_t>(slice), 2};
  int64_t first = 0;
  for (size_t s = 0; s < slice; ++s) first += local.slices[s].row_end - local.slices[s].row_begin;
  return {first, 1};
}

// One batch of pieces on its way: pinned memory that the copies read.
struct Staging {
  Buffer<std::byte> memory;
  cudaEvent_t copied = nullptr;
  ~Staging() {
    if (copied != nullptr) (void)cudaEventDestroy(copied);
  }
};

}  // namespace

class DeviceWeights::Builder {
 public:
  Builder(const ShardPlan& plan, const DeviceWeightOptions& options)
      : plan_(plan), options_(options), weights_(new DeviceWeights) {}
  ~Builder() {
    if (stream_ != nullptr) {
      (void)cudaStreamSynchronize(stream_);
      (void)cudaStreamDestroy(stream_);
    }
  }

  absl::Status Allocate();
  absl::Status Load(const Checkpoint& checkpoint, ThreadPool* pool);
  absl::Status Fill(const ModelConfig& config);
  absl::StatusOr<std::unique_ptr<DeviceWeights>> Finish();

 private:
  bool IsQuantized(const LocalTensor& local) const {
    return !options_.quantization.empty() && IsQuantizedMatrix(local);
  }
  DeviceTensor& TensorOf(const LocalTensor& local) { return weights_->tensors_[local.name]; }
  // Where the serving dtype's rows are collected: the tensor, or what is
  // quantised into it once it is whole.
  std::byte* TargetOf(const LocalTensor& local, DType arrives) {
    return IsQuantized(local) && arrives != DType::kFloat8E4M3
               ? wide_.get()
               : static_cast<std::byte*>(TensorOf(local).data);
  }
  absl::Status Quantize(const LocalTensor& local);
  // The first slice's tensor is float8 in the checkpoint.
  static bool IsStoredQuantized(const Checkpoint& checkpoint, const LocalTensor& local);
  absl::Status CopyScales(const Checkpoint& checkpoint, const LocalTensor& local);
  absl::Status EnqueueBatch(const Checkpoint& checkpoint, ThreadPool* pool,
                            absl::Span<const WeightPiece> batch, Staging* staging);

  const ShardPlan& plan_;
  const DeviceWeightOptions& options_;
  std::unique_ptr<DeviceWeights> weights_;
  Buffer<std::byte> wide_;  // the largest quantised matrix before it is
  cudaStream_t stream_ = nullptr;
};

absl::Status DeviceWeights::Builder::Allocate() {
  struct Place {
    int64_t data = 0, scales = -1;
  };
  std::vector<Place> places;
  const int64_t element = DTypeBytes(options_.dtype);
  int64_t end = 0, widest = 0;
  for (const LocalTensor& local : plan_.tensors) {
    const bool quantized = IsQuantized(local);
    const int64_t elements = local.rows * local.cols;
    Place& place = places.emplace_back();
    place.data = end;
    end += Aligned(elements * (quantized ? 1 : element));
    weights_->allocated_bytes_ += elements * (quantized ? 1 : element);
    if (!quantized) continue;
    place.scales = end;
    end += Aligned(local.rows * 4);
    weights_->allocated_bytes_ += local.rows * 4;
    widest = std::max(widest, elements * element);
  }
  size_t free_bytes = 0, total_bytes = 0;
  absl::Status status = ToStatus(cudaMemGetInfo(&free_bytes, &total_bytes), "reading GPU memory");
  if (!status.ok()) return status;
  if (static_cast<size_t>(end + widest) > free_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the weights need ", FormatBytes(end + widest), " of GPU memory on rank ",
                     plan_.rank, " and ", FormatBytes(static_cast<int64_t>(free_bytes)),
                     " are free; a larger --tensor-parallel-size needs less on each rank"));
  }
  status = weights_->arena_.Allocate(static_cast<size_t>(std::max<int64_t>(end, 1)), "weights");
  if (status.ok()) status = wide_.Allocate(static_cast<size_t>(widest), "quantising weights");
  if (status.ok())
    status = ToStatus(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking),
                      "a stream for loading");
  // Rows that pad the vocabulary have no piece.
  if (status.ok())
    status = ToStatus(cudaMemsetAsync(weights_->arena_.get(), 0, weights_->arena_.bytes(), stream_),
                      "clearing weights");
  if (!status.ok()) return status;
  for (size_t i = 0; i < plan_.tensors.size(); ++i) {
    const LocalTensor& local = plan_.tensors[i];
    const bool quantized = places[i].scales >= 0;
    weights_->tensors_[local.name] = {
        weights_->arena_.get() + places[i].data, quantized ? Type::kE4M3 : ToType(options_.dtype),
        local.rows, local.cols,
        quantized ? reinterpret_cast<float*>(weights_->arena_.get() + places[i].scales) : nullptr};
  }
  return absl::OkStatus();
}

absl::Status DeviceWeights::Builder::Quantize(const LocalTensor& local) {
  if (!IsQuantized(local)) return absl::OkStatus();
  const DeviceTensor& tensor = TensorOf(local);
  return ToStatus(kernels::QuantizeRows({.stream = stream_, .pdl = false},
                                        {.type = ToType(options_.dtype),
                                         .num_rows = static_cast<int>(local.rows),
                                         .width = static_cast<int>(local.cols),
                                         .slot = nullptr,
                                         .in = wide_.get(),
                                         .in_stride = local.cols,
                                         .out = tensor.data,
                                         .out_stride = local.cols,
                                         .scales = const_cast<float*>(tensor.scales)}),
                  absl::StrCat("quantising ", local.name));
}

bool DeviceWeights::Builder::IsStoredQuantized(const Checkpoint& checkpoint,
                                               const LocalTensor& local) {
  if (local.slices.empty()) return false;
  const absl::StatusOr<const TensorInfo*> info =
      FindChecked(checkpoint, local.slices.front(), /*takes_fp8=*/true);
  return info.ok() && (*info)->dtype == DType::kFloat8E4M3;
}

absl::Status DeviceWeights::Builder::CopyScales(const Checkpoint& checkpoint,
                                                const LocalTensor& local) {
  std::vector<float> scales(local.rows, 1.0f);
  for (size_t s = 0; s < local.slices.size(); ++s) {
    const absl::StatusOr<std::vector<float>> of_slice = ReadScales(checkpoint, local.slices[s]);
    if (!of_slice.ok()) return of_slice.status();
    const Placement place = PlaceOf(local, s);
    for (size_t r = 0; r < of_slice->size(); ++r) {
      scales[place.first + static_cast<int64_t>(r) * place.step] = (*of_slice)[r];
    }
  }
  // From pageable memory: copied out before the call returns.
  return ToStatus(cudaMemcpyAsync(const_cast<float*>(TensorOf(local).scales), scales.data(),
                                  scales.size() * sizeof(float), cudaMemcpyHostToDevice, stream_),
                  absl::StrCat("copying the scales of ", local.name));
}

absl::Status DeviceWeights::Builder::EnqueueBatch(const Checkpoint& checkpoint, ThreadPool* pool,
                                                  absl::Span<const WeightPiece> batch,
                                                  Staging* staging) {
  std::vector<int64_t> offsets;
  int64_t bytes = 0;
  for (const WeightPiece& piece : batch) {
    offsets.push_back(bytes);
    bytes += Aligned(piece.bytes());
    checkpoint.WillNeed(*piece.info, piece.stored_begin(), piece.stored_end());
  }
  if (absl::Status status = checkpoint.CheckUnchanged(); !status.ok()) return status;
  // What this memory held last has to be on the GPU first.
  absl::Status status = ToStatus(cudaEventSynchronize(staging->copied), "copying weights");
  if (!status.ok()) return status;
  if (staging->memory.bytes() < static_cast<size_t>(bytes)) {
    status = staging->memory.AllocatePinned(static_cast<size_t>(bytes), "loading weights");
    if (!status.ok()) return status;
  }
  pool->ParallelFor(static_cast<int64_t>(batch.size()), [&](int64_t i, int) {
    CopyPiece(checkpoint, batch[i], staging->memory.get() + offsets[i]);
  });
  for (size_t i = 0; i < batch.size(); ++i) {
    const WeightPiece& piece = batch[i];
    const Placement place = PlaceOf(*piece.local, piece.slice_index);
    const size_t row = static_cast<size_t>(piece.cols() * DTypeBytes(piece.to_dtype));
    std::byte* to =
        TargetOf(*piece.local, piece.to_dtype) + (place.first + piece.first_row * place.step) * row;
    status = ToStatus(
        cudaMemcpy2DAsync(to, row * place.step, staging->memory.get() + offsets[i], row, row,
                          static_cast<size_t>(piece.rows), cudaMemcpyHostToDevice, stream_),
        absl::StrCat("copying ", piece.local->name));
    if (!status.ok()) return status;
    const bool last = piece.slice_index + 1 == piece.local->slices.size() &&
                      piece.first_row + piece.rows == piece.slice->row_end - piece.slice->row_begin;
    if (last) {
      status = piece.to_dtype == DType::kFloat8E4M3 ? CopyScales(checkpoint, *piece.local)
                                                    : Quantize(*piece.local);
    }
    if (!status.ok()) return status;
  }
  return ToStatus(cudaEventRecord(staging->copied, stream_), "copying weights");
}

absl::Status DeviceWeights::Builder::Load(const Checkpoint& checkpoint, ThreadPool* pool) {
  absl::StatusOr<std::vector<WeightPiece>> pieces = CutIntoPieces(
      plan_,
      [&](const LocalTensor& local) {
        return IsQuantized(local) && IsStoredQuantized(checkpoint, local) ? DType::kFloat8E4M3
                                                                          : options_.dtype;
      },
      [&](const TensorSlice& s) {
        return FindChecked(checkpoint, s, !options_.quantization.empty());
      });
  if (!pieces.ok()) return pieces.status();
  std::array<Staging, 2> staging;
  for (Staging& s : staging) {
    absl::Status status =
        ToStatus(cudaEventCreateWithFlags(&s.copied, cudaEventDisableTiming), "an event");
    if (!status.ok()) return status;
  }
  int64_t total = 0, done = 0;
  for (const WeightPiece& piece : *pieces) total += piece.bytes();
  if (options_.progress) options_.progress(0, total);
  for (size_t first = 0, turn = 0; first < pieces->size(); first += kBatchPieces, ++turn) {
    const auto batch = absl::MakeConstSpan(*pieces).subspan(first, kBatchPieces);
    absl::Status status = EnqueueBatch(checkpoint, pool, batch, &staging[turn % 2]);
    if (!status.ok()) {
      (void)cudaStreamSynchronize(stream_);  // before the pinned memory goes
      return status;
    }
    for (const WeightPiece& piece : batch) {
      done += piece.bytes();
      weights_->checkpoint_bytes_ += piece.stored_bytes();
    }
    if (options_.progress) options_.progress(done, total);
  }
  return ToStatus(cudaStreamSynchronize(stream_), "copying weights");
}

absl::Status DeviceWeights::Builder::Fill(const ModelConfig& config) {
  for (const LocalTensor& local : plan_.tensors) {
    if (local.slices.empty()) continue;
    const DummySpread spread = SpreadOf(local, config);
    for (size_t s = 0; s < local.slices.size(); ++s) {
      const TensorSlice& slice = local.slices[s];
      const Placement place = PlaceOf(local, s);
      const int64_t row = local.cols * DTypeBytes(options_.dtype);
      const absl::Status status =
          ToStatus(kernels::FillUniform({.stream = stream_, .pdl = false},
                                        {.type = ToType(options_.dtype),
                                         .key = DummyKey(slice.name),
                                         .center = spread.center,
                                         .width = spread.width,
                                         .scale = 1.0f,
                                         .first_row = slice.row_begin,
                                         .first_col = slice.col_begin,
                                         .global_cols = slice.cols,
                                         .rows = slice.row_end - slice.row_begin,
                                         .cols = local.cols,
                                         .out = TargetOf(local, options_.dtype) + place.first * row,
                                         .row_stride = place.step * local.cols}),
                   absl::StrCat("filling ", local.name));
      if (!status.ok()) return status;
    }
    if (absl::Status status = Quantize(local); !status.ok()) return status;
  }
  return ToStatus(cudaStreamSynchronize(stream_), "filling weights");
}

absl::StatusOr<std::unique_ptr<DeviceWeights>> DeviceWeights::Builder::Finish() {
  absl::Status status = ToStatus(cudaStreamSynchronize(stream_), "loading weights");
  if (!status.ok()) return status;
  return std::move(weights_);
}

absl::StatusOr<std::unique_ptr<DeviceWeights>> DeviceWeights::Load(
    const Checkpoint& checkpoint, const ShardPlan& plan, const DeviceWeightOptions& options,
    ThreadPool* pool) {
  Builder builder(plan, options);
  absl::Status status = builder.Allocate();
  if (status.ok()) status = builder.Load(checkpoint, pool);
  if (!status.ok()) return status;
  return builder.Finish();
}

absl::StatusOr<std::unique_ptr<DeviceWeights>> DeviceWeights::Dummy(
    const ShardPlan& plan, const ModelConfig& config, const DeviceWeightOptions& options) {
  Builder builder(plan, options);
  absl::Status status = builder.Allocate();
  if (status.ok()) status = builder.Fill(config);
  if (!status.ok()) return status;
  return builder.Finish();
}

const DeviceTensor* DeviceWeights::Find(std::string_view name) const {
  const auto it = tensors_.find(absl::string_view(name.data(), name.size()));
  return it == tensors_.end() ? nullptr : &it->second;
}

}  // namespace lockstep::cuda
