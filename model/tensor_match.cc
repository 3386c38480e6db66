#include "model/tensor_match.h"

#include <string>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/json.h"
#include "model/strings.h"

namespace lockstep {
namespace {

// "FILE", or "FILE and 5 more".
std::string FilesOf(const Checkpoint& checkpoint) {
  const std::vector<std::string>& files = checkpoint.files();
  if (files.empty()) return "the checkpoint";
  if (files.size() == 1) return files.front();
  return absl::StrCat(files.front(), " and ", files.size() - 1, " more");
}

bool HasShape(const TensorInfo& info, const TensorSlice& slice) {
  const bool is_vector = slice.cols == 1 && info.shape.size() == 1;
  return is_vector ? info.shape[0] == slice.rows
                   : info.shape == std::vector<int64_t>{slice.rows, slice.cols};
}

// A bias or a norm of a layer: "…layers.3.self_attn.q_proj.bias".
bool IsLayerVector(std::string_view name) {
  const absl::string_view text = AbslView(name);
  return absl::StrContains(text, "layers.") &&
         (absl::EndsWith(text, ".bias") || absl::EndsWith(text, "norm.weight"));
}

// "layers.3." -> 3; -1 when there is no number.
int64_t LayerOf(std::string_view name) {
  constexpr std::string_view kLayers = "layers.";
  int64_t layer = -1;
  for (size_t i = name.find(kLayers) + kLayers.size();
       i < name.size() && name[i] >= '0' && name[i] <= '9' && layer < 100'000; ++i) {
    layer = (layer < 0 ? 0 : layer * 10) + (name[i] - '0');
  }
  return layer;
}

}  // namespace

absl::StatusOr<const TensorInfo*> MatchTensor(const Checkpoint& checkpoint,
                                              const TensorSlice& slice) {
  std::string_view name = slice.name;
  const TensorInfo* info = checkpoint.Find(name);
  for (size_t i = 0; info == nullptr && i < slice.alternatives.size(); ++i) {
    name = slice.alternatives[i];
    info = checkpoint.Find(name);
  }
  if (info == nullptr) {
    const std::string others =
        slice.alternatives.empty()
            ? ""
            : absl::StrCat(" (nor \"", absl::StrJoin(slice.alternatives, "\", \""), "\")");
    return absl::NotFoundError(absl::StrCat(FilesOf(checkpoint), ": tensor \"", slice.name, "\"",
                                            others, " is missing; config.json asks for it"));
  }
  const auto describe = [&](const std::string& what) {
    return absl::StrCat(checkpoint.files()[info->file], ": tensor \"", AbslView(name), "\" ", what);
  };
  if (!HasShape(*info, slice)) {
    const std::string expected =
        slice.cols == 1 ? absl::StrCat(slice.rows) : absl::StrCat(slice.rows, ", ", slice.cols);
    return absl::InvalidArgumentError(
        describe(absl::StrCat("has shape [", absl::StrJoin(info->shape, ", "),
                              "]; config.json asks for [", expected, "]")));
  }
  if (!info->loadable) {
    return absl::UnimplementedError(describe(absl::StrCat("has dtype ", AbslView(info->dtype_name),
                                                          "; supported: F32, F16, BF16, F8_E4M3")));
  }
  return info;
}

absl::Status MatchCheckpoint(const Checkpoint& checkpoint, const ModelConfig& config) {
  const absl::StatusOr<ShardPlan> plan = MakeShardPlan(config, 1, 0);
  if (!plan.ok()) return plan.status();
  absl::flat_hash_set<std::string> wanted;
  for (const LocalTensor& tensor : plan->tensors) {
    for (const TensorSlice& slice : tensor.slices) {
      const absl::StatusOr<const TensorInfo*> info = MatchTensor(checkpoint, slice);
      if (!info.ok()) return info.status();
      wanted.insert(slice.name);
      wanted.insert(slice.alternatives.begin(), slice.alternatives.end());
    }
  }
  for (const auto& [name, info] : checkpoint.tensors()) {
    if (wanted.contains(name) || !IsLayerVector(name)) continue;
    const int64_t layer = LayerOf(name);
    if (layer < 0 || layer >= config.num_layers) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        checkpoint.files()[info.file], ": tensor ", Printable(name), " is not part of a ",
        config.architecture, " with this config.json; its effect would be lost"));
  }
  return absl::OkStatus();
}

}  // namespace lockstep
