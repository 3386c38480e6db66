// The last layer of a step with prompts in it. Of a row that no token is sampled from only its key
// and value are wanted there: from attention on, the step is of the sampled rows alone, each a
// single row with all of its context in the cache, as a decoded one is. (A 32nd of a prompt's
// work, in an 8B; a chunk that does not end its prompt does no more than write keys and values.)
#include <algorithm>

#include "kernels/embed.h"
#include "worker/backend/cuda/backend_impl.h"

namespace lockstep::cuda {

bool CudaBackend::MayNarrow(absl::Span<const LogitRow> rows) const {
  // Of more, attention of single rows takes as long as is saved.
  if (2 * rows.size() > static_cast<size_t>(rows_) ||
      rows.size() > static_cast<size_t>(max_logit_rows_) ||
      rows.size() * qkv_width_ * kernels::TypeBytes(type_) > buffers_.up.bytes()) {
    return false;
  }
  return std::all_of(rows.begin(), rows.end(), [](const LogitRow& row) { return row.samples; });
}

// Before its QKV, which is of all rows.
void CudaBackend::BeginLastLayer() {
  if (!narrows_ || !status_.ok() || !halved_) return;
  JoinHalves();
  if (dealt_e4m3_) {
    quantized_from_ = Normed();
    quantized_ = SharedQuantized();
  }
}

void CudaBackend::Narrow() {
  if (!narrows_ || !status_.ok()) return;
  const int count = static_cast<int>(logit_rows_.size());
  const kernels::GatherRowsArgs rows = {
      .type = type_, .index = io_.arrays().logit_row, .num_rows = count};
  kernels::GatherRowsArgs qkv = rows, residual = rows;
  qkv.in = buffers_.qkv.get();
  qkv.width = qkv_width_;
  qkv.out = buffers_.up.get();  // empty until gate-up
  Check(kernels::GatherRows(launch(), qkv), "gathering rows");
  residual.in = buffers_.residual.get();
  residual.width = hidden_;
  residual.out = buffers_.chosen.get();
  residual.held = HeldResidual();
  Check(kernels::GatherRows(launch(), residual), "gathering rows");
  if (status_.ok() && count > 0 && (deals_residual_ || by_rows_)) {
    bool fused = false;
    status_ = collectives_.AllReduce(launch(),
                                     {.type = type_,
                                      .rows = count,
                                      .hidden = hidden_,
                                      .in = buffers_.chosen.get(),
                                      .out = buffers_.chosen.get()},
                                     &fused);
  }
  Check(cudaMemcpyAsync(buffers_.residual.get(), buffers_.chosen.get(),
                        size_t(count) * hidden_ * kernels::TypeBytes(type_),
                        cudaMemcpyDeviceToDevice, stream_),
        "gathering rows");
  narrowed_ = true;
  by_rows_ = deals_residual_ = deals_attention_ = false;
  part_ = {.first = 0, .rows = count, .decode_rows = count};
  max_context_ = 0;
  for (const LogitRow& row : logit_rows_) {
    const BatchSpan& span = spans_[row.span];
    max_context_ = std::max(max_context_, static_cast<int>(span.begin + span.count));
  }
}

kernels::HeldRows CudaBackend::HeldResidual() const {
  kernels::HeldRows held;
  if (deals_residual_) {
    held.of = collectives_.size();
    held.rank = static_cast<int>(plan_.rank);
  } else if (by_rows_) {
    for (int half = 0; half < 2; ++half) {
      const kernels::RowShare own = collectives_.OwnRows(halves_[half].rows);
      held.begin[half] = halves_[half].first + own.first;
      held.end[half] = held.begin[half] + own.rows;
    }
  }
  return held;
}

}  // namespace lockstep::cuda
