#include "worker/backend/cpu/kv_cache.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace lockstep::cpu {

absl::StatusOr<std::unique_ptr<KvCache>> KvCache::Allocate(const Shape& shape) {
  int64_t bytes = 2 * DTypeBytes(shape.dtype);
  for (const int64_t factor :
       {shape.layers, shape.blocks, shape.block_size, shape.kv_heads, shape.head_dim}) {
    if (factor <= 0 || __builtin_mul_overflow(bytes, factor, &bytes)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "KV cache of ", shape.layers, " layers x ", shape.blocks, " blocks x ", shape.block_size,
          " positions x ", shape.kv_heads, " heads x ", shape.head_dim, ": not a possible size"));
    }
  }
  std::unique_ptr<KvCache> cache(new KvCache(shape));
  void* memory = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, /*fd=*/-1, /*offset=*/0);
  if (memory == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for a KV cache of ", bytes, " bytes (", shape.blocks,
                     " blocks): ", strerror(errno), "; a smaller --num-kv-blocks needs less"));
  }
  cache->memory_ = static_cast<std::byte*>(memory);
  cache->bytes_ = static_cast<size_t>(bytes);
  return cache;
}

KvCache::~KvCache() {
  if (memory_ != nullptr) munmap(memory_, bytes_);
}

}  // namespace lockstep::cpu
