// One number for what a model directory holds, by which coordinator and workers
// make sure that they mean the same model.
#ifndef LOCKSTEP_MODEL_MODEL_DIGEST_H_
#define LOCKSTEP_MODEL_MODEL_DIGEST_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "model/safetensors.h"

namespace lockstep {

// Of config.json's bytes and, where there is a checkpoint, of Checkpoint::Digest.
// Never 0. NotFound names the file.
absl::StatusOr<uint64_t> DigestModel(const std::string& model_dir, const Checkpoint* checkpoint);

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_MODEL_DIGEST_H_
