#include "cli/bench/model_shapes.h"

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "nlohmann/json.hpp"

namespace lockstep {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kBytes = 256;

// The numbers of the models' own config.json files.
struct Shape {
  const char* name;
  int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, positions;
  bool tied;
};
constexpr Shape kShapes[] = {
    {"llama-8b", 32, 4096, 32, 8, 128, 14336, 128256, 131072, false},
    {"llama-70b", 80, 8192, 64, 8, 128, 28672, 128256, 131072, false},
    {"llama-1b", 16, 2048, 32, 8, 64, 8192, 128256, 131072, true},
    {"tiny", 2, 64, 4, 4, 16, 128, 1024, 4096, false},  // to try a command with
};

Json Config(const Shape& shape) {
  return {
      {"architectures", {"LlamaForCausalLM"}},
      {"model_type", "llama"},
      {"torch_dtype", "bfloat16"},
      {"num_hidden_layers", shape.layers},
      {"hidden_size", shape.hidden},
      {"num_attention_heads", shape.heads},
      {"num_key_value_heads", shape.kv_heads},
      {"head_dim", shape.head_dim},
      {"intermediate_size", shape.intermediate},
      {"vocab_size", shape.vocab},
      {"max_position_embeddings", shape.positions},
      {"tie_word_embeddings", shape.tied},
      {"hidden_act", "silu"},
      {"rms_norm_eps", 1e-5},
      {"rope_theta", 500000.0},
      {"eos_token_id", shape.vocab - 1},
  };
}

std::string Utf8(uint32_t code_point) {
  if (code_point < 0x80) return std::string(1, static_cast<char>(code_point));
  return {static_cast<char>(0xC0 | (code_point >> 6)), static_cast<char>(0x80 | (code_point & 63))};
}

// How byte-level vocabularies spell a byte: itself where it prints, else a
// character from 256 on, in order.
std::vector<std::string> ByteSpellings() {
  std::vector<std::string> spellings;
  uint32_t next = kBytes;
  for (uint32_t byte = 0; byte < kBytes; ++byte) {
    const bool prints = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
    spellings.push_back(Utf8(prints ? byte : next++));
  }
  return spellings;
}

// 0: " a", 1: " b", ... 26: " ba": a space and the number in letters.
std::string Word(const std::string& space, int64_t number) {
  std::string letters;
  do {
    letters.insert(letters.begin(), static_cast<char>('a' + number % 26));
    number /= 26;
  } while (number > 0);
  return space + letters;
}

Json Tokenizer(const Shape& shape) {
  const std::vector<std::string> bytes = ByteSpellings();
  const int64_t end = shape.vocab - 1;
  // Appended, not looked up: every spelling is new.
  Json vocab = Json::object();
  auto& entries = vocab.get_ref<Json::object_t&>();
  for (int64_t id = 0; id < end; ++id) {
    entries.emplace_back(
        id < kBytes ? bytes[static_cast<size_t>(id)] : Word(bytes[' '], id - kBytes), id);
  }
  const Json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", false},
                           {"use_regex", false}};
  return {
      {"version", "1.0"},
      {"added_tokens",
       {{{"id", end},
         {"content", "<|end|>"},
         {"single_word", false},
         {"lstrip", false},
         {"rstrip", false},
         {"normalized", false},
         {"special", true}}}},
      {"pre_tokenizer", byte_level},
      {"decoder", byte_level},
      {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", Json::array()}}},
  };
}

absl::Status WriteJson(const std::filesystem::path& path, const Json& json) {
  std::ofstream file(path, std::ios::trunc);
  file << json.dump() << "\n" << std::flush;
  if (file) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat(path.string(), ": cannot be written"));
}

}  // namespace

std::vector<std::string> ModelShapeNames() {
  std::vector<std::string> names;
  for (const Shape& shape : kShapes) names.push_back(shape.name);
  return names;
}

absl::Status WriteModelShape(const std::string& name, const std::string& directory) {
  const auto shape = std::find_if(std::begin(kShapes), std::end(kShapes),
                                  [&](const Shape& each) { return each.name == name; });
  if (shape == std::end(kShapes)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "\"", name, "\" is not a known shape; there are ", absl::StrJoin(ModelShapeNames(), ", ")));
  }
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) return absl::UnavailableError(absl::StrCat(directory, ": ", error.message()));
  const std::filesystem::path folder = directory;
  if (std::filesystem::exists(folder / "config.json", error)) {
    return absl::AlreadyExistsError(
        absl::StrCat(directory, ": holds a config.json; name another directory"));
  }
  if (absl::Status status = WriteJson(folder / "tokenizer.json", Tokenizer(*shape)); !status.ok()) {
    return status;
  }
  return WriteJson(folder / "config.json", Config(*shape));
}

}  // namespace lockstep
