// A read-only view of a checkpoint: one or many *.safetensors files, memory
// mapped. Every header is checked before use (size, JSON shape, dtype, ranges,
// overlaps, holes, duplicate names, file length): hostile files give one line.
// Thread-safe after Open.
#ifndef LOCKSTEP_MODEL_SAFETENSORS_H_
#define LOCKSTEP_MODEL_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "model/model_config.h"

namespace lockstep {

struct TensorInfo {
  DType dtype = DType::kFloat32;  // where `loadable`
  bool loadable = true;           // false: a dtype that no weight may have (I64, F64, ...)
  std::string_view dtype_name;    // as stored: "F32", "BF16", "I64"; lives for ever
  std::vector<int64_t> shape;
  size_t file = 0;      // which of Checkpoint::files()
  uint64_t offset = 0;  // bytes from the start of the file; of any alignment
  uint64_t num_bytes = 0;
};

class Checkpoint {
 public:
  // DIR/model.safetensors; else what DIR/model.safetensors.index.json names;
  // else every *.safetensors of the directory. NotFound: there is none of them.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& model_dir);
  ~Checkpoint();

  // Null when there is no such tensor.
  const TensorInfo* Find(std::string_view name) const;
  // All of a tensor's bytes, mapped: touching them reads the file. A file that
  // shrank after Open is found by CheckUnchanged before it is touched.
  absl::Span<const std::byte> Bytes(const TensorInfo& tensor) const;
  absl::Status CheckUnchanged() const;

  // Advice for bytes [begin, end) of a tensor: read ahead; or drop from this
  // process's resident memory after copying (they stay in the page cache).
  void WillNeed(const TensorInfo& tensor, uint64_t begin, uint64_t end) const;
  void DoneWith(const TensorInfo& tensor, uint64_t begin, uint64_t end) const;

  const std::vector<std::string>& files() const;  // whole paths
  const std::map<std::string, TensorInfo, std::less<>>& tensors() const;
  // Of the names, dtypes, shapes and a sample of every tensor's bytes, which are read: ranks that
  // load at different times, or on different hosts, compare it.
  absl::StatusOr<uint64_t> Digest() const;

 private:
  struct Impl;
  explicit Checkpoint(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_MODEL_SAFETENSORS_H_
