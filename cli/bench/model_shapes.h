// Models without weights: the sizes of known models, written as a directory
// that `lockstep serve --load-format dummy` serves, so that a machine can be
// measured before any checkpoint is there.
//
// The tokenizer beside the config is made up: one token a byte, then words of
// letters up to the vocabulary's size, so that turning tokens into text costs
// what it does with a real one.
#ifndef LOCKSTEP_CLI_BENCH_MODEL_SHAPES_H_
#define LOCKSTEP_CLI_BENCH_MODEL_SHAPES_H_

#include <string>
#include <vector>

#include "absl/status/status.h"

namespace lockstep {

// "llama-8b", "llama-70b", ...
std::vector<std::string> ModelShapeNames();

// Writes config.json and tokenizer.json into `directory`, making it when it is
// not there. InvalidArgument: an unknown name. AlreadyExists: a config.json is
// there, which is not written over.
absl::Status WriteModelShape(const std::string& name, const std::string& directory);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_BENCH_MODEL_SHAPES_H_
