// From logits that are split over the ranks by vocabulary to one token a row, on
// every rank, without gathering the logits. The meaning is worker/sampler.h's:
// logit_bias, penalties, min_tokens mask, temperature, top_k, top_p, min_p;
// greedy ties to the lowest id; log-probabilities of the logits as they came.
//
// Sampling is a list of phases. After a phase that exchanges, the caller
// all-gathers args.send[phase] into args.gathered[phase] (in rank order), on the
// same stream. With one rank there is nothing to gather: gathered == send.
//
//   for (SamplePhase phase : kSamplePhases) {
//     if (!HasPhase(args.needs, phase)) continue;
//     RunSamplePhase(launch, phase, args);
//     if (tp > 1) AllGather(args.send[phase], args.gathered[phase],
//                           args.rows * SampleExchangeBytes(phase));
//   }
//
//   phase     exchanged, a row                                      bytes
//   kMaximum  largest (value, lowest id), or that it is poisoned        8
//   kCoarse   tokens and mass by 2,048 classes of probability      24,576
//   kFine     tokens by 2,048 classes within the class cut          8,192
//   kNested   the same for top_p within top_k                       8,192
//   kMass     mass kept, where the histograms do not tell it           16
//   kChoose   the chosen token and its logit                            8
//   kScore    parts of the log-probabilities                          176
//   kFinish   nothing: writes tokens, counts and results                0
//
// Greedy batches are kMaximum, one 8 byte exchange and kFinish.
//
// How a token is drawn. z = (max - value) / temperature in units of 2^-17 is the
// token's class q, its weight exp(-z) an integer in units of 2^-38. Tokens are
// ordered by (q, id); top_k and top_p keep a prefix of that order, of which min_p
// drops what weighs too little. The token is the one, in order of id, at which the
// running sum of kept weights passes u of the total, u = UniformAt(seed, position).
// All sums are of integers: the token depends neither on batch mates nor on the
// order of the threads nor on tp. worker/sampler.cc does the same in floating
// point: the same seed draws the same token except where u falls within about 1e-5
// of a boundary.
//
// Every launcher may be captured in a graph. A batch has the same rows and the same
// needs in all its phases and on every rank. Padding rows (slot -1) are skipped and
// nothing is written for them.
#ifndef LOCKSTEP_KERNELS_SAMPLE_H_
#define LOCKSTEP_KERNELS_SAMPLE_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/peers.h"
#include "kernels/types.h"

namespace lockstep::kernels {

inline constexpr int kMaxTopLogprobs = 20;
inline constexpr int kMaxBias = 1024;
inline constexpr int kMaxEndingIds = 256;

// How a slot samples; uploaded when the sequence is admitted.
struct alignas(16) SlotParams {
  float temperature = 0.0f;  // 0: greedy
  float top_p = 1.0f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  uint32_t top_k = 0;  // 0: off
  int32_t min_tokens = 0;
  int64_t seed = 0;
  int32_t num_prompt_tokens = 0;
  int32_t logprobs = -1;         // alternatives of a sampled token; -1: none
  int32_t prompt_logprobs = -1;  // alternatives of a scored token
  int32_t num_bias = 0;          // <= kMaxBias; of distinct ids
  int32_t num_ending_ids = 0;    // <= kMaxEndingIds
  int32_t padding = 0;
};

// What the slots of a batch ask for, together. A superset of it is right too,
// only slower: a graph may be captured for more than its batch needs.
struct SampleNeeds {
  bool adjust = false;  // bias, penalties or min_tokens
  bool draw = false;    // any row not greedy
  bool cut = false;     // of those, any with top_k or top_p
  bool nested = false;  // any with both
  bool score = false;   // log-probabilities
  bool min_p = false;   // any not greedy with min_p
};

inline SampleNeeds operator|(const SampleNeeds& a, const SampleNeeds& b) {
  return {a.adjust || b.adjust, a.draw || b.draw,   a.cut || b.cut,
          a.nested || b.nested, a.score || b.score, a.min_p || b.min_p};
}

// scores: the slot has a row that scores a prompt token in this batch.
inline SampleNeeds NeedsOf(const SlotParams& p, bool scores = false) {
  SampleNeeds needs;
  needs.adjust = p.num_bias > 0 || p.num_ending_ids > 0 || p.repetition_penalty != 1.0f ||
                 p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
  needs.draw = p.temperature > 0.0f && p.top_k != 1;
  needs.cut = needs.draw && (p.top_k > 0 || p.top_p < 1.0f);
  needs.nested = needs.draw && p.top_k > 0 && p.top_p < 1.0f;
  needs.score = p.logprobs >= 0 || scores;
  needs.min_p = needs.draw && p.min_p > 0.0f;
  return needs;
}

enum SamplePhase : int { kMaximum, kCoarse, kFine, kNested, kMass, kChoose, kScore, kFinish };
inline constexpr int kNumSamplePhases = 8;
inline constexpr SamplePhase kSamplePhases[kNumSamplePhases] = {kMaximum, kCoarse, kFine,  kNested,
                                                                kMass,    kChoose, kScore, kFinish};

constexpr bool HasPhase(const SampleNeeds& needs, SamplePhase phase) {
  switch (phase) {
    case kCoarse:
    case kFine:
      return needs.cut;
    case kNested:
      return needs.nested;
    case kMass:
      // The histograms tell the mass of what top_k and top_p keep.
      return needs.draw && (needs.min_p || !needs.cut);
    case kChoose:
      return needs.draw || needs.score;
    case kScore:
      return needs.score;
    default:
      return true;
  }
}

// Per row and rank.
constexpr size_t SampleExchangeBytes(SamplePhase phase) {
  constexpr size_t kBytes[kNumSamplePhases] = {
      8, 2048 * 12, 2048 * 4, 2048 * 4, 16, 8, 16 + 8 * kMaxTopLogprobs, 0};
  return kBytes[phase];
}

struct alignas(8) SampledRow {
  int32_t token = 0;
  uint32_t flags = 0;
};
inline constexpr uint32_t kSampledPoisoned = 1;  // NaN or infinity: token is 0
inline constexpr uint32_t kSampledLogprobs = 2;  // the row's RowLogprobs is filled

struct RowLogprobs {
  float logprob = 0.0f;  // of the token
  uint32_t rank = 0;     // 1: the most likely
  uint32_t num_top = 0;
  int32_t top_id[kMaxTopLogprobs] = {};  // most likely first
  float top_logprob[kMaxTopLogprobs] = {};
};

// Device pointers, unless said otherwise. The pointers of what needs do not ask
// for may be null.
struct SampleArgs {
  SampleNeeds needs;
  int rows = 0;
  int rank = 0;
  int tp_size = 1;

  // Column c of a rank's logits is id first_vocab + c; columns beyond the
  // vocabulary are not counted in `columns` and never read.
  const float* logits = nullptr;  // [rows][logits_stride]
  int64_t logits_stride = 0;      // a multiple of 4 is faster
  int first_vocab = 0;
  int columns = 0;  // 0: the rank has padding only

  const int32_t* slot = nullptr;      // [rows]; -1: padding
  const int32_t* position = nullptr;  // [rows] of the row's input token
  // [rows] or null: not 0 where the row scores tokens[slot][position + 1], which
  // is known, instead of sampling it.
  const uint8_t* scores = nullptr;

  // By slot.
  const SlotParams* params = nullptr;   // [slots]
  const int32_t* bias_ids = nullptr;    // [slots][kMaxBias]
  const float* bias_values = nullptr;   // [slots][kMaxBias]
  const int32_t* ending_ids = nullptr;  // [slots][kMaxEndingIds]
  uint16_t* counts = nullptr;           // [slots][counts_stride], see BuildTokenCounts
  int64_t counts_stride = 0;
  int32_t* tokens = nullptr;  // [slots][tokens_stride]; a token beyond it is not stored
  int64_t tokens_stride = 0;
  // [slots], 0 at admission; set when a row of the slot is poisoned, after which
  // every token sampled for it is poisoned.
  uint32_t* poisoned = nullptr;

  // Device memory or mapped host memory, not read.
  SampledRow* results = nullptr;    // [rows]
  RowLogprobs* logprobs = nullptr;  // [rows]

  // By phase: [rows][SampleExchangeBytes] and [tp_size][rows][SampleExchangeBytes],
  // 16 byte aligned; send may be the rank's part of gathered. send[kMaximum] is
  // all zeros between batches: clear it once, kFinish restores it.
  void* send[kNumSamplePhases] = {};
  void* gathered[kNumSamplePhases] = {};

  void* workspace = nullptr;  // SampleWorkspaceBytes, 256 byte aligned
  // Unless null: when kMaximum began, by the device's globaltimer, less what the step's
  // collectives had taken until then; see StepStamp.
  uint64_t* begin_ns = nullptr;
  const CollectiveClock* collectives = nullptr;  // wherever begin_ns is
};

// columns: the most any rank has. Kept between the phases of a batch only.
size_t SampleWorkspaceBytes(const SampleNeeds& needs, int rows, int columns);

// cudaErrorInvalidValue: args that cannot be (a null pointer that needs ask for,
// a phase out of needs).
cudaError_t RunSamplePhase(const Launch& launch, SamplePhase phase, const SampleArgs& args);

// Counts a slot's tokens, tokens[slot][0 .. num_tokens), for its penalties:
// counts[slot][column] = times generated (at most 32,767) + 0x8000 where it is in
// the prompt. At admission, for slots with penalties.
struct TokenCountArgs {
  uint16_t* counts = nullptr;  // [slots][counts_stride], counts_stride even
  int64_t counts_stride = 0;
  const int32_t* tokens = nullptr;
  int64_t tokens_stride = 0;
  int slot = 0;
  int num_prompt_tokens = 0;
  int num_tokens = 0;
  int first_vocab = 0;
  int columns = 0;
};
cudaError_t BuildTokenCounts(const Launch& launch, const TokenCountArgs& args);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_SAMPLE_H_
