// Rotary settings in all the spellings that config.json has had: rope_theta
// beside rope_scaling, rope_parameters, and rope_parameters per layer type.
#ifndef LOCKSTEP_MODEL_ROPE_CONFIG_H_
#define LOCKSTEP_MODEL_ROPE_CONFIG_H_

#include "model/config_reader.h"
#include "model/model_config.h"

namespace lockstep {

// One rope for all layers. Errors stay in the reader.
RopeConfig ReadRope(ConfigReader& reader, double default_theta);

// Gemma 3: scaled for full attention; plain, with a theta of its own, for
// sliding layers.
struct LayerTypeRopes {
  RopeConfig full;
  RopeConfig sliding;
};
LayerTypeRopes ReadLayerTypeRopes(ConfigReader& reader, double default_full_theta,
                                  double default_sliding_theta);

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_ROPE_CONFIG_H_
