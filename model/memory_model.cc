#include "model/memory_model.h"

#include <algorithm>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "model/byte_size.h"
#include "model/strings.h"

namespace lockstep {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int64_t>::max();
constexpr int64_t kMiB = 1 << 20;

// The cpu backend computes logits for at most this many rows at once.
constexpr int64_t kCpuLogitChunkBytes = 32 * kMiB;
constexpr int64_t kCpuMaxLogitRows = 256;
// Threads of a rank are chosen later; their scratch is small beside the rest.
constexpr int64_t kCpuThreads = 16;
// Blocks of a product of many rows: the input is padded to whole tiles; rows of weights that a
// thread packs, and what it puts aside of a block of results while it sums K in slices.
constexpr int64_t kCpuLanes = 16;
constexpr int64_t kCpuTileRows = 6;
constexpr int64_t kCpuPackedRows = 32;
constexpr int64_t kCpuBlockRows = 48;
// Sixteen segments of 128 KiB and a header each way, for every peer.
constexpr int64_t kCpuBytesPerPeer = 2 * 16 * (128 * 1024 + 64);

// A CUDA context with our kernels and those of cuBLASLt loaded, its workspaces,
// and the graphs of the decode step. What such processes show when idle.
constexpr int64_t kCudaRuntimeBytes = 1024 * kMiB;
// NCCL's channels and their buffers inside one host.
constexpr int64_t kNcclBytes = 512 * kMiB;
// The exchange region of kernels/all_reduce.h and kernels/gemv.h.
constexpr int64_t kCudaExchangeBytes = 128 * kMiB;
// Rows whose logits a step of the cuda backend may ask for at once: one a
// sequence; longer lists of prompt log-probabilities are computed in turns.
constexpr int64_t kCudaMaxLogitRows = 1024;
// Longer sequences attend to keys and values of one byte by another, slower kernel: 128 MiB
// of scratch for four KV heads of 128.
constexpr int64_t kCudaMaxWidenedTokens = 65'536;
constexpr int64_t kCublasWorkspaceBytes = 64 * kMiB;
constexpr int64_t kCudaResultBytes = 192;             // a row's token and log-probabilities
constexpr int64_t kCudaSampleExchangeBytes = 41'168;  // a row's, of all phases of sampling
constexpr int64_t kCudaSlotBytes = 9'312;             // 1,024 biases, 256 ending ids, parameters
// Elements of e4m3 that cuBLASLt wants a row to be a multiple of.
constexpr int64_t kQuantizedPiece = 16;

struct Bound {
  const char* name;
  int64_t value, max;
};

absl::Status CheckShape(const ModelConfig& config, const ServingShape& shape, BackendKind backend) {
  const Bound bounds[] = {
      {"block size", shape.block_size, 1 << 16},
      {"max-num-seqs", shape.max_num_seqs, 1 << 20},
      {"max-num-batched-tokens", shape.max_batched_tokens, 1 << 24},
      {"max-model-len", shape.max_model_len, config.max_position_embeddings},
  };
  for (const Bound& bound : bounds) {
    if (bound.value < 1 || bound.value > bound.max) {
      return absl::InvalidArgumentError(absl::StrCat(
          bound.name, " is ", bound.value, "; expected 1 to ", bound.max, " for this model"));
    }
  }
  if (shape.dtype == DType::kFloat8E4M3) {
    return absl::InvalidArgumentError(
        "dtype is float8_e4m3fn; expected float32, float16 or bfloat16 (with quantization fp8 "
        "for matrices of one byte)");
  }
  if (!shape.quantization.empty() && shape.quantization != "fp8") {
    return absl::InvalidArgumentError(
        absl::StrCat("quantization is ", shape.quantization, "; supported: fp8"));
  }
  if (!shape.quantization.empty() && backend == BackendKind::kCuda &&
      shape.dtype == DType::kFloat32) {
    return absl::InvalidArgumentError(
        "quantization fp8: its products give 16 bits, not float32; use dtype bfloat16 or float16");
  }
  return absl::OkStatus();
}

int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Widths of a rank's rows between two matrices, in elements.
struct Widths {
  int64_t hidden, embedding, q, qkv, mlp, up;
  Widths(const ModelConfig& config, const ShardPlan& plan)
      : hidden(config.hidden_size),
        embedding(config.embedding_dim == config.hidden_size ? 0 : config.embedding_dim),
        q(plan.local_heads * config.head_dim),
        qkv(q + 2 * plan.local_kv_heads * config.head_dim),
        mlp(plan.local_intermediate),
        up(config.gated_mlp ? 2 * mlp : mlp) {}
};

// Of a product of many rows on the cpu, whose inner dimension is cut into slices: floats
// of a row of the packed input, and of what a thread packs and puts aside.
struct PackedProduct {
  int64_t width, scratch;
  PackedProduct(int64_t inner, int64_t slices) {
    width = slices * RoundUp(inner / slices, kCpuLanes);
    int64_t levels = 1;  // of the tree over the slices
    for (int64_t s = slices; s > 1; s = (s + 1) / 2) ++levels;
    scratch = kCpuPackedRows * (width + kCpuBlockRows * (kCpuLanes + levels));
  }
};

// The cpu backend's buffers, all float32.
int64_t CpuActivationBytes(const ModelConfig& config, const ServingShape& shape,
                           const ShardPlan& plan) {
  const Widths w(config, plan);
  const bool samples = plan.rank == 0 && plan.tp_size > 1;
  const auto slices = [&](int64_t all) { return all % plan.tp_size == 0 ? all / plan.tp_size : 1; };
  int64_t packed = 0, scratch = 0;
  for (const PackedProduct& product : {PackedProduct(w.hidden, 1), PackedProduct(w.embedding, 1),
                                       PackedProduct(w.q, slices(plan.attention_slices)),
                                       PackedProduct(w.mlp, slices(plan.mlp_slices))}) {
    packed = std::max(packed, product.width);
    scratch = std::max(scratch, product.scratch);
  }
  const int64_t num_ropes = config.rope_local == config.rope ? 1 : 2;
  const int64_t rotary = config.position == PositionKind::kRope ? num_ropes * config.head_dim : 0;
  // Residual, normed, partial; q, k and v; heads; gate and up; sines and cosines;
  // the packed input of the widest product.
  const int64_t row = 3 * w.hidden + w.embedding + w.qkv + w.q + w.up + rotary + packed;
  const int64_t padding =
      RoundUp(shape.max_batched_tokens, kCpuTileRows) - shape.max_batched_tokens;
  const int64_t logit_rows =
      std::clamp<int64_t>(kCpuLogitChunkBytes / (plan.padded_vocab * 4), 1,
                          std::min(kCpuMaxLogitRows, shape.max_batched_tokens));
  const int64_t logit_row =
      w.hidden + w.embedding + plan.local_vocab + (samples ? plan.padded_vocab : 0);
  // Scores of the heads that share a KV head; packed weights; one row of logits.
  const int64_t seen = RoundUp(shape.max_model_len, kCpuLanes);
  const int64_t thread =
      plan.local_heads / plan.local_kv_heads * seen + scratch + (samples ? plan.padded_vocab : 0);
  return 4 * (shape.max_batched_tokens * row + padding * packed + logit_rows * logit_row +
              kCpuThreads * thread);
}

// Everything in the serving dtype but the logits, which are float32; what a slot
// keeps on the device; what sampling needs for its turns and exchanges.
int64_t CudaActivationBytes(const ModelConfig& config, const ServingShape& shape,
                            const ShardPlan& plan) {
  const Widths w(config, plan);
  const int64_t element = DTypeBytes(shape.dtype);
  const int64_t fp8 = shape.quantization.empty() ? 0 : std::max({w.hidden, w.q, w.mlp}) + 4;
  const int64_t row =
      element * (3 * w.hidden + w.embedding + w.qkv + w.q + w.up + w.mlp) + fp8 + kCudaResultBytes;
  const int64_t logit_row = element * (w.hidden + w.embedding) + 8 * plan.local_vocab +
                            kCudaSampleExchangeBytes * (plan.tp_size > 1 ? 1 + plan.tp_size : 1);
  // Tokens, counts for penalties, biases and ending ids.
  const int64_t slot = 4 * shape.max_model_len + 2 * plan.local_vocab + kCudaSlotBytes;
  const int64_t rotary =
      shape.max_model_len * config.head_dim * 4 * (config.rope_local == config.rope ? 1 : 2);
  const bool widens = shape.kv_dtype.value_or(shape.dtype) != shape.dtype;
  const int64_t widened = widens
                              ? 2 * plan.local_kv_heads * config.head_dim * element *
                                    WidenedKvTokens(shape.max_model_len, shape.max_batched_tokens)
                              : 0;
  return shape.max_batched_tokens * row + widened +
         std::min(shape.max_num_seqs, kCudaMaxLogitRows) * logit_row + shape.max_num_seqs * slot +
         rotary + kCublasWorkspaceBytes;
}

// Of a long step's rows, on cuda: the norms' results, which every rank gathers, and what the
// others send of half of its sums.
int64_t SharedRowBytes(const ModelConfig& config, const ServingShape& shape) {
  const int64_t element = DTypeBytes(shape.dtype);
  const int64_t fp8 = shape.quantization.empty() ? 0 : config.hidden_size + 4;
  return shape.max_batched_tokens * (config.hidden_size * element * 3 / 2 + fp8);
}

int64_t CommunicationBytes(const ModelConfig& config, const ServingShape& shape,
                           const ShardPlan& plan, BackendKind backend) {
  if (plan.tp_size == 1) return 0;
  if (backend == BackendKind::kCpu) return (plan.tp_size - 1) * kCpuBytesPerPeer;
  // NCCL's buffers and the region that peers write into.
  return kNcclBytes + kCudaExchangeBytes + SharedRowBytes(config, shape);
}

// Tokens of whole blocks that fit into `bytes`.
int64_t KvTokens(int64_t bytes, const RankMemory& memory, const ServingShape& shape) {
  if (bytes <= 0) return 0;
  return bytes / (memory.kv_bytes_per_token * shape.block_size) * shape.block_size;
}

int64_t SaturatingMul(int64_t a, int64_t b) {
  int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? kMaxInt : product;
}

int64_t SaturatingAdd(int64_t a, int64_t b) {
  int64_t sum = 0;
  return __builtin_add_overflow(a, b, &sum) ? kMaxInt : sum;
}

std::string Percent(int64_t part, int64_t whole) {
  return absl::StrFormat("%.0f", 100.0 * static_cast<double>(part) / static_cast<double>(whole));
}

std::string Needs(const ServingShape& shape) {
  return absl::StrCat(shape.max_num_seqs, " x ", shape.max_model_len, " tokens");
}

// Fills in what follows from row.memory, and says it in words.
void Judge(const ModelConfig& config, const ServingShape& shape, int64_t memory_bytes,
           PlanRow* row) {
  const auto usable =
      static_cast<int64_t>(shape.memory_utilization * static_cast<double>(memory_bytes));
  const int64_t fixed = row->memory.fixed_bytes();
  const int64_t kv_per_token = row->memory.kv_bytes_per_token;
  row->kv_tokens = KvTokens(usable - fixed, row->memory, shape);
  row->max_model_len = std::min(row->kv_tokens, config.max_position_embeddings);
  row->fits = row->kv_tokens >= shape.max_model_len;
  row->peak_kv_bytes =
      SaturatingMul(SaturatingMul(shape.max_num_seqs, shape.max_model_len), kv_per_token);
  const int64_t peak = SaturatingAdd(fixed, row->peak_kv_bytes);
  row->headroom = row->fits && static_cast<double>(peak) <=
                                   (1.0 - kPlanHeadroom) * static_cast<double>(memory_bytes);
  const std::string limit =
      absl::StrCat(FormatBytes(usable), " (", Percent(usable, memory_bytes), " % of the memory)");
  if (row->headroom) {
    row->reason = absl::StrCat("weights, overhead and ", Needs(shape), " use ", FormatBytes(peak),
                               ", ", Percent(peak, memory_bytes), " % of the memory");
  } else if (row->fits) {
    row->reason =
        absl::StrCat("runs, but ", Needs(shape), " would need ", FormatBytes(peak), ", ",
                     Percent(peak, memory_bytes), " % of the memory; at most ",
                     100 - static_cast<int64_t>(100 * kPlanHeadroom), " % leaves headroom");
  } else if (row->memory.weight_bytes > usable) {
    row->reason =
        absl::StrCat("weights alone need ", FormatBytes(row->memory.weight_bytes), " of ", limit);
  } else if (row->kv_tokens == 0) {
    row->reason = absl::StrCat("weights and overhead need ", FormatBytes(fixed), " of ", limit,
                               ", which leaves no KV cache");
  } else {
    row->reason = absl::StrCat("KV cache for ", row->kv_tokens, " tokens is left of ", limit,
                               ", less than one sequence of ", shape.max_model_len);
  }
}

// The first matrix of one byte whose rows no product of e4m3 can read, or nothing.
const LocalTensor* FirstOddQuantized(const ShardPlan& plan) {
  for (const LocalTensor& tensor : plan.tensors) {
    if (IsQuantizedMatrix(tensor) && tensor.cols % kQuantizedPiece != 0) return &tensor;
  }
  return nullptr;
}

absl::Status CheckQuantizable(const ModelConfig& config, const ShardPlan& plan) {
  const LocalTensor* odd = FirstOddQuantized(plan);
  if (odd == nullptr) return absl::OkStatus();
  std::vector<int64_t> sizes;
  for (const int64_t size : ValidTpSizes(config, 64)) {
    const absl::StatusOr<ShardPlan> other = MakeShardPlan(config, size, 0);
    if (other.ok() && FirstOddQuantized(*other) == nullptr) sizes.push_back(size);
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "quantization fp8: ", odd->name, " would have ", odd->cols, " columns on a rank of tensor ",
      "parallel size ", plan.tp_size, "; a multiple of ", kQuantizedPiece, " is needed; ",
      sizes.empty() ? "no size gives that: serve without quantization"
                    : absl::StrCat("sizes that work: ", absl::StrJoin(sizes, ", "))));
}

}  // namespace

int64_t WidenedKvTokens(int64_t max_model_len, int64_t max_batched_tokens) {
  return std::min(kCudaMaxWidenedTokens, std::max(max_model_len, max_batched_tokens));
}

bool IsQuantizedMatrix(const LocalTensor& tensor) {
  return tensor.is_matrix && absl::StartsWith(tensor.name, "layers.");
}

int64_t WeightBytes(const ShardPlan& plan, DType dtype, const std::string& quantization,
                    BackendKind backend) {
  const int64_t vector_bytes = backend == BackendKind::kCpu ? 4 : DTypeBytes(dtype);
  int64_t bytes = 0;
  for (const LocalTensor& tensor : plan.tensors) {
    const int64_t elements = tensor.rows * tensor.cols;
    if (!tensor.is_matrix) {
      bytes += elements * vector_bytes;
    } else if (!quantization.empty() && IsQuantizedMatrix(tensor)) {
      bytes += elements + tensor.rows * 4;
    } else {
      bytes += elements * DTypeBytes(dtype);
    }
  }
  return bytes;
}

absl::StatusOr<RankMemory> PredictRankMemory(const ModelConfig& config, const ServingShape& shape,
                                             int64_t tp_size, int64_t rank, BackendKind backend) {
  const absl::StatusOr<ShardPlan> plan = MakeShardPlan(config, tp_size, rank);
  if (!plan.ok()) return plan.status();
  if (absl::Status status = CheckShape(config, shape, backend); !status.ok()) return status;
  const DType kv_dtype = shape.kv_dtype.value_or(shape.dtype);
  if (absl::Status status = CheckKvDType(kv_dtype, shape.dtype, backend); !status.ok()) {
    return status;
  }
  if (!shape.quantization.empty()) {
    if (absl::Status status = CheckQuantizable(config, *plan); !status.ok()) return status;
  }
  RankMemory memory;
  memory.weight_bytes = WeightBytes(*plan, shape.dtype, shape.quantization, backend);
  memory.kv_bytes_per_token =
      2 * config.num_layers * plan->local_kv_heads * config.head_dim * DTypeBytes(kv_dtype);
  const bool cpu = backend == BackendKind::kCpu;
  memory.activation_bytes =
      cpu ? CpuActivationBytes(config, shape, *plan) : CudaActivationBytes(config, shape, *plan);
  memory.communication_bytes = CommunicationBytes(config, shape, *plan, backend);
  memory.runtime_bytes = cpu ? 0 : kCudaRuntimeBytes;
  return memory;
}

absl::StatusOr<int64_t> KvBlocksThatFit(const ModelConfig& config, const ServingShape& shape,
                                        int64_t tp_size, BackendKind backend,
                                        int64_t available_bytes) {
  // Rank 0 needs most (see the header), so the blocks that fit there fit everywhere.
  const absl::StatusOr<RankMemory> memory = PredictRankMemory(config, shape, tp_size, 0, backend);
  if (!memory.ok()) return memory.status();
  const int64_t tokens = KvTokens(available_bytes - memory->fixed_bytes(), *memory, shape);
  if (tokens >= shape.max_model_len) return tokens / shape.block_size;

  const int64_t one_sequence = SaturatingMul(memory->kv_bytes_per_token, shape.max_model_len);
  const std::string required = absl::StrCat(
      "a rank needs ", FormatBytes(SaturatingAdd(memory->fixed_bytes(), one_sequence)),
      " (weights ", FormatBytes(memory->weight_bytes), ", activations and communication ",
      FormatBytes(memory->overhead_bytes()), ", KV of one sequence of ", shape.max_model_len,
      " tokens ", FormatBytes(one_sequence), "), but ",
      FormatBytes(std::max<int64_t>(0, available_bytes)), " are available; ");
  const bool shorter_helps = tokens > 0;
  std::string larger;
  for (const int64_t size : ValidTpSizes(config, 64)) {
    if (size <= tp_size || !PredictRankMemory(config, shape, size, 0, backend).ok()) continue;
    larger = absl::StrCat("--tensor-parallel-size ", size);
    break;
  }
  std::string help;
  if (shorter_helps) help = absl::StrCat("--max-model-len ", tokens, " would fit");
  if (!larger.empty()) {
    absl::StrAppend(&help, help.empty() ? "" : ", or try ", larger,
                    help.empty() ? " needs less on each rank" : "");
  }
  if (help.empty()) help = "a smaller --max-num-batched-tokens or more memory is needed";
  return absl::ResourceExhaustedError(absl::StrCat(required, help));
}

absl::StatusOr<PlanReport> PlanForMemory(const ModelConfig& config, const ServingShape& shape,
                                         BackendKind backend, int64_t memory_bytes) {
  if (absl::Status status = CheckShape(config, shape, backend); !status.ok()) return status;
  if (memory_bytes < 1 || !(shape.memory_utilization > 0 && shape.memory_utilization <= 1)) {
    return absl::InvalidArgumentError(
        "memory and its utilization must be above 0, and the "
        "utilization at most 1");
  }
  PlanReport report;
  for (const int64_t tp_size : {1, 2, 4, 8}) {
    PlanRow row;
    row.tp_size = tp_size;
    const absl::StatusOr<RankMemory> memory = PredictRankMemory(config, shape, tp_size, 0, backend);
    if (memory.ok()) {
      row.memory = *memory;
      Judge(config, shape, memory_bytes, &row);
    } else {
      row.reason = std::string(memory.status().message());
    }
    if (row.headroom && !report.minimum_tp_size.has_value()) report.minimum_tp_size = tp_size;
    report.rows.push_back(std::move(row));
  }
  return report;
}

}  // namespace lockstep
