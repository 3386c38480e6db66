// The paged KV cache of one rank: for each layer and each of K and V
//
//   [block][kv_head][position in block][head_dim]      in the cache's dtype
//
// so that one head's stretch of a block is contiguous. Pages are touched, and
// take memory, only once written. Not thread-safe to resize; distinct positions
// may be written from different threads.
#ifndef LOCKSTEP_WORKER_BACKEND_CPU_KV_CACHE_H_
#define LOCKSTEP_WORKER_BACKEND_CPU_KV_CACHE_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "model/model_config.h"

namespace lockstep::cpu {

class KvCache {
 public:
  struct Shape {
    int64_t layers = 0;
    int64_t blocks = 0;
    int64_t block_size = 0;
    int64_t kv_heads = 0;
    int64_t head_dim = 0;
    DType dtype = DType::kFloat32;
  };

  // ResourceExhausted, with the bytes asked for.
  static absl::StatusOr<std::unique_ptr<KvCache>> Allocate(const Shape& shape);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  // Block 0, position 0 of a head.
  std::byte* K(int64_t layer, int64_t kv_head) { return At(2 * layer, kv_head); }
  std::byte* V(int64_t layer, int64_t kv_head) { return At(2 * layer + 1, kv_head); }
  // Elements from one block to the next, for either.
  int64_t block_stride() const { return shape_.kv_heads * shape_.block_size * shape_.head_dim; }
  // Bytes from block 0, position 0 of a head to some position of it.
  int64_t OffsetOf(int64_t block, int64_t position_in_block) const {
    return (block * block_stride() + position_in_block * shape_.head_dim) *
           DTypeBytes(shape_.dtype);
  }

  const Shape& shape() const { return shape_; }
  int64_t bytes() const { return static_cast<int64_t>(bytes_); }

 private:
  explicit KvCache(const Shape& shape) : shape_(shape) {}
  std::byte* At(int64_t plane, int64_t kv_head) {
    const int64_t elements =
        plane * shape_.blocks * block_stride() + kv_head * shape_.block_size * shape_.head_dim;
    return memory_ + elements * DTypeBytes(shape_.dtype);
  }

  const Shape shape_;
  std::byte* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace lockstep::cpu

#endif  // LOCKSTEP_WORKER_BACKEND_CPU_KV_CACHE_H_
