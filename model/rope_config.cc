#include "model/rope_config.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "model/json.h"
#include "model/strings.h"

namespace lockstep {
namespace {

using nlohmann::json;

constexpr double kMaxTheta = 1e12;
constexpr double kMaxFactor = 1e6;
constexpr int64_t kMaxPositions = int64_t{1} << 31;

bool NothingIsHarmless(std::string_view) { return false; }

// The inside of rope_scaling or rope_parameters.
RopeConfig ReadRopeObject(ConfigReader& outer, const json& object, const std::string& prefix,
                          double theta) {
  ConfigReader reader(object, outer.where(), prefix);
  RopeConfig rope;
  rope.theta = reader.Number("rope_theta", theta, 0, kMaxTheta);
  reader.RequireNumber("partial_rotary_factor", 1.0);
  // "type" is the older name; files that have both say the same in both.
  const std::string old_type = reader.String("type", "default");
  const std::string type = reader.String("rope_type", old_type);
  if (reader.HasValue("type") && type != old_type) {
    reader.FailInvalid("type", absl::StrCat("is \"", Printable(old_type), "\" but rope_type is \"",
                                            Printable(type), "\""));
  }
  if (type == "linear") {
    rope.scaling = RopeScalingKind::kLinear;
    rope.factor = reader.Number("factor", std::nullopt, 0, kMaxFactor);
    reader.Ignore("original_max_position_embeddings");
  } else if (type == "llama3") {
    rope.scaling = RopeScalingKind::kLlama3;
    rope.factor = reader.Number("factor", std::nullopt, 0, kMaxFactor);
    rope.low_freq_factor = reader.Number("low_freq_factor", std::nullopt, 0, kMaxFactor);
    rope.high_freq_factor = reader.Number("high_freq_factor", std::nullopt, 0, kMaxFactor);
    rope.original_max_position_embeddings =
        reader.Int("original_max_position_embeddings", std::nullopt, 1, kMaxPositions);
    if (reader.ok() && rope.high_freq_factor <= rope.low_freq_factor) {
      reader.FailInvalid("high_freq_factor", absl::StrCat("is ", rope.high_freq_factor,
                                                          "; it must be above low_freq_factor, ",
                                                          rope.low_freq_factor));
    }
  } else if (type == "default") {
    // Present in some files beside the default type, where it has no effect.
    reader.Ignore("factor");
    reader.Ignore("original_max_position_embeddings");
  } else {
    reader.FailUnsupported("rope_type", absl::StrCat("is \"", Printable(type),
                                                     "\"; supported: default, linear, llama3"));
  }
  reader.RefuseUnread(&NothingIsHarmless);
  outer.Fail(reader.status());
  return rope;
}

// rope_theta and rope_scaling, as transformers 4 writes them.
RopeConfig ReadOldSpelling(ConfigReader& reader, double default_theta) {
  const double theta = reader.Number("rope_theta", default_theta, 0, kMaxTheta);
  if (const json* scaling = reader.Object("rope_scaling"); scaling != nullptr) {
    return ReadRopeObject(reader, *scaling, "rope_scaling.", theta);
  }
  RopeConfig rope;
  rope.theta = theta;
  return rope;
}

void RefuseDisagreement(ConfigReader& reader, const RopeConfig& old_spelling,
                        const RopeConfig& rope) {
  const bool theta_differs = reader.HasValue("rope_theta") && old_spelling.theta != rope.theta;
  const bool scaling_differs = reader.HasValue("rope_scaling") && !(old_spelling == rope);
  if (reader.ok() && (theta_differs || scaling_differs)) {
    reader.FailInvalid(
        "rope_parameters",
        absl::StrCat("disagrees with ", theta_differs ? "rope_theta" : "rope_scaling"));
  }
}

}  // namespace

RopeConfig ReadRope(ConfigReader& reader, double default_theta) {
  reader.RequireNumber("partial_rotary_factor", 1.0);
  const RopeConfig old_spelling = ReadOldSpelling(reader, default_theta);
  const json* parameters = reader.Object("rope_parameters");
  if (parameters == nullptr) return old_spelling;
  const RopeConfig rope =
      ReadRopeObject(reader, *parameters, "rope_parameters.", old_spelling.theta);
  RefuseDisagreement(reader, old_spelling, rope);
  return rope;
}

LayerTypeRopes ReadLayerTypeRopes(ConfigReader& reader, double default_full_theta,
                                  double default_sliding_theta) {
  reader.RequireNumber("partial_rotary_factor", 1.0);
  LayerTypeRopes ropes;
  ropes.full = ReadOldSpelling(reader, default_full_theta);
  ropes.sliding.theta = reader.Number("rope_local_base_freq", default_sliding_theta, 0, kMaxTheta);
  const json* parameters = reader.Object("rope_parameters");
  if (parameters == nullptr) return ropes;

  const LayerTypeRopes old_spelling = ropes;
  ConfigReader per_type(*parameters, reader.where(), "rope_parameters.");
  if (!per_type.Has("full_attention") && !per_type.Has("sliding_attention")) {
    ropes.full = ReadRopeObject(reader, *parameters, "rope_parameters.", old_spelling.full.theta);
  } else {
    if (const json* full = per_type.Object("full_attention"); full != nullptr) {
      ropes.full = ReadRopeObject(per_type, *full, "rope_parameters.full_attention.",
                                  old_spelling.full.theta);
    }
    if (const json* sliding = per_type.Object("sliding_attention"); sliding != nullptr) {
      ropes.sliding = ReadRopeObject(per_type, *sliding, "rope_parameters.sliding_attention.",
                                     old_spelling.sliding.theta);
    }
    per_type.RefuseUnread(&NothingIsHarmless);
    reader.Fail(per_type.status());
  }
  RefuseDisagreement(reader, old_spelling.full, ropes.full);
  if (reader.ok() && reader.HasValue("rope_local_base_freq") &&
      old_spelling.sliding.theta != ropes.sliding.theta) {
    reader.FailInvalid("rope_parameters", "disagrees with rope_local_base_freq");
  }
  return ropes;
}

}  // namespace lockstep
