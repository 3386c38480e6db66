// Writes small safetensors files for tests: whole models of random weights, and
// any bytes at all for hostile ones. A failure to write ends the test.
//
//   SafetensorsWriter writer;
//   writer.Add("model.norm.weight", "F32", {64}, FloatBytes(values));
//   writer.WriteTo(dir + "/model.safetensors");
#ifndef LOCKSTEP_TESTS_FAKES_SAFETENSORS_WRITER_H_
#define LOCKSTEP_TESTS_FAKES_SAFETENSORS_WRITER_H_

#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/check.h"

namespace lockstep {

inline void WriteFileOrDie(const std::string& path, std::string_view bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  LOCKSTEP_CHECK(file.good());
}

inline std::string FloatBytes(const std::vector<float>& values) {
  std::string bytes(values.size() * sizeof(float), '\0');
  if (!values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

// A file of this header text and data, with the true length before them.
inline std::string SafetensorsBytes(std::string_view header, std::string_view data) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) {
    bytes.push_back(static_cast<char>((static_cast<uint64_t>(header.size()) >> (8 * i)) & 0xff));
  }
  bytes.append(header);
  bytes.append(data);
  return bytes;
}

class SafetensorsWriter {
 public:
  // `bytes` must be what dtype and shape ask for, where the file is to be good.
  // Names are written as they are: no character that JSON would escape.
  void Add(const std::string& name, std::string_view dtype, const std::vector<int64_t>& shape,
           std::string_view bytes) {
    entries_.push_back(absl::StrCat("\"", name, "\":{\"dtype\":\"", std::string(dtype),
                                    "\",\"shape\":[", absl::StrJoin(shape, ","),
                                    "],\"data_offsets\":[", data_.size(), ",",
                                    data_.size() + bytes.size(), "]}"));
    data_.append(bytes);
  }

  std::string Header() const {
    std::string header =
        absl::StrCat("{\"__metadata__\":{\"format\":\"pt\"}", entries_.empty() ? "" : ",",
                     absl::StrJoin(entries_, ","), "}");
    header.resize((header.size() + 7) / 8 * 8, ' ');  // data at a multiple of eight, as usual
    return header;
  }
  const std::string& data() const { return data_; }
  std::string Bytes() const { return SafetensorsBytes(Header(), data_); }
  void WriteTo(const std::string& path) const { WriteFileOrDie(path, Bytes()); }

 private:
  std::vector<std::string> entries_;
  std::string data_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_FAKES_SAFETENSORS_WRITER_H_
