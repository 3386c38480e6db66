// What goes to the device before a step and comes back after it, without a copy
// call or a host wait: the host writes an entry of a ring in mapped memory, the
// step's first kernel reads it; the step's last kernel writes an entry of another
// ring, and its sequence number last.
//
//   host  inbox[s % kStepRing] --PrepareStep--> device arrays --step--> results
//   host  outbox[s % kStepRing] <--PublishStep-- results
//
// Which entry is next is counted on the device, so both kernels may be captured
// once and replayed for ever. Step s is prepared after step s - 1 was published.
#ifndef LOCKSTEP_KERNELS_STEP_H_
#define LOCKSTEP_KERNELS_STEP_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attention_prefill.h"
#include "kernels/peers.h"
#include "kernels/sample.h"
#include "kernels/types.h"

namespace lockstep::kernels {

inline constexpr int kStepRing = 4;

// block_table[slot][index] = block.
struct TableUpdate {
  int32_t slot = 0, index = 0, block = 0;
};

// A row whose logits the step asks for.
struct LogitRowInput {
  int32_t row = -1;  // of the step
  int32_t slot = -1;
  int32_t position = 0;  // of the row's input token
  int32_t scores = 0;    // 1: scores the known next token instead of sampling one
};

// The most that a step brings; fixed at start.
struct StepCapacity {
  int rows = 0;
  int logit_rows = 0;
  int spans = 0;
  int updates = 0;
};

// Counts at the head of an inbox entry; the arrays follow it: slot [rows],
// position [rows], logit rows, spans, updates.
struct alignas(64) StepHeader {
  int32_t rows = 0, logit_rows = 0, spans = 0, updates = 0;
};

struct InboxLayout {
  size_t slot = 0, position = 0, logit_rows = 0, spans = 0, updates = 0;  // offsets in an entry
  size_t bytes = 0;                                                       // of an entry
};
InboxLayout MakeInboxLayout(const StepCapacity& capacity);

// The outbox entry: this, then SampledRow [logit_rows], then RowLogprobs [logit_rows].
struct alignas(64) StepStamp {
  uint64_t sequence = 0;              // counted from 1; written last
  uint64_t begin_ns = 0, end_ns = 0;  // the device's globaltimer
  // Of the last batch of logits, less what collectives had taken until then; 0: none. So
  // end_ns - sampling_begin_ns, less all that they took, is sampling without its exchanges.
  uint64_t sampling_begin_ns = 0;
  CollectiveClock collectives;  // of the step
};

// Of an outbox entry: the next one's stamp is aligned again, whatever the capacity.
constexpr size_t OutboxBytes(const StepCapacity& capacity) {
  const size_t bytes = sizeof(StepStamp) + static_cast<size_t>(capacity.logit_rows) *
                                               (sizeof(SampledRow) + sizeof(RowLogprobs));
  return (bytes + alignof(StepStamp) - 1) / alignof(StepStamp) * alignof(StepStamp);
}

struct StepArrays {
  int32_t* slot = nullptr;       // [rows]
  int32_t* position = nullptr;   // [rows]
  int32_t* logit_row = nullptr;  // [logit_rows], each
  int32_t* logit_slot = nullptr;
  int32_t* logit_position = nullptr;
  uint8_t* logit_scores = nullptr;
  PrefillSpan* spans = nullptr;    // [spans]
  int32_t* block_table = nullptr;  // [slots][table_stride]
  int table_stride = 0;
};

struct StepIo {
  const std::byte* inbox = nullptr;  // kStepRing entries; the device's view of mapped memory
  std::byte* outbox = nullptr;
  uint64_t* sequence = nullptr;  // on the device; steps published so far
  uint64_t* begin_ns = nullptr;  // on the device, as what follows
  // For SampleArgs and Peers; cleared by PublishStep.
  uint64_t* sampling_begin_ns = nullptr;
  CollectiveClock* collectives = nullptr;
  InboxLayout inbox_layout;
  StepCapacity capacity;
};

// Rows up to pad_rows and logit rows up to pad_logit_rows that the entry does
// not have become padding: slot -1.
cudaError_t PrepareStep(const Launch& launch, const StepIo& io, const StepArrays& arrays,
                        int pad_rows, int pad_logit_rows);

// logit_rows of `results` (and of `logprobs`, unless null) to the outbox.
cudaError_t PublishStep(const Launch& launch, const StepIo& io, int logit_rows,
                        const SampledRow* results, const RowLogprobs* logprobs);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_STEP_H_
