// The seam between the forward pass (worker/decoder.cc) and the hardware: a
// dozen operations at the granularity a fast GPU implementation wants.
//
// Contract:
// - Operations are enqueued: they return nothing, run in the order called, and
//   no value computed in a step (token ids, logits) comes back before Collect.
//   The first failure makes the step's later operations do nothing; Submit or
//   Collect reports it, and the epoch is over.
// - A step may be enqueued while the one before it still runs: its tokens need
//   not have come back. Up to wire::kMaxPlansInFlight steps are uncollected.
// - Every rank calls the same operations with the same arguments, so the ranks'
//   collectives match by construction.
// - Buffers are sized once, from BackendLimits; the executor keeps steps within.
// - Slot state lives here (tokens, block table, sampling counts): a token that
//   a step samples is an input of the next one without passing the host.
// - Not thread-safe: one thread calls, the executor's.
//
// The state of a step, one row a token:
//   residual [rows, hidden]   the residual stream
//   normed   [rows, hidden]   what the next matrix reads
//   partial  [rows, hidden]   a row-parallel product before its all-reduce
#ifndef LOCKSTEP_WORKER_BACKEND_BACKEND_H_
#define LOCKSTEP_WORKER_BACKEND_BACKEND_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/ids.h"
#include "model/model_config.h"
#include "wire/step_plan.h"
#include "worker/batch.h"
#include "worker/comm/communicator.h"

namespace lockstep {

// Of one configuration; the same on every rank.
struct BackendLimits {
  uint32_t max_num_seqs = 0;        // slots are [0, max_num_seqs)
  uint32_t max_batched_tokens = 0;  // rows of a step
  uint32_t max_model_len = 0;       // positions of a sequence
  uint32_t block_size = 16;         // positions of a block
  uint32_t num_kv_blocks = 0;
};

// Names one of the model's norms; kNone: no norm there.
struct NormRef {
  enum class Site { kNone, kInput, kPostAttention, kMlp, kPostMlp, kFinal };
  Site site = Site::kNone;
  int64_t layer = 0;  // not of kFinal
};

enum class RopeTable { kNone, kGlobal, kLocal };

// rows of the vocabulary-parallel embedding -> all-reduce -> * embedding_scale
// -> project_in and learned positions where the model has them -> residual;
// normed = norm(residual), or residual itself.
struct EmbedOp {
  NormRef norm;
};

// normed -> q, k, v (+ bias) -> per-head norm of q and k, where the model has
// it -> rotary -> k and v into the cache.
struct QkvOp {
  int64_t layer = 0;
  RopeTable rope = RopeTable::kNone;
};

// q against the slot's cached positions, causal -> heads side by side.
struct AttentionOp {
  int64_t layer = 0;
  float scale = 1.0f;
  int64_t window = 0;  // positions seen, itself included; 0: all
};

// all-reduce(partial) + bias -> post norm -> added to residual -> next norm -> normed.
struct ReduceOp {
  enum class Source { kAttention, kMlp };
  Source source = Source::kAttention;  // whose bias is added
  int64_t layer = 0;
  NormRef post;                   // before the residual add
  NormRef next;                   // after it
  bool norm_is_residual = false;  // normed also becomes the residual (norm after the add)
};

class Backend {
 public:
  virtual ~Backend() = default;

  // Drops every slot; later collectives go through `comm`, which outlives them.
  virtual absl::Status Attach(Communicator* comm) = 0;

  // Between Attach and the first step. True: the forward pass is to be made once for `rows`,
  // without running, and then EndRecording; ask again. A step like it will only be replayed.
  virtual bool BeginRecording(std::vector<LogitRow>*) { return false; }
  virtual absl::Status EndRecording() { return absl::OkStatus(); }

  virtual void Admit(const NewSequence& sequence) = 0;
  virtual void Grow(Slot slot, absl::Span<const BlockId> blocks) = 0;
  virtual void Release(Slot slot) = 0;

  // One step, in this order. `rows`: whose logits the step will ask for.
  // True: this very pass is recorded (a CUDA graph), and Submit is all that is left.
  virtual bool Begin(absl::Span<const BatchSpan> spans, absl::Span<const LogitRow> rows) = 0;
  virtual void Embed(const EmbedOp& op) = 0;
  virtual void Qkv(const QkvOp& op) = 0;
  virtual void Attention(const AttentionOp& op) = 0;
  virtual void AttentionOutput(int64_t layer) = 0;  // heads x o -> partial
  virtual void ReduceResidualNorm(const ReduceOp& op) = 0;
  virtual void GateUp(int64_t layer) = 0;  // normed -> activation(gate) * up, or activation(up)
  virtual void Down(int64_t layer) = 0;    // -> partial
  // The head over some rows of normed (through project_out where the model has
  // it), gathered where tokens are chosen. At most max_logit_rows() at once.
  virtual void Logits(absl::Span<const LogitRow> rows) = 0;
  // Samples or scores the rows of the last Logits.
  virtual void Sample(absl::Span<const LogitRow> rows) = 0;
  // Makes the sampled tokens known on every rank, and lets the step run.
  virtual absl::Status Submit() = 0;
  // Of the oldest step that was submitted and not collected: whether Collect
  // would return at once.
  virtual bool Done() = 0;
  // Waits for it. Its output, or its failure.
  virtual absl::StatusOr<StepOutput> Collect() = 0;
  // Waits for every step that was submitted, within the time that a step may
  // take; drops their outputs. False: the device does not answer, or is lost,
  // and the process is of no more use.
  virtual bool Drain() = 0;

  // The same on every rank.
  virtual int64_t max_logit_rows() const = 0;

  // As allocated.
  virtual int64_t weight_bytes() const = 0;
  virtual int64_t kv_bytes() const = 0;
  // What Attach's communicator is to let the ranks share (CommunicatorOptions).
  virtual int64_t shared_bytes() const { return 0; }
  // Buffers of a step, and what libraries take for themselves; nothing where a
  // backend cannot tell.
  virtual std::optional<int64_t> activation_bytes() const { return std::nullopt; }
  virtual std::optional<int64_t> runtime_bytes() const { return std::nullopt; }
  virtual std::string description() const = 0;  // "cpu, avx512, 2 threads"
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_BACKEND_BACKEND_H_
