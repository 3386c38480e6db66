#include <algorithm>
#include <utility>

#include "common/check.h"
#include "worker/backend/cuda/backend_impl.h"

namespace lockstep::cuda {
namespace {

// A longer pause between two steps is a server without work.
constexpr uint64_t kIdleWithoutWorkNs = 20'000'000;
// A plan of so many rows is copied to the device; one of fewer it reads itself.
constexpr int kCopiedRows = 256;

}  // namespace

bool CudaBackend::IsDecode(absl::Span<const BatchSpan> spans,
                           absl::Span<const LogitRow> rows) const {
  if (spans.size() != rows.size() || spans.size() > static_cast<size_t>(max_logit_rows_)) {
    return false;
  }
  for (size_t i = 0; i < spans.size(); ++i) {
    if (spans[i].count != 1 || rows[i].row != i || !rows[i].samples) return false;
  }
  return true;
}

// Rows from `cut` on are the second half. A span that the cut goes through becomes
// two, as in StepIo::Write.
void CudaBackend::SetParts(int cut, int decode_rows) {
  Part parts[2];
  parts[0] = {.first = 0, .rows = cut, .decode_rows = decode_rows};
  parts[1] = {.first = cut, .rows = rows_ - cut};
  int row = decode_rows;
  span_ends_.clear();
  for (size_t s = decode_rows; s < spans_.size(); ++s) {
    const int end = row + static_cast<int>(spans_[s].count);
    while (row < end) {
      Part& part = parts[row >= cut ? 1 : 0];
      const int count = (row < cut ? std::min(end, cut) : end) - row;
      ++part.spans;
      part.max_count = std::max(part.max_count, count);
      row += count;
      span_ends_.push_back(static_cast<int>(spans_[s].begin + spans_[s].count) - (end - row));
    }
  }
  parts[1].first_span = parts[0].spans;
  halves_[0] = part_ = parts[0];
  halves_[1] = parts[1];
}

bool CudaBackend::Begin(absl::Span<const BatchSpan> spans, absl::Span<const LogitRow> rows) {
  replay_ = nullptr;
  capturing_ = folded_ = stacked_ = narrowed_ = false;
  reduce_pending_ = false;  // a captured row's, which its stack takes by itself
  quantized_from_ = nullptr;
  if (!status_.ok()) return true;
  collectives_.ResetStats();
  spans_.assign(spans.begin(), spans.end());
  logit_rows_.assign(rows.begin(), rows.end());
  rows_ = max_context_ = sampled_rows_ = 0;
  int decode_rows = 0;
  for (const BatchSpan& span : spans) {
    if (decode_rows == rows_ && span.count == 1) {
      ++decode_rows;
      max_context_ = std::max(max_context_, static_cast<int>(span.begin + 1));
    }
    rows_ += static_cast<int>(span.count);
  }
  LOCKSTEP_CHECK(rows_ <= static_cast<int>(limits_.max_batched_tokens));
  needs_ = {};
  for (const LogitRow& row : rows) {
    const Slots::State& slot = slots_.At(spans[row.span].slot);
    needs_ = needs_ | (row.samples ? slot.needs : kernels::NeedsOf(slot.params, true));
  }
  halved_ = MayHalve(rows_, decode_rows);
  by_rows_ = halved_ && collectives_.deals_rows();
  dealt_e4m3_ = false;
  deals_residual_ = !halved_ && MayDealResidual(rows_);
  // Of single rows alone attention also writes the keys and values: of all of them.
  narrows_ = decode_rows < rows_ && MayNarrow(rows);
  stage_.clear();
  const int cut = halved_ ? CutOf(rows_) : rows_;
  io_.Write(spans, rows, cut);
  SetParts(cut, decode_rows);

  if (use_graphs_ && rows_ > 0 && IsDecode(spans, rows)) {
    RoundUpTo(graphs_.KeyFor(rows_, max_context_, needs_));
    replay_ = graphs_.Find(key_);
    if (replay_ == nullptr) BeginCapture();
    return replay_ != nullptr;
  }
  kernels::StepIo io = io_.io();
  if (rows_ >= kCopiedRows && status_.ok()) status_ = io_.CopyInbox(stream_, &io);
  Check(kernels::PrepareStep({.stream = stream_, .pdl = false}, io, io_.arrays(), rows_,
                             static_cast<int>(rows.size())),
        "preparing a step");
  PlanAttention();
  return false;
}

void CudaBackend::RoundUpTo(const StepGraphs::Key& key) {
  key_ = key;
  rows_ = key.rows;
  part_ = {.first = 0, .rows = rows_, .decode_rows = rows_};
  max_context_ = key.max_context;
  needs_ = key.needs;
}

void CudaBackend::BeginCapture() {
  capturing_ = true;
  narrows_ = narrowed_ = false;
  deals_residual_ = MayDealResidual(rows_);
  folded_ = can_fold_ && rows_ == 1;
  stacked_ = can_stack_ && folded_;
  reduce_pending_ = false;
  exchange_ = 0;
  residual_ = buffers_.residual.get();
  Check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capturing a step");
  Check(
      kernels::PrepareStep({.stream = stream_, .pdl = false}, io_.io(), io_.arrays(), rows_, rows_),
      "preparing a step");
  PlanAttention();
}

// Also of a capture that something went wrong in: no stream is left capturing.
absl::Status CudaBackend::EndCapture() {
  capturing_ = false;
  Publish();
  if (!status_.ok()) {
    cudaGraph_t graph = nullptr;
    (void)cudaStreamEndCapture(stream_, &graph);
    if (graph != nullptr) (void)cudaGraphDestroy(graph);
    return status_;
  }
  absl::StatusOr<const StepGraphs::Graph*> graph =
      graphs_.EndCapture(stream_, key_, collectives_.stats());
  if (!graph.ok()) return status_ = graph.status();
  replay_ = *graph;
  return absl::OkStatus();
}

bool CudaBackend::BeginRecording(std::vector<LogitRow>* rows) {
  if (!status_.ok() || to_record_.empty() || collectives_.given_up()) return false;
  RoundUpTo(to_record_.back());
  to_record_.pop_back();
  collectives_.ResetStats();
  stage_.clear();
  halved_ = by_rows_ = false;
  quantized_from_ = nullptr;
  sampled_rows_ = 0;
  rows->assign(rows_, {.samples = true});
  lt_->TimeNewShapes(true);  // no step is under way yet
  BeginCapture();
  return true;
}

absl::Status CudaBackend::EndRecording() {
  lt_->TimeNewShapes(false);
  return EndCapture();
}

void CudaBackend::Publish() {
  if (!status_.ok()) return;
  Check(kernels::PublishStep(launch(), io_.io(), sampled_rows_, sampling_.results(),
                             needs_.score ? sampling_.logprobs() : nullptr),
        "publishing a step");
}

absl::Status CudaBackend::Submit() {
  if (halved_) JoinHalves();
  if (capturing_) {
    (void)EndCapture();
  } else if (replay_ == nullptr) {
    Publish();
  }
  if (!status_.ok()) return status_;
  if (replay_ != nullptr) Check(cudaGraphLaunch(replay_->exec, stream_), "launching a step");
  if (!status_.ok()) return status_;
  InFlight& step = in_flight_.emplace_back();
  step.number = io_.Submitted();
  step.collectives = replay_ != nullptr ? replay_->collectives : collectives_.stats();
  for (const LogitRow& row : logit_rows_) {
    const BatchSpan& span = spans_[row.span];
    step.slots.push_back(span.slot);
  }
  uint32_t first_row = 0;
  size_t next = 0;
  for (size_t s = 0; s < spans_.size(); ++s) {
    for (; next < logit_rows_.size() && logit_rows_[next].span == s; ++next) {
      step.positions.push_back(spans_[s].begin + logit_rows_[next].row - first_row);
    }
    first_row += spans_[s].count;
  }
  step.rows = std::move(logit_rows_);
  return absl::OkStatus();
}

bool CudaBackend::Done() {
  if (in_flight_.empty()) return false;
  if (io_.IsDone(in_flight_.front().number)) return true;
  // A failure never writes the number: look now and then.
  thread_local uint32_t polls = 0;
  if (++polls % 4096 != 0) return false;
  const cudaError_t error = cudaStreamQuery(stream_);
  if (error == cudaErrorNotReady) return false;
  return true;  // Collect says what happened
}

absl::StatusOr<StepOutput> CudaBackend::Collect() {
  LOCKSTEP_CHECK(!in_flight_.empty());
  const InFlight step = std::move(in_flight_.front());
  in_flight_.pop_front();
  if (!io_.IsDone(step.number)) {
    Check(cudaStreamSynchronize(stream_), "a step on the GPU");
    if (status_.ok() && !io_.IsDone(step.number)) {
      status_ = absl::InternalError("a step ended without its result");
    }
    if (!status_.ok()) return status_ = collectives_.Explain(status_);
  }
  StepOutput output;
  output.collectives = step.collectives;
  const kernels::StepStamp& stamp = io_.stamp(step.number);
  output.device_ns = stamp.end_ns - stamp.begin_ns;
  const uint64_t exchanged = stamp.collectives.wait_ns + stamp.collectives.transfer_ns;
  if (stamp.sampling_begin_ns != 0) {
    output.sampling_ns = stamp.end_ns - std::min(stamp.end_ns, stamp.sampling_begin_ns + exchanged);
  }
  output.collectives.wait_ns = stamp.collectives.wait_ns;
  output.collectives.transfer_ns = stamp.collectives.transfer_ns;
  output.collectives.aside_ns = stamp.collectives.aside_ns;
  const uint64_t gap = stamp.begin_ns - last_end_ns_;
  if (last_end_ns_ != 0 && gap < kIdleWithoutWorkNs) output.device_idle_ns = gap;
  last_end_ns_ = stamp.end_ns;
  if (plan_.rank != 0) return output;
  const kernels::SampledRow* results = io_.results(step.number);
  const kernels::RowLogprobs* logprobs = io_.logprobs(step.number);
  for (size_t i = 0; i < step.rows.size(); ++i) {
    AppendResult(step.rows[i], step.slots[i], step.positions[i], results[i], logprobs[i], &output);
  }
  return output;
}

bool CudaBackend::Drain() {
  in_flight_.clear();
  // A step that failed midway may not have joined its halves.
  const bool drained = cudaStreamSynchronize(exchange_stream_) == cudaSuccess &&
                       cudaStreamSynchronize(stream_) == cudaSuccess;
  // NCCL does not end a communicator before the last of its graphs. Others are let go of where no
  // deadline runs (Attach).
  if (!collectives_.has_peers()) graphs_.Clear();
  replay_ = nullptr;
  return drained;
}

}  // namespace lockstep::cuda
