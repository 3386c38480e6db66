#include "cli/bench/floor.h"

#include <algorithm>
#include <string_view>

#include "model/memory_model.h"
#include "model/shard_plan.h"

namespace lockstep {
namespace {

bool IsTable(const LocalTensor& tensor) {
  return tensor.name == "embedding.weight" || tensor.name == "position.weight";
}

bool IsHead(const LocalTensor& tensor) { return tensor.name == "head.weight"; }

}  // namespace

std::string Quantization(const ModelConfig& config, const std::string& flag,
                         const std::vector<std::string>& serve_flags) {
  constexpr std::string_view kName = "--quantization", kNameIs = "--quantization=";
  std::string quantization = flag.empty() ? config.quantization : flag;
  for (size_t i = 0; i < serve_flags.size(); ++i) {
    if (serve_flags[i].starts_with(kNameIs)) quantization = serve_flags[i].substr(kNameIs.size());
    if (serve_flags[i] == kName && i + 1 < serve_flags.size()) quantization = serve_flags[i + 1];
  }
  // An empty one is serve's way to say: as the checkpoint.
  return quantization.empty() ? config.quantization : quantization;
}

absl::StatusOr<Floor> Floor::Make(const ModelConfig& config, DType dtype, DType kv_dtype,
                                  const std::string& quantization, int64_t tp_size,
                                  const Hardware& hardware) {
  absl::StatusOr<ShardPlan> plan = MakeShardPlan(config, tp_size, /*rank=*/0);
  if (!plan.ok()) return plan.status();
  Floor floor;
  floor.hardware_ = hardware;
  const bool faster = !quantization.empty() && hardware.quantized_flops_per_s > 0;
  floor.layer_flops_per_s_ = faster ? hardware.quantized_flops_per_s : hardware.flops_per_s;

  ShardPlan read = *plan;  // the tensors a step reads whole
  std::erase_if(read.tensors, [&](const LocalTensor& tensor) {
    const bool is_head = tensor.name == "embedding.weight" && config.tie_word_embeddings;
    return IsTable(tensor) && !is_head;
  });
  floor.weight_bytes_ = WeightBytes(read, dtype, quantization);
  for (const LocalTensor& tensor : read.tensors) {
    if (!tensor.is_matrix) continue;
    const double elements = static_cast<double>(tensor.rows) * static_cast<double>(tensor.cols);
    (IsHead(tensor) || IsTable(tensor) ? floor.head_weights_ : floor.layer_weights_) += elements;
  }

  const auto sliding = static_cast<double>(
      std::count(config.sliding_layers.begin(), config.sliding_layers.end(), true));
  const double full = static_cast<double>(config.num_layers) - sliding;
  const double per_layer = 2.0 * static_cast<double>(plan->local_kv_heads * config.head_dim) *
                           static_cast<double>(DTypeBytes(kv_dtype));
  floor.kv_bytes_full_ = per_layer * full;
  floor.kv_bytes_sliding_ = per_layer * sliding;
  floor.sliding_window_ = static_cast<double>(config.sliding_window);
  // Scores and weighted sum: a multiply and an add each, for every element of a head.
  const double pair = 4.0 * static_cast<double>(plan->local_heads * config.head_dim);
  floor.pair_flops_full_ = pair * full;
  floor.pair_flops_sliding_ = pair * sliding;
  return floor;
}

int64_t Floor::DecodeBytes(double batch, double context) const {
  const double window = sliding_window_ > 0 ? std::min(context, sliding_window_) : context;
  return weight_bytes_ +
         static_cast<int64_t>(batch * (context * kv_bytes_full_ + window * kv_bytes_sliding_));
}

double Floor::DecodeSeconds(double batch, double context) const {
  return static_cast<double>(DecodeBytes(batch, context)) / hardware_.bytes_per_s;
}

double Floor::PrefillSeconds(double count, double tokens) const {
  const double read = static_cast<double>(weight_bytes_) / hardware_.bytes_per_s;
  if (hardware_.flops_per_s <= 0) return read;
  // Pairs of positions that see each other; the window cuts the triangle's far corner off.
  const double beyond = sliding_window_ > 0 ? std::max(tokens - sliding_window_, 0.0) : 0.0;
  const double pairs = tokens * tokens / 2, near_pairs = pairs - beyond * beyond / 2;
  const double layers = 2 * layer_weights_ * tokens;
  const double others =
      2 * head_weights_ + pair_flops_full_ * pairs + pair_flops_sliding_ * near_pairs;
  return std::max(read, count * (layers / layer_flops_per_s_ + others / hardware_.flops_per_s));
}

double Floor::ThroughputTokensPerSecond(double count, double at_once, double prompt,
                                        double output) const {
  const double waves = count / at_once;
  const double decode = output * waves * DecodeSeconds(at_once, prompt + output / 2);
  return count * output / (PrefillSeconds(count, prompt) + decode);
}

}  // namespace lockstep
