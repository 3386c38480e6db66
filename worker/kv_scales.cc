#include "worker/kv_scales.h"

#include <cmath>
#include <cstddef>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/strings.h"
#include "worker/backend/cpu/kernels.h"

namespace lockstep {
namespace {

struct ScaleName {
  int64_t layer = 0;
  bool k = false, v = false;
};

// Nothing: not the name of such a scale. "k_proj.weight_scale" is not one.
std::optional<ScaleName> ParseName(std::string_view name, int64_t num_layers) {
  const size_t module = name.find(".self_attn."), last = name.rfind('.');
  if (module == std::string_view::npos) return std::nullopt;
  const std::string_view suffix = name.substr(last + 1), owner = name.substr(0, module);
  ScaleName parsed;
  parsed.k = suffix == "k_scale" || suffix == "kv_scale";
  parsed.v = suffix == "v_scale" || suffix == "kv_scale";
  const size_t dot = owner.rfind('.');
  if (!(parsed.k || parsed.v) || dot == std::string_view::npos) return std::nullopt;
  if (!owner.substr(0, dot).ends_with("layers")) return std::nullopt;
  const bool numbered = absl::SimpleAtoi(AbslView(owner.substr(dot + 1)), &parsed.layer);
  if (!numbered || parsed.layer < 0 || parsed.layer >= num_layers) return std::nullopt;
  return parsed;
}

absl::StatusOr<float> ReadScale(const Checkpoint& checkpoint, std::string_view name,
                                const TensorInfo& info) {
  const auto bad = [&](const std::string& what) {
    return absl::InvalidArgumentError(absl::StrCat(checkpoint.files()[info.file], ": tensor \"",
                                                   AbslView(name), "\" ", what,
                                                   "; --kv-cache-dtype auto does without it"));
  };
  int64_t count = 1;
  for (const int64_t size : info.shape) count *= size;
  const bool known = info.loadable && info.dtype != DType::kFloat8E4M3;
  if (count != 1 || !known || info.num_bytes != static_cast<uint64_t>(DTypeBytes(info.dtype))) {
    return bad(absl::StrCat("is ", AbslView(info.dtype_name), " of shape [",
                            absl::StrJoin(info.shape, ", "),
                            "]; supported: one scale a layer in F32, F16 or BF16"));
  }
  float scale = 0.0f;
  const std::byte* stored = checkpoint.Bytes(info).data();
  if (info.dtype == DType::kFloat32) {
    std::memcpy(&scale, stored, sizeof(scale));  // of any alignment
  } else {
    cpu::BestKernels().widen(stored, info.dtype, 1, &scale);
  }
  if (std::isnormal(scale) && scale > 0.0f) return scale;
  return bad(absl::StrCat("is ", scale, "; expected a number above 0"));
}

}  // namespace

absl::StatusOr<std::vector<KvScales>> ReadKvScales(const Checkpoint& checkpoint,
                                                   int64_t num_layers) {
  std::vector<KvScales> scales;
  for (const auto& [name, info] : checkpoint.tensors()) {
    const std::optional<ScaleName> parsed = ParseName(name, num_layers);
    if (!parsed.has_value()) continue;
    if (absl::Status status = checkpoint.CheckUnchanged(); !status.ok()) return status;
    const absl::StatusOr<float> scale = ReadScale(checkpoint, name, info);
    if (!scale.ok()) return scale.status();
    scales.resize(static_cast<size_t>(num_layers));
    KvScales& layer = scales[static_cast<size_t>(parsed->layer)];
    if (parsed->k) layer.k = *scale;
    if (parsed->v) layer.v = *scale;
  }
  return scales;
}

}  // namespace lockstep
