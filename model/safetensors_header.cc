#include "model/safetensors_header.h"

#include <algorithm>
#include <exception>
#include <limits>
#include <optional>
#include <set>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/json.h"
#include "model/strings.h"

namespace lockstep {
namespace {

using nlohmann::json;
using Entry = std::pair<std::string, TensorInfo>;

constexpr size_t kMaxDimensions = 8;
constexpr size_t kMaxNameBytes = 512;
// A few times what the largest mixtures of experts have in all their files; a
// header of the largest size could name a hundred times that.
constexpr size_t kMaxTensors = size_t{1} << 18;
constexpr size_t kMaxMetadata = 4'096;  // keys

struct StoredDType {
  std::string_view name;
  int bits;
  std::optional<DType> dtype;  // what a weight may be
};
constexpr StoredDType kDTypes[] = {
    {"F32", 32, DType::kFloat32},   {"F16", 16, DType::kFloat16},
    {"BF16", 16, DType::kBFloat16}, {"F8_E4M3", 8, DType::kFloat8E4M3},
    {"F64", 64, std::nullopt},      {"F8_E5M2", 8, std::nullopt},
    {"F8_E8M0", 8, std::nullopt},   {"F6_E2M3", 6, std::nullopt},
    {"F6_E3M2", 6, std::nullopt},   {"F4", 4, std::nullopt},
    {"I64", 64, std::nullopt},      {"I32", 32, std::nullopt},
    {"I16", 16, std::nullopt},      {"I8", 8, std::nullopt},
    {"U64", 64, std::nullopt},      {"U32", 32, std::nullopt},
    {"U16", 16, std::nullopt},      {"U8", 8, std::nullopt},
    {"BOOL", 8, std::nullopt},      {"C64", 64, std::nullopt},
};

const StoredDType* FindDType(std::string_view name) {
  for (const StoredDType& dtype : kDTypes) {
    if (dtype.name == name) return &dtype;
  }
  return nullptr;
}

// Parse events -> entries, with no document in between: a header of the largest
// size must not cost many times its bytes.
class HeaderReader : public nlohmann::json_sax<json> {
 public:
  bool null() override { return Unexpected("null"); }
  bool boolean(bool) override { return Unexpected("a boolean"); }
  bool number_integer(number_integer_t) override { return Unexpected("a negative number"); }
  bool number_float(number_float_t, const string_t&) override {
    return Unexpected("a number that is not whole");
  }
  bool binary(binary_t&) override { return Unexpected("binary"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (state_ == State::kShape) {
      if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        return FailField("shape", "has a dimension beyond 63 bits");
      }
      if (info().shape.size() == kMaxDimensions) {
        return FailField("shape", absl::StrCat("has more than ", kMaxDimensions, " dimensions"));
      }
      info().shape.push_back(static_cast<int64_t>(value));
      return true;
    }
    if (state_ == State::kOffsets) {
      if (num_offsets_ == 2) return FailField("data_offsets", "has more than two numbers");
      offsets_[num_offsets_++] = value;
      return true;
    }
    return Unexpected("a number");
  }

  bool string(string_t& value) override {
    if (state_ == State::kMetadata) return true;
    if (state_ != State::kDType) return Unexpected("a string");
    dtype_ = FindDType(value);
    if (dtype_ == nullptr) {
      return FailField("dtype", absl::StrCat("is unknown: \"", Printable(value), "\""));
    }
    state_ = State::kTensor;
    return true;
  }

  bool start_object(size_t) override {
    if (state_ == State::kStart) {
      state_ = State::kTop;
    } else if (state_ == State::kMetadataValue) {
      state_ = State::kMetadata;
    } else if (state_ == State::kTensorValue) {
      state_ = State::kTensor;
    } else {
      return Unexpected("an object");
    }
    return true;
  }

  bool start_array(size_t) override {
    if (state_ == State::kShapeValue) {
      state_ = State::kShape;
    } else if (state_ == State::kOffsetsValue) {
      state_ = State::kOffsets;
    } else {
      return Unexpected("a list");
    }
    return true;
  }

  bool end_array() override {
    if (state_ == State::kOffsets && num_offsets_ != 2) {
      return FailField("data_offsets", "has fewer than two numbers");
    }
    state_ = State::kTensor;
    return true;
  }

  bool end_object() override {
    if (state_ == State::kTensor) {
      if (!FinishTensor()) return false;
      state_ = State::kTop;
    } else {
      state_ = state_ == State::kMetadata ? State::kTop : State::kEnd;
    }
    return true;
  }

  bool key(string_t& name) override {
    switch (state_) {
      case State::kTop:
        return TopKey(name);
      case State::kMetadata:
        if (metadata_keys_.size() == kMaxMetadata) {
          return Fail(absl::StrCat("__metadata__ has more than ", kMaxMetadata, " keys"));
        }
        if (metadata_keys_.insert(name).second) return true;
        return Fail(absl::StrCat("__metadata__ has \"", Printable(name), "\" twice"));
      default:
        return TensorKey(name);
    }
  }

  bool parse_error(size_t position, const std::string&, const json::exception&) override {
    return Fail(absl::StrCat("header is not JSON at byte ", position));
  }

  std::vector<Entry> entries;
  std::string error;

 private:
  enum class State {
    kStart,
    kTop,            // between tensors
    kMetadataValue,  // before its {
    kMetadata,       // inside it
    kTensorValue,    // before a tensor's {
    kTensor,         // inside it
    kDType,
    kShapeValue,
    kShape,
    kOffsetsValue,
    kOffsets,
    kEnd,
  };

  TensorInfo& info() { return entries.back().second; }

  bool Fail(std::string message) {
    if (error.empty()) error = std::move(message);
    return false;
  }

  bool FailField(std::string_view field, std::string_view what) {
    return Fail(absl::StrCat("tensor ", Printable(entries.back().first), ": ", AbslView(field), " ",
                             AbslView(what)));
  }

  bool Unexpected(std::string_view what) {
    if (entries.empty()) return Fail(absl::StrCat("header has ", AbslView(what), " out of place"));
    return Fail(absl::StrCat("header has ", AbslView(what), " out of place, at or after tensor ",
                             Printable(entries.back().first)));
  }

  bool TopKey(const std::string& name) {
    if (name == "__metadata__") {
      if (seen_metadata_) return Fail("header has __metadata__ twice");
      seen_metadata_ = true;
      state_ = State::kMetadataValue;
      return true;
    }
    const bool plain = !name.empty() && name.size() <= kMaxNameBytes &&
                       std::none_of(name.begin(), name.end(),
                                    [](unsigned char c) { return c < 0x20 || c == 0x7f; });
    if (!plain) return Fail(absl::StrCat("bad tensor name \"", Printable(name), "\""));
    if (entries.size() == kMaxTensors) {
      return Fail(absl::StrCat("header names more than ", kMaxTensors, " tensors"));
    }
    entries.emplace_back(name, TensorInfo());
    dtype_ = nullptr;
    seen_shape_ = false;
    num_offsets_ = 0;
    state_ = State::kTensorValue;
    return true;
  }

  bool TensorKey(const std::string& name) {
    if (name == "dtype" && dtype_ == nullptr) {
      state_ = State::kDType;
    } else if (name == "shape" && !seen_shape_) {
      seen_shape_ = true;
      state_ = State::kShapeValue;
    } else if (name == "data_offsets" && num_offsets_ == 0) {
      state_ = State::kOffsetsValue;
    } else {
      return FailField(Printable(name), "is unknown, or there twice");
    }
    return true;
  }

  bool FinishTensor() {
    if (dtype_ == nullptr) return FailField("dtype", "is missing");
    if (!seen_shape_) return FailField("shape", "is missing");
    if (num_offsets_ != 2) return FailField("data_offsets", "is missing");
    const auto [begin, end] = std::pair(offsets_[0], offsets_[1]);
    if (end < begin) return FailField("data_offsets", "ends before it begins");
    uint64_t bits = static_cast<uint64_t>(dtype_->bits);
    for (const int64_t size : info().shape) {
      if (__builtin_mul_overflow(bits, static_cast<uint64_t>(size), &bits)) {
        return FailField("shape", "overflows");
      }
    }
    if (bits % 8 != 0 || bits / 8 != end - begin) {
      return FailField(
          "data_offsets",
          absl::StrCat("spans ", end - begin, " bytes, but dtype ", AbslView(dtype_->name),
                       " and shape [", absl::StrJoin(info().shape, ", "), "] need ", bits / 8));
    }
    info().dtype_name = dtype_->name;
    info().loadable = dtype_->dtype.has_value();
    info().dtype = dtype_->dtype.value_or(DType::kFloat32);
    info().offset = begin;  // from the end of the header, until the caller has checked it
    info().num_bytes = end - begin;
    return true;
  }

  State state_ = State::kStart;
  bool seen_metadata_ = false;
  std::set<std::string> metadata_keys_;
  const StoredDType* dtype_ = nullptr;
  bool seen_shape_ = false;
  uint64_t offsets_[2] = {0, 0};
  int num_offsets_ = 0;
};

// The tensors, in order of their place, must follow each other without a gap.
std::string CheckCoverage(const std::vector<Entry>& entries, uint64_t data_bytes) {
  std::vector<const Entry*> order;
  order.reserve(entries.size());
  for (const Entry& entry : entries) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](const Entry* a, const Entry* b) {
    return std::pair(a->second.offset, a->second.num_bytes) <
           std::pair(b->second.offset, b->second.num_bytes);
  });
  uint64_t expected = 0;
  for (const Entry* entry : order) {
    const TensorInfo& info = entry->second;
    if (info.offset > data_bytes || info.num_bytes > data_bytes - info.offset) {
      return absl::StrCat("tensor ", Printable(entry->first), ": bytes ", info.offset, " to ",
                          info.offset + info.num_bytes, " of the data, which has only ", data_bytes,
                          " (file cut short?)");
    }
    if (info.offset != expected) {
      return absl::StrCat("tensor ", Printable(entry->first), ": begins at byte ", info.offset,
                          " of the data, but the tensors before it end at ", expected,
                          info.offset < expected ? " (overlap)" : " (hole)");
    }
    expected += info.num_bytes;
  }
  if (expected != data_bytes) {
    return absl::StrCat("tensors end at byte ", expected, " of the data, which has ", data_bytes);
  }
  return "";
}

std::string FindDuplicate(const std::vector<Entry>& entries) {
  std::vector<std::string_view> names;
  names.reserve(entries.size());
  for (const Entry& entry : entries) names.push_back(entry.first);
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice == names.end()) return "";
  return absl::StrCat("tensor ", Printable(*twice), ": named twice");
}

}  // namespace

absl::StatusOr<uint64_t> ParseSafetensorsLength(std::string_view first_bytes, uint64_t file_bytes,
                                                std::string_view where) {
  if (file_bytes < kSafetensorsLengthBytes || first_bytes.size() < kSafetensorsLengthBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        AbslView(where), ": ", file_bytes, " bytes long; a safetensors file has at least 8"));
  }
  uint64_t length = 0;
  for (size_t i = 0; i < kSafetensorsLengthBytes; ++i) {
    length |= static_cast<uint64_t>(static_cast<unsigned char>(first_bytes[i])) << (8 * i);
  }
  if (length > kMaxSafetensorsHeaderBytes) {
    return absl::InvalidArgumentError(absl::StrCat(AbslView(where), ": header of ", length,
                                                   " bytes; at most ", kMaxSafetensorsHeaderBytes,
                                                   " are allowed (not a safetensors file?)"));
  }
  if (length > file_bytes - kSafetensorsLengthBytes) {
    return absl::InvalidArgumentError(absl::StrCat(AbslView(where), ": header of ", length,
                                                   " bytes in a file of ", file_bytes,
                                                   " (file cut short?)"));
  }
  return length;
}

absl::StatusOr<std::vector<Entry>> ParseSafetensorsHeader(std::string_view header,
                                                          uint64_t file_bytes,
                                                          std::string_view where) {
  const auto bad = [&](std::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat(AbslView(where), ": ", AbslView(what)));
  };
  if (!header.starts_with('{')) return bad("header does not begin with {");
  // The parser takes a NUL byte for the end of its input.
  if (header.find('\0') != header.npos) return bad("header is not JSON: has a NUL byte");
  const uint64_t data_begin = kSafetensorsLengthBytes + header.size();
  if (data_begin > file_bytes) return bad("header is longer than the file");
  HeaderReader reader;
  try {
    json::sax_parse(header.begin(), header.end(), &reader);
  } catch (const std::exception& e) {
    return bad(absl::StrCat("header is not JSON: ", Printable(e.what())));
  }
  if (reader.error.empty()) reader.error = FindDuplicate(reader.entries);
  if (reader.error.empty()) {
    reader.error = CheckCoverage(reader.entries, file_bytes - data_begin);
  }
  if (!reader.error.empty()) return bad(reader.error);
  for (Entry& entry : reader.entries) entry.second.offset += data_begin;
  return std::move(reader.entries);
}

}  // namespace lockstep
