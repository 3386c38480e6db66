#include "worker/decoder.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "worker/backend/backend.h"

namespace lockstep {
namespace {

using Site = NormRef::Site;

constexpr NormRef kNoNorm{};

}  // namespace

struct Decoder::Impl {
  // What decides which rows of a span need logits.
  struct SlotInfo {
    uint32_t num_prompt_tokens = 0;
    bool wants_prompt_logprobs = false;
  };

  Impl(const ModelConfig& c, const ShardPlan& p, std::unique_ptr<Backend> b)
      : config(c), plan(p), backend(std::move(b)) {}

  std::vector<LogitRow> LogitRows(absl::Span<const BatchSpan> spans) const;
  void Forward(absl::Span<const LogitRow> rows) const;

  const ModelConfig config;
  const ShardPlan plan;
  const std::unique_ptr<Backend> backend;
  std::vector<SlotInfo> slots;
};

Decoder::Decoder(const ModelConfig& config, const ShardPlan& plan, std::unique_ptr<Backend> backend)
    : impl_(std::make_unique<Impl>(config, plan, std::move(backend))) {}

Decoder::~Decoder() = default;

const Backend& Decoder::backend() const { return *impl_->backend; }

absl::Status Decoder::Attach(Communicator* comm) {
  if (comm->size() != impl_->plan.tp_size || comm->rank() != impl_->plan.rank) {
    return absl::InvalidArgumentError(absl::StrCat("the communicator is of rank ", comm->rank(),
                                                   " of ", comm->size(), ", the weights of rank ",
                                                   impl_->plan.rank, " of ", impl_->plan.tp_size));
  }
  impl_->slots.clear();
  if (absl::Status status = impl_->backend->Attach(comm); !status.ok()) return status;
  std::vector<LogitRow> rows;
  while (impl_->backend->BeginRecording(&rows)) {
    impl_->Forward(rows);
    if (absl::Status status = impl_->backend->EndRecording(); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status Decoder::Admit(const NewSequence& sequence) {
  if (impl_->slots.size() <= sequence.slot.value) impl_->slots.resize(sequence.slot.value + 1);
  impl_->slots[sequence.slot.value] = {sequence.num_prompt_tokens,
                                       sequence.sampling.prompt_logprobs >= 0};
  impl_->backend->Admit(sequence);
  return absl::OkStatus();
}

void Decoder::Grow(Slot slot, absl::Span<const BlockId> blocks) {
  impl_->backend->Grow(slot, blocks);
}

void Decoder::Release(Slot slot) { impl_->backend->Release(slot); }

// A span that reaches its last known token samples at its last row. A row whose
// next token is the prompt's scores it, where prompt log-probabilities are asked
// for. In order of rows, the same on every rank.
std::vector<LogitRow> Decoder::Impl::LogitRows(absl::Span<const BatchSpan> spans) const {
  std::vector<LogitRow> rows;
  uint32_t first_row = 0;
  for (uint32_t s = 0; s < spans.size(); ++s) {
    const BatchSpan& span = spans[s];
    const SlotInfo& slot = slots[span.slot.value];
    for (uint32_t i = 0; slot.wants_prompt_logprobs && i < span.count &&
                         span.begin + i + 1 < slot.num_prompt_tokens;
         ++i) {
      rows.push_back({.row = first_row + i, .span = s, .samples = false});
    }
    if (span.samples) {
      rows.push_back({.row = first_row + span.count - 1, .span = s, .samples = true});
    }
    first_row += span.count;
  }
  return rows;
}

bool Decoder::Done() { return impl_->backend->Done(); }
absl::StatusOr<StepOutput> Decoder::Collect() { return impl_->backend->Collect(); }
bool Decoder::Drain() { return impl_->backend->Drain(); }

absl::Status Decoder::Submit(absl::Span<const BatchSpan> spans) {
  const std::vector<LogitRow> rows = impl_->LogitRows(spans);
  if (!impl_->backend->Begin(spans, rows) && !spans.empty()) impl_->Forward(rows);
  return impl_->backend->Submit();
}

void Decoder::Impl::Forward(absl::Span<const LogitRow> rows) const {
  const int64_t last = config.num_layers - 1;
  const bool norm_before = config.norm_before;  // of attention and MLP; otherwise after the add

  backend->Embed({.norm = norm_before ? NormRef{Site::kInput, 0} : kNoNorm});

  for (int64_t layer = 0; layer <= last; ++layer) {
    const bool sliding = config.sliding_window > 0 && config.sliding_layers[layer];
    const RopeTable rope = config.position != PositionKind::kRope           ? RopeTable::kNone
                           : sliding && !(config.rope_local == config.rope) ? RopeTable::kLocal
                                                                            : RopeTable::kGlobal;
    const NormRef input{Site::kInput, layer}, mlp{Site::kMlp, layer};
    const NormRef after_layer = layer < last        ? NormRef{Site::kInput, layer + 1}
                                : config.final_norm ? NormRef{Site::kFinal}
                                                    : kNoNorm;

    backend->Qkv({.layer = layer, .rope = rope});
    backend->Attention({.layer = layer,
                        .scale = static_cast<float>(config.attention_scale),
                        .window = sliding ? config.sliding_window : 0});
    backend->AttentionOutput(layer);
    backend->ReduceResidualNorm(
        {.source = ReduceOp::Source::kAttention,
         .layer = layer,
         .post = config.sandwich_norms ? NormRef{Site::kPostAttention, layer} : kNoNorm,
         .next = norm_before ? mlp : input,
         .norm_is_residual = !norm_before});

    backend->GateUp(layer);
    backend->Down(layer);
    backend->ReduceResidualNorm(
        {.source = ReduceOp::Source::kMlp,
         .layer = layer,
         .post = config.sandwich_norms ? NormRef{Site::kPostMlp, layer} : kNoNorm,
         .next = norm_before ? after_layer : mlp,
         .norm_is_residual = !norm_before});
  }

  const size_t at_once = static_cast<size_t>(backend->max_logit_rows());
  for (size_t first = 0; first < rows.size(); first += at_once) {
    const auto chunk = rows.subspan(first, at_once);
    backend->Logits(chunk);
    backend->Sample(chunk);
  }
}

}  // namespace lockstep
