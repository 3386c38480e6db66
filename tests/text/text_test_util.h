// Fixtures shared by the text tests: the committed tokenizers and golden
// outputs, and model directories made for one test.
#ifndef LOCKSTEP_TESTS_TEXT_TEXT_TEST_UTIL_H_
#define LOCKSTEP_TESTS_TEXT_TEXT_TEST_UTIL_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "coordinator/text/tokenizer.h"
#include "nlohmann/json.hpp"
#include "tests/fakes/temp_dir.h"

namespace lockstep {

inline std::string TextData(const std::string& name) {
  return std::string(LOCKSTEP_SOURCE_DIR) + "/tests/text/data/" + name;
}

inline std::string ReadText(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.good()) << path;
  return std::string(std::istreambuf_iterator<char>(in), {});
}

// What Hugging Face's own code gave; see make_fixtures.py.
inline const nlohmann::json& Golden() {
  static const auto& golden =
      *new nlohmann::json(nlohmann::json::parse(ReadText(TextData("golden.json"))));
  return golden;
}

inline const std::vector<std::string>& TokenizerNames() {
  static const auto& names = *new std::vector<std::string>{
      "byte_level", "byte_fallback", "byte_fallback_plain", "unigram", "word_level", "word_piece"};
  return names;
}

inline std::shared_ptr<const Tokenizer> LoadFixture(const std::string& name) {
  auto tokenizer = Tokenizer::Load(TextData(name));
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *tokenizer : nullptr;
}

// A directory of its own, gone at the end.
class ModelDir : public TempDir {
 public:
  ModelDir& Write(const std::string& name, std::string_view content) {
    std::ofstream(File(name), std::ios::binary) << content;
    return *this;
  }
};

// A pseudo-random sequence, the same everywhere; other sequences come with
// --gtest_shuffle --gtest_random_seed=N.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed + Variation()) {}
  // In [0, bound).
  uint32_t Below(uint32_t bound) {
    state_ += 0x9E3779B97F4A7C15u;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return static_cast<uint32_t>((z ^ (z >> 31)) % bound);
  }

 private:
  static uint64_t Variation() {
    return static_cast<uint64_t>(testing::UnitTest::GetInstance()->random_seed()) << 32;
  }

  uint64_t state_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_TEXT_TEXT_TEST_UTIL_H_
