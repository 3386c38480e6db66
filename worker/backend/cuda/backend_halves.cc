// A long step over several ranks, its rows in two halves: while one half's sum is
// made by all ranks, the other half's products run.
//
//   stream_           | QKV..O 0 | QKV..O 1 | up, down 0 | up, down 1 | QKV..O 0 | ...
//   exchange_stream_             | sum 0    | sum 1      | sum 0      | sum 1    | ...
//
// Where GPUs reach each other's memory a sum is made by rows that are dealt out to the
// ranks (kernels/row_exchange.h), each of which also adds its rows to the residual, norms
// and quantises them; else by NCCL, and every rank does the rest for all rows.
//
// The operations between two reductions are kept (stage_) and run for each half in
// turn, so that the order of a half's rows, and of a sequence's positions, is that
// of the whole: the second half's attention finds the first half's keys. The ranks
// cut alike, since they cut by the plan alone.
#include "worker/backend/cuda/backend_impl.h"
#include "worker/comm/cuda/nccl_communicator.h"

namespace lockstep::cuda {
namespace {

// With fewer the halves' products leave much of the device idle (8B at tp 2, by copies: halves
// of 1,536 tokens take 21.5 ms and the whole 22.3, of 1,024 15.8 and 15.2).
constexpr int kLeastRows = 1'536, kLeastRowsByNccl = 2'048;
constexpr int kCutRows = 128;  // of a tile of products and attention
// Of what a row multiplies in a layer for every element that it sums. Products that
// take so much longer than the sums leave them no multiprocessors: a sum begins when
// some block of theirs ends (70B at tp 2, 6,144 tokens: 735 ms instead of 761).
constexpr int64_t kProductsWithoutCare = 20'000;

}  // namespace

absl::Status CudaBackend::PrepareHalves() {
  int device = 0, least = 0, greatest = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) error = cudaDeviceGetStreamPriorityRange(&least, &greatest);
  if (error == cudaSuccess) {
    error = cudaStreamCreateWithPriority(&exchange_stream_, cudaStreamNonBlocking, greatest);
  }
  for (cudaEvent_t* event : {&produced_[0], &produced_[1], &reduced_[0], &reduced_[1]}) {
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(event, cudaEventDisableTiming);
  }
  shared_rows_ =
      SharedRows(limits_.max_batched_tokens, CutOf(static_cast<int>(limits_.max_batched_tokens)),
                 hidden_, hidden_ * kernels::TypeBytes(type_), Quantized(model_.layers[0].qkv),
                 static_cast<int>(plan_.tp_size));
  return ToStatus(error, "a stream of all-reduces");
}

int CudaBackend::CutOf(int rows) { return (rows / 2 + kCutRows - 1) / kCutRows * kCutRows; }

int CudaBackend::ProductsMultiprocessors() const {
  if (by_rows_) return 0;  // copy engines need none
  const int64_t products = int64_t{qkv_width_} + q_width_ + up_width_ + intermediate_;
  return products < kProductsWithoutCare ? multiprocessors_ - NcclCommunicator::kMaxBlocks : 0;
}

bool CudaBackend::MayHalve(int rows, int decode_rows) const {
  if (collectives_.size() == 1 || decode_rows > rows / 2) return false;
  if (collectives_.has_peers()) return collectives_.deals_rows() && rows >= kLeastRows;
  return rows >= kLeastRowsByNccl;
}

bool CudaBackend::MayDealResidual(int rows) const {
  // Fewer are summed by all ranks, each for itself: that takes one way over the links, not two.
  if (rows <= kernels::kMaxPushedRows || collectives_.size() == 1 ||
      config_.norm != NormKind::kRms || !config_.norm_before || config_.sandwich_norms ||
      !config_.norm_affine || !config_.final_norm) {
    return false;
  }
  int any = 0;  // whose address stands for the real ones'
  return collectives_.TakesRows(
      {.type = type_, .rows = rows, .hidden = hidden_, .residual = &any, .norm_weight = &any});
}

void CudaBackend::RunHalves(const ReduceOp& op) {
  for (int half = 0; half < 2 && status_.ok(); ++half) {
    part_ = halves_[half];
    if (dealt_e4m3_) {
      quantized_from_ = Normed();
      quantized_ = SharedQuantized();
    }
    Check(cudaStreamWaitEvent(stream_, reduced_[half], 0), "waiting for a half's sum");
    for (const std::function<void()>& operation : stage_) {
      if (status_.ok()) operation();
    }
    Check(cudaEventRecord(produced_[half], stream_), "a half's products");
    Check(cudaStreamWaitEvent(exchange_stream_, produced_[half], 0), "a half's products");
    if (status_.ok() && by_rows_) ReduceByRows(op);
    if (status_.ok() && !by_rows_) Reduce({.stream = exchange_stream_, .pdl = false}, op);
    Check(cudaEventRecord(reduced_[half], exchange_stream_), "a half's sum");
  }
  stage_.clear();
  dealt_e4m3_ = by_rows_ && Quantized(ReaderOf(op));
}

kernels::QuantizedRows CudaBackend::SharedQuantized() const {
  return {
      .values = collectives_.shared(shared_rows_.quantized) + size_t(part_.first) * hidden_,
      .scales = reinterpret_cast<float*>(collectives_.shared(shared_rows_.scales)) + part_.first};
}

// Every rank has its share of the residual's rows; nobody reads the others'.
void CudaBackend::ReduceByRows(const ReduceOp& op) {
  const Part half = part_;
  const bool e4m3 = Quantized(ReaderOf(op));
  status_ = collectives_.SumOwnRows(exchange_stream_, type_, half.rows, hidden_,
                                    Rows(buffers_.partial, hidden_));
  const kernels::RowShare own = collectives_.OwnRows(half.rows);
  part_.first += own.first;
  part_.rows = own.rows;
  if (status_.ok()) {
    AddAndNorm({.stream = exchange_stream_, .pdl = false}, op, e4m3 ? nullptr : Normed(),
               e4m3 ? SharedQuantized() : kernels::QuantizedRows());
  }
  part_ = half;
  const size_t first = half.first, row_bytes = hidden_ * kernels::TypeBytes(type_);
  const auto array = [&](size_t offset, size_t bytes) {
    return kernels::GatheredRows{.offset = offset + first * bytes, .row_bytes = bytes};
  };
  if (!status_.ok()) return;
  if (e4m3) {
    status_ = collectives_.GatherRows(
        exchange_stream_,
        {array(shared_rows_.quantized, hidden_), array(shared_rows_.scales, sizeof(float))},
        half.rows);
  } else {
    status_ = collectives_.GatherRows(exchange_stream_, {array(shared_rows_.normed, row_bytes)},
                                      half.rows);
  }
}

void CudaBackend::JoinHalves() {
  for (cudaEvent_t event : reduced_) {
    Check(cudaStreamWaitEvent(stream_, event, 0), "waiting for a half's sum");
  }
  halved_ = false;
  stage_.clear();
  part_ = {.first = 0,
           .rows = rows_,
           .decode_rows = halves_[0].decode_rows,
           .first_span = 0,
           .spans = halves_[0].spans + halves_[1].spans,
           .max_count = std::max(halves_[0].max_count, halves_[1].max_count)};
}

}  // namespace lockstep::cuda
