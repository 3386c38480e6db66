#include "worker/backend/cpu/head.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"

namespace lockstep::cpu {
namespace {

// Logits of one chunk, over the whole vocabulary: beyond this, more rows no
// longer make the head's product faster.
constexpr int64_t kChunkBytes = 32 << 20;
constexpr int64_t kMaxRows = 256;

int64_t MaxRows(const ShardPlan& plan, int64_t max_step_rows) {
  const int64_t most = std::min(kMaxRows, max_step_rows);
  return std::clamp<int64_t>(kChunkBytes / (plan.padded_vocab * 4), 1, most);
}

}  // namespace

Head::Head(const ModelConfig& config, const ShardPlan& plan, const ModelWeights& model,
           const Kernels& kernels, ThreadPool& pool, GemmWorkspace& workspace,
           int64_t max_step_rows)
    : config_(config),
      plan_(plan),
      model_(model),
      kernels_(kernels),
      pool_(pool),
      workspace_(workspace),
      max_rows_(MaxRows(plan, max_step_rows)),
      row_logits_(pool.size()),
      sampler_scratch_(pool.size()) {
  hidden_.resize(max_rows_ * config.hidden_size);
  if (model.project_out.data != nullptr) projected_.resize(max_rows_ * config.embedding_dim);
  local_logits_.resize(max_rows_ * plan.local_vocab);
  if (plan.rank == 0 && plan.tp_size > 1) {
    gathered_.resize(max_rows_ * plan.padded_vocab);
    for (std::vector<float>& row : row_logits_) row.resize(plan.padded_vocab);
  }
  workspace.Reserve(max_rows_, config.hidden_size, 1);
  workspace.Reserve(max_rows_, config.embedding_dim, 1);
}

int64_t Head::bytes() const {
  size_t floats = hidden_.size() + projected_.size() + local_logits_.size() + gathered_.size();
  for (const std::vector<float>& row : row_logits_) floats += row.size();
  return static_cast<int64_t>(floats * sizeof(float));
}

void Head::Begin(absl::Span<const BatchSpan> spans, absl::Span<const StepRow> rows) {
  spans_ = spans;
  rows_ = rows;
  pending_.clear();
  output_ = {};
}

absl::Status Head::Logits(absl::Span<const LogitRow> chosen, const float* hidden,
                          Communicator* comm) {
  const int64_t count = static_cast<int64_t>(chosen.size()), width = config_.hidden_size;
  LOCKSTEP_CHECK(count <= max_rows_);
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(hidden_.data() + i * width, hidden + chosen[i].row * width, width * sizeof(float));
  }
  const float* x = hidden_.data();
  if (model_.project_out.data != nullptr) {
    Gemm(kernels_, pool_, workspace_, x, width, count, model_.project_out, 1, projected_.data(),
         config_.embedding_dim);
    x = projected_.data();
  }
  Gemm(kernels_, pool_, workspace_, x, config_.embedding_dim, count, model_.head, 1,
       local_logits_.data(), plan_.local_vocab);
  if (plan_.tp_size == 1) return absl::OkStatus();
  const int64_t floats = count * plan_.local_vocab;
  return comm->Gather(absl::MakeConstSpan(local_logits_.data(), floats),
                      plan_.rank == 0 ? absl::MakeSpan(gathered_.data(), floats * plan_.tp_size)
                                      : absl::Span<float>(),
                      /*root=*/0);
}

// One row over the whole vocabulary, in one piece. count: rows of the chunk.
float* Head::RowLogits(int64_t i, int64_t count, int thread) {
  if (plan_.tp_size == 1) return local_logits_.data() + i * plan_.local_vocab;
  float* row = row_logits_[thread].data();
  for (int64_t rank = 0; rank < plan_.tp_size; ++rank) {
    std::memcpy(row + rank * plan_.local_vocab,
                gathered_.data() + (rank * count + i) * plan_.local_vocab,
                plan_.local_vocab * sizeof(float));
  }
  return row;
}

// A row's logits to a token, or to the score of the known next one.
void Head::ChooseRow(const LogitRow& row, absl::Span<float> logits, int thread,
                     SampledToken* chosen) {
  const SlotState& slot = *rows_[row.row].slot;
  const SlotSampling& sampling = slot.sampling;
  SamplerScratch* scratch = &sampler_scratch_[thread];
  if (row.samples) {
    if (slot.poisoned) {
      chosen->poisoned = true;
      return;
    }
    RowSample sample = SampleRow(kernels_, logits, sampling, slot.counts, slot.tokens.size(),
                                 slot.num_generated(), scratch);
    chosen->token = sample.token;
    chosen->poisoned = sample.poisoned;
    chosen->has_logprobs = sampling.logprobs >= 0 && !sample.poisoned;
    chosen->logprobs = std::move(sample.logprobs);
    return;
  }
  chosen->poisoned = !kernels_.all_finite(logits.data(), static_cast<int64_t>(logits.size()));
  if (chosen->poisoned) return;
  const TokenId next = slot.tokens[rows_[row.row].position + 1];
  chosen->logprobs =
      ScoreRow(kernels_, logits, next, static_cast<uint32_t>(sampling.prompt_logprobs), scratch);
}

void Head::Sample(absl::Span<const LogitRow> chosen) {
  const auto start = std::chrono::steady_clock::now();
  const int64_t count = static_cast<int64_t>(chosen.size());
  std::vector<SampledToken> results(chosen.size());
  if (plan_.rank == 0) {
    pool_.ParallelFor(count, [&](int64_t i, int thread) {
      float* logits = RowLogits(i, count, thread);
      ChooseRow(chosen[i], absl::MakeSpan(logits, config_.vocab_size), thread, &results[i]);
    });
  }
  for (int64_t i = 0; i < count; ++i) {
    results[i].slot = spans_[chosen[i].span].slot;
    if (chosen[i].samples) {
      pending_.push_back({rows_[chosen[i].row].slot, std::move(results[i])});
    } else if (plan_.rank == 0) {
      Score(chosen[i], std::move(results[i]));
    }
  }
  output_.sampling_ns += static_cast<uint64_t>(
      std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count());
}

void Head::Score(const LogitRow& row, SampledToken scored) {
  const StepRow& at = rows_[row.row];
  // A prompt whose scores are not finite has nothing to sample from either.
  if (scored.poisoned) at.slot->poisoned = true;
  std::vector<SlotPromptLogprobs>& lists = output_.prompt_logprobs;
  if (lists.empty() || lists.back().slot != scored.slot) {
    lists.push_back({scored.slot, static_cast<uint32_t>(at.position + 1), {}});
  }
  lists.back().entries.push_back(std::move(scored.logprobs));
}

absl::Status Head::Publish(Communicator* comm) {
  if (pending_.empty()) return absl::OkStatus();
  // Token and whether it is poisoned, a pair each.
  std::vector<uint32_t> words;
  for (const Pending& p : pending_) {
    words.push_back(p.result.token);
    words.push_back(p.result.poisoned ? 1 : 0);
  }
  absl::Status status = comm->Broadcast(
      absl::MakeSpan(reinterpret_cast<std::byte*>(words.data()), words.size() * sizeof(uint32_t)),
      /*root=*/0);
  if (!status.ok()) return status;
  for (size_t i = 0; i < pending_.size(); ++i) {
    const TokenId token = words[2 * i];
    if (token >= config_.vocab_size) {
      return absl::InternalError(
          absl::StrCat("rank 0 sent token ", token, " of a vocabulary of ", config_.vocab_size));
    }
    pending_[i].slot->AppendGenerated(token);
    pending_[i].slot->poisoned |= words[2 * i + 1] != 0;
  }
  return absl::OkStatus();
}

StepOutput Head::TakeOutput() {
  if (plan_.rank == 0) {
    for (Pending& p : pending_) output_.sampled.push_back(std::move(p.result));
  }
  pending_.clear();
  return std::move(output_);
}

}  // namespace lockstep::cpu
