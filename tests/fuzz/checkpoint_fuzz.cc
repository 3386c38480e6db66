// The files of a checkpoint: a safetensors header, or the index of several
// files. The first byte says which; 'f' goes through Checkpoint::Open as a file.
#include <algorithm>
#include <string>
#include <vector>

#include "common/check.h"
#include "model/safetensors.h"
#include "model/safetensors_header.h"
#include "tests/fuzz/fuzz_input.h"

namespace lockstep::fuzz {
namespace {

// Every tensor lies in the data, and none over another.
void RequireLayout(std::vector<TensorInfo> tensors, uint64_t data_begin, uint64_t file_bytes) {
  std::sort(tensors.begin(), tensors.end(),
            [](const TensorInfo& a, const TensorInfo& b) { return a.offset < b.offset; });
  uint64_t end = data_begin;
  for (const TensorInfo& tensor : tensors) {
    if (tensor.num_bytes == 0) continue;
    LOCKSTEP_CHECK(tensor.offset == end && tensor.num_bytes <= file_bytes - end);
    end += tensor.num_bytes;
    for (const int64_t size : tensor.shape) LOCKSTEP_CHECK(size > 0);
  }
  LOCKSTEP_CHECK(tensors.empty() || end == file_bytes);
}

// A header alone, of a file as long as the input says: large sizes come cheap.
void Header(Input input) {
  uint64_t file_bytes = 0;
  for (int i = 0; i < 8; ++i) file_bytes |= uint64_t{input.Byte()} << (8 * i);
  const std::string_view header = input.Rest();
  if (file_bytes < kSafetensorsLengthBytes + header.size()) return;  // ParseSafetensorsLength's
  const auto tensors = ParseSafetensorsHeader(header, file_bytes, "x");
  if (!tensors.ok()) return RequireRefusal(tensors.status());
  std::vector<TensorInfo> infos;
  for (const auto& [name, info] : *tensors) infos.push_back(info);
  RequireLayout(infos, kSafetensorsLengthBytes + header.size(), file_bytes);
}

void Length(Input input) {
  uint64_t file_bytes = 0;
  for (int i = 0; i < 8; ++i) file_bytes |= uint64_t{input.Byte()} << (8 * i);
  const auto length = ParseSafetensorsLength(input.Rest().substr(0, 8), file_bytes, "x");
  if (!length.ok()) return RequireRefusal(length.status());
  LOCKSTEP_CHECK(*length <= kMaxSafetensorsHeaderBytes &&
                 *length <= file_bytes - kSafetensorsLengthBytes);
}

void Open(const std::string& dir) {
  const auto checkpoint = Checkpoint::Open(dir);
  if (!checkpoint.ok()) return RequireRefusal(checkpoint.status());
  LOCKSTEP_CHECK((*checkpoint)->CheckUnchanged().ok());
  unsigned sum = 0;
  for (const auto& [name, info] : (*checkpoint)->tensors()) {
    LOCKSTEP_CHECK((*checkpoint)->Find(name) == &info);
    for (const std::byte byte : (*checkpoint)->Bytes(info)) sum += static_cast<unsigned>(byte);
  }
  // Read for the sanitizer's sake.
  volatile unsigned sink = sum;
  (void)sink;
}

std::string OneTensor(const std::string& name) {
  std::string header = "{\"" + name + R"(":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";
  std::string file(8, '\0');
  file[0] = static_cast<char>(header.size());
  return file + header + "1234";
}

}  // namespace
}  // namespace lockstep::fuzz

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lockstep::fuzz;
  static const ScratchDir single, several;
  static const bool written = [] {
    several.Write("a.safetensors", OneTensor("a"));
    several.Write("b.safetensors", OneTensor("b"));
    return true;
  }();
  (void)written;
  Input input(data, size);
  switch (input.Byte()) {
    case 'f':
      single.Write("model.safetensors", input.Rest());
      Open(single.path());
      break;
    case 'i':
      several.Write("model.safetensors.index.json", input.Rest());
      Open(several.path());
      break;
    case 'l':
      Length(input);
      break;
    default:
      Header(input);
  }
  return 0;
}
