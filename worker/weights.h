// A rank's weights in memory: every LocalTensor of a shard plan, matrices in the
// serving dtype, vectors in float32. Loading touches only the byte ranges of the
// rank's own slices. Immutable once loaded.
//
//   auto weights = Weights::Load(*checkpoint, plan, options, &pool);
//   const WeightTensor* qkv = (*weights)->Find("layers.0.qkv.weight");
#ifndef LOCKSTEP_WORKER_WEIGHTS_H_
#define LOCKSTEP_WORKER_WEIGHTS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "model/model_config.h"
#include "model/safetensors.h"
#include "model/shard_plan.h"
#include "worker/thread_pool.h"

namespace lockstep {

// Row-major; rows start 64-byte aligned only where cols make them so. A vector
// is [rows, 1].
struct WeightTensor {
  std::byte* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t cols = 0;
};

struct WeightOptions {
  DType dtype = DType::kFloat32;  // of matrices in memory
  // Called between batches of copying, from the loading thread. Bytes of the
  // weights in memory. May be empty.
  std::function<void(int64_t bytes_done, int64_t bytes_total)> progress;
};

struct WeightPiece;  // worker/weight_pieces.h

class Weights {
 public:
  // NotFound / InvalidArgument name the tensor and its file or directory.
  static absl::StatusOr<std::unique_ptr<Weights>> Load(const Checkpoint& checkpoint,
                                                       const ShardPlan& plan,
                                                       const WeightOptions& options,
                                                       ThreadPool* pool);

  // --load-format dummy: no file is opened. A value depends on the checkpoint
  // tensor's name and its global row and column alone, so every split of the
  // model agrees; scaled so that logits spread by about one.
  static absl::StatusOr<std::unique_ptr<Weights>> Dummy(const ShardPlan& plan,
                                                        const ModelConfig& config,
                                                        const WeightOptions& options,
                                                        ThreadPool* pool);

  ~Weights();
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;

  // Null when the plan has no such tensor.
  const WeightTensor* Find(std::string_view name) const;

  int64_t allocated_bytes() const { return allocated_bytes_; }    // of the tensors
  int64_t checkpoint_bytes() const { return checkpoint_bytes_; }  // read from files
  // In order: what loading spent its time on, in seconds.
  const std::vector<std::pair<std::string, double>>& phases() const { return phases_; }

 private:
  Weights() = default;
  absl::Status Allocate(const ShardPlan& plan, DType matrix_dtype);
  std::byte* RowsOf(const WeightPiece& piece) const;

  std::byte* arena_ = nullptr;
  size_t arena_bytes_ = 0;
  int64_t allocated_bytes_ = 0;
  int64_t checkpoint_bytes_ = 0;
  absl::flat_hash_map<std::string, WeightTensor> tensors_;
  std::vector<std::pair<std::string, double>> phases_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_WEIGHTS_H_
