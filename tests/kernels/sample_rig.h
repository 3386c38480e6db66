// Virtual ranks on one GPU for sampling: each has its part of the logits and its
// own slots, and runs a phase after the other; the exchanges are copies.
#ifndef LOCKSTEP_TESTS_KERNELS_SAMPLE_RIG_H_
#define LOCKSTEP_TESTS_KERNELS_SAMPLE_RIG_H_

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kernels/sample.h"
#include "tests/kernels/device_rows.h"
#include "tests/kernels/sample_reference.h"

namespace lockstep::kernels {

struct RigRow {
  int slot = 0;  // -1: padding
  // Scores tokens[score_position + 1]; -1: samples the slot's next token.
  int score_position = -1;
};

struct RigOptions {
  int tp = 1;
  int tokens_stride = 64;
  int stride_excess = 4;  // columns of the logits beyond the rank's padded share
  bool pdl = false;
  SampleNeeds needs;  // beside what the slots need
};

inline SlotParams Uploaded(const ReferenceSlot& slot) {
  SlotParams params = slot.params;
  params.num_bias = static_cast<int32_t>(slot.bias.size());
  params.num_ending_ids = static_cast<int32_t>(slot.ending_ids.size());
  return params;
}

class SampleRig {
 public:
  // logits: [rows][vocab].
  SampleRig(const std::vector<ReferenceSlot>& slots, const std::vector<RigRow>& rows,
            const std::vector<std::vector<float>>& logits, const RigOptions& options)
      : rows_(rows), options_(options), vocab_(static_cast<int>(logits[0].size())) {
    needs_ = options.needs;
    for (const RigRow& row : rows) {
      if (row.slot < 0) continue;
      needs_ = needs_ | NeedsOf(Uploaded(slots[row.slot]), row.score_position >= 0);
    }
    const int share = (vocab_ + options.tp - 1) / options.tp;
    for (int r = 0; r < options.tp; ++r) ranks_.push_back(MakeRank(r, share, slots, logits));
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);  // other streams may run next
  }

  // All phases, all ranks.
  void Run(cudaStream_t stream = nullptr) {
    for (const SamplePhase phase : kSamplePhases) {
      if (!HasPhase(needs_, phase)) continue;
      for (const auto& rank : ranks_) {
        ASSERT_CUDA(RunSamplePhase({stream, options_.pdl}, phase, rank->args));
      }
      if (options_.tp > 1) Exchange(phase, stream);
    }
  }

  // After Run: all that must hold whatever was sampled.
  void Check(const std::string& what) const {
    for (const auto& rank : ranks_) rank->ExpectGuards(what);
    for (int r = 0; r < options_.tp; ++r) {
      const std::string where = what + ", rank " + std::to_string(r);
      for (const uint64_t key : Words(*ranks_[r]->send[kMaximum])) ASSERT_EQ(key, 0u) << where;
      const std::vector<SampledRow> mine = Results(r), first = Results(0);
      for (size_t i = 0; i < rows_.size(); ++i) {
        ASSERT_EQ(mine[i].token, first[i].token) << where << ", row " << i;
        ASSERT_EQ(mine[i].flags, first[i].flags) << where << ", row " << i;
        if (rows_[i].slot < 0) {
          ASSERT_TRUE(DeviceRows<SampledRow>::Untouched(mine[i])) << where << ", row " << i;
        }
      }
      ASSERT_EQ(ranks_[r]->tokens.Bits(), ranks_[0]->tokens.Bits()) << where;
      ASSERT_EQ(ranks_[r]->poisoned.Bits(), ranks_[0]->poisoned.Bits()) << where;
    }
  }

  std::vector<SampledRow> Results(int rank = 0) const { return ranks_[rank]->results.Bits(); }
  std::vector<RowLogprobs> Logprobs(int rank = 0) const { return ranks_[rank]->logprobs.Bits(); }
  int Token(int slot, int position) const {
    return ranks_[0]->tokens.Bits()[slot * options_.tokens_stride + position];
  }
  // Of the whole vocabulary.
  std::vector<uint16_t> Counts(int slot) const {
    std::vector<uint16_t> all;
    for (const auto& rank : ranks_) {
      const std::vector<uint16_t> counts = rank->counts.Bits();
      const auto begin = counts.begin() + slot * rank->args.counts_stride;
      all.insert(all.end(), begin, begin + rank->args.columns);
    }
    return all;
  }
  bool Poisoned(int slot) const { return ranks_[0]->poisoned.Bits()[slot] != 0; }

  void SetPositions(const std::vector<int32_t>& positions) {
    for (const auto& rank : ranks_) rank->position.PutBits(positions);
    ASSERT_CUDA(cudaDeviceSynchronize());
  }
  void SetParams(int slot, const SlotParams& params) {
    for (const auto& rank : ranks_) {
      ASSERT_CUDA(
          cudaMemcpy(rank->params.get() + slot, &params, sizeof(params), cudaMemcpyHostToDevice));
    }
    ASSERT_CUDA(cudaDeviceSynchronize());
  }
  const SampleNeeds& needs() const { return needs_; }
  const SampleArgs& args(int rank) const { return ranks_[rank]->args; }

 private:
  struct Rank {
    Rank(int rows, int slots, int64_t stride, int64_t counts_stride, int tokens_stride,
         size_t workspace_bytes)
        : logits(rows * stride),
          slot(rows),
          position(rows),
          scores(rows),
          params(slots),
          bias_ids(int64_t{slots} * kMaxBias),
          bias_values(int64_t{slots} * kMaxBias),
          ending_ids(int64_t{slots} * kMaxEndingIds),
          counts(slots * counts_stride),
          tokens(int64_t{slots} * tokens_stride),
          poisoned(slots),
          results(rows),
          logprobs(rows),
          workspace(static_cast<int64_t>(workspace_bytes)) {}

    void ExpectGuards(const std::string& what) const {
      logits.ExpectGuards(what + " logits");
      counts.ExpectGuards(what + " counts");
      tokens.ExpectGuards(what + " tokens");
      poisoned.ExpectGuards(what + " poisoned");
      results.ExpectGuards(what + " results");
      logprobs.ExpectGuards(what + " logprobs");
      workspace.ExpectGuards(what + " workspace");
      for (const auto& buffer : send) {
        if (buffer != nullptr) buffer->ExpectGuards(what + " send");
      }
    }

    DeviceRows<float> logits;
    DeviceRows<int32_t> slot, position;
    DeviceRows<uint8_t> scores;
    DeviceRows<SlotParams> params;
    DeviceRows<int32_t> bias_ids;
    DeviceRows<float> bias_values;
    DeviceRows<int32_t> ending_ids;
    DeviceRows<uint16_t> counts;
    DeviceRows<int32_t> tokens;
    DeviceRows<uint32_t> poisoned;
    DeviceRows<SampledRow> results;
    DeviceRows<RowLogprobs> logprobs;
    DeviceRows<char> workspace;
    std::unique_ptr<DeviceRows<char>> send[kNumSamplePhases], gathered[kNumSamplePhases];
    SampleArgs args;
  };

  static std::vector<uint64_t> Words(const DeviceRows<char>& buffer) {
    const std::vector<char> bytes = buffer.Bits();
    std::vector<uint64_t> words(bytes.size() / 8);
    std::memcpy(words.data(), bytes.data(), words.size() * 8);
    return words;
  }

  std::unique_ptr<Rank> MakeRank(int r, int share, const std::vector<ReferenceSlot>& slots,
                                 const std::vector<std::vector<float>>& logits) const {
    const int rows = static_cast<int>(rows_.size()), num_slots = static_cast<int>(slots.size());
    const int first = r * share;
    const int columns = std::clamp(vocab_ - first, 0, share);
    const int64_t stride = share + options_.stride_excess;
    const int64_t counts_stride = (share + 1) / 2 * 2;
    auto rank =
        std::make_unique<Rank>(rows, num_slots, stride, counts_stride, options_.tokens_stride,
                               SampleWorkspaceBytes(needs_, rows, columns));
    // What lies beyond the vocabulary would win, were it read.
    std::vector<float> local(rows * stride, std::numeric_limits<float>::infinity());
    for (int i = 0; i < rows; ++i) {
      std::copy_n(logits[i].begin() + std::min(first, vocab_), columns, local.begin() + i * stride);
    }
    rank->logits.PutBits(local);

    std::vector<int32_t> slot, position;
    std::vector<uint8_t> scores;
    for (const RigRow& row : rows_) {
      slot.push_back(row.slot);
      scores.push_back(row.score_position >= 0);
      position.push_back(row.slot < 0 ? 0
                         : row.score_position >= 0
                             ? row.score_position
                             : static_cast<int>(slots[row.slot].tokens.size()) - 1);
    }
    rank->slot.PutBits(slot);
    rank->position.PutBits(position);
    rank->scores.PutBits(scores);
    FillSlots(slots, rank.get());

    SampleArgs& a = rank->args;
    a.needs = needs_;
    a.rows = rows;
    a.rank = r;
    a.tp_size = options_.tp;
    a.logits = rank->logits.get();
    a.logits_stride = stride;
    a.first_vocab = first;
    a.columns = columns;
    a.slot = rank->slot.get();
    a.position = rank->position.get();
    a.scores = rank->scores.get();
    a.params = rank->params.get();
    a.bias_ids = rank->bias_ids.get();
    a.bias_values = rank->bias_values.get();
    a.ending_ids = rank->ending_ids.get();
    a.counts = rank->counts.get();
    a.counts_stride = counts_stride;
    a.tokens = rank->tokens.get();
    a.tokens_stride = options_.tokens_stride;
    a.poisoned = rank->poisoned.get();
    a.results = rank->results.get();
    a.logprobs = rank->logprobs.get();
    a.workspace = rank->workspace.get();
    for (const SamplePhase phase : kSamplePhases) {
      if (!HasPhase(needs_, phase) || phase == kFinish) continue;
      const int64_t bytes = static_cast<int64_t>(rows * SampleExchangeBytes(phase));
      rank->send[phase] = std::make_unique<DeviceRows<char>>(bytes);
      a.send[phase] = a.gathered[phase] = rank->send[phase]->get();
      if (options_.tp == 1) continue;
      rank->gathered[phase] = std::make_unique<DeviceRows<char>>(bytes * options_.tp);
      a.gathered[phase] = rank->gathered[phase]->get();
    }
    EXPECT_EQ(cudaMemset(a.send[kMaximum], 0, rows * SampleExchangeBytes(kMaximum)), cudaSuccess);
    CountTokens(slots, *rank);
    return rank;
  }

  void FillSlots(const std::vector<ReferenceSlot>& slots, Rank* rank) const {
    std::vector<SlotParams> params;
    std::vector<int32_t> bias_ids(slots.size() * kMaxBias), ending(slots.size() * kMaxEndingIds);
    std::vector<float> bias_values(slots.size() * kMaxBias);
    std::vector<int32_t> tokens(slots.size() * options_.tokens_stride, -1);
    for (size_t s = 0; s < slots.size(); ++s) {
      params.push_back(Uploaded(slots[s]));
      for (size_t i = 0; i < slots[s].bias.size(); ++i) {
        bias_ids[s * kMaxBias + i] = slots[s].bias[i].first;
        bias_values[s * kMaxBias + i] = slots[s].bias[i].second;
      }
      std::copy(slots[s].ending_ids.begin(), slots[s].ending_ids.end(),
                ending.begin() + static_cast<int64_t>(s) * kMaxEndingIds);
      std::copy(slots[s].tokens.begin(), slots[s].tokens.end(),
                tokens.begin() + static_cast<int64_t>(s) * options_.tokens_stride);
    }
    rank->params.PutBits(params);
    rank->bias_ids.PutBits(bias_ids);
    rank->bias_values.PutBits(bias_values);
    rank->ending_ids.PutBits(ending);
    rank->tokens.PutBits(tokens);
    rank->poisoned.PutBits(std::vector<uint32_t>(slots.size(), 0));
  }

  static void CountTokens(const std::vector<ReferenceSlot>& slots, const Rank& rank) {
    for (size_t s = 0; s < slots.size(); ++s) {
      TokenCountArgs args;
      args.counts = rank.args.counts;
      args.counts_stride = rank.args.counts_stride;
      args.tokens = rank.args.tokens;
      args.tokens_stride = rank.args.tokens_stride;
      args.slot = static_cast<int>(s);
      args.num_prompt_tokens = slots[s].params.num_prompt_tokens;
      args.num_tokens = static_cast<int>(slots[s].tokens.size());
      args.first_vocab = rank.args.first_vocab;
      args.columns = rank.args.columns;
      ASSERT_CUDA(BuildTokenCounts({}, args));
    }
  }

  void Exchange(SamplePhase phase, cudaStream_t stream) {
    const size_t bytes = rows_.size() * SampleExchangeBytes(phase);
    if (bytes == 0) return;
    for (const auto& to : ranks_) {
      for (int r = 0; r < options_.tp; ++r) {
        ASSERT_CUDA(cudaMemcpyAsync(static_cast<char*>(to->args.gathered[phase]) + r * bytes,
                                    ranks_[r]->args.send[phase], bytes, cudaMemcpyDeviceToDevice,
                                    stream));
      }
    }
  }

  const std::vector<RigRow> rows_;
  const RigOptions options_;
  const int vocab_;
  SampleNeeds needs_;
  std::vector<std::unique_ptr<Rank>> ranks_;
};

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_TESTS_KERNELS_SAMPLE_RIG_H_
