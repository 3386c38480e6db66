#include "model/safetensors.h"

#include <sys/stat.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/fakes/temp_dir.h"
#include "tests/model/model_testing.h"

namespace lockstep {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

class SafetensorsTest : public testing::Test {
 protected:
  std::unique_ptr<Checkpoint> OpenOrDie() {
    absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = Checkpoint::Open(dir_.path());
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
    return *std::move(checkpoint);
  }
  absl::Status OpenError() { return Checkpoint::Open(dir_.path()).status(); }

  // A file of one float32 tensor.
  void WriteTensor(const std::string& file, const std::string& name, float value) {
    SafetensorsWriter writer;
    writer.Add(name, "F32", {1}, FloatBytes({value}));
    writer.WriteTo(dir_.File(file));
  }
  void WriteIndex(const nlohmann::json& weight_map) {
    WriteFileOrDie(
        dir_.File("model.safetensors.index.json"),
        nlohmann::json{{"metadata", {{"total_size", 8}}}, {"weight_map", weight_map}}.dump());
  }

  TempDir dir_;
};

TEST_F(SafetensorsTest, ReadsTensorsOfOneFile) {
  SafetensorsWriter writer;
  writer.Add("matrix", "F32", {2, 3}, FloatBytes({1, 2, 3, 4, 5, 6}));
  writer.Add("half", "BF16", {3}, std::string("abcdef"));
  writer.Add("scalar", "F16", {}, std::string("xy"));
  writer.Add("nothing", "F32", {0, 7}, "");
  writer.Add("small", "F8_E4M3", {2}, "pq");
  writer.Add("buffer", "I64", {1}, std::string(8, 'i'));
  writer.WriteTo(dir_.File("model.safetensors"));

  const std::unique_ptr<Checkpoint> checkpoint = OpenOrDie();
  EXPECT_THAT(checkpoint->files(), ElementsAre(dir_.File("model.safetensors")));
  EXPECT_EQ(checkpoint->tensors().size(), 6u);
  const TensorInfo* matrix = checkpoint->Find("matrix");
  ASSERT_NE(matrix, nullptr);
  EXPECT_EQ(matrix->dtype, DType::kFloat32);
  EXPECT_TRUE(matrix->loadable);
  EXPECT_THAT(matrix->shape, ElementsAre(2, 3));
  const absl::Span<const std::byte> bytes = checkpoint->Bytes(*matrix);
  ASSERT_EQ(bytes.size(), 24u);
  float last = 0;
  std::memcpy(&last, bytes.data() + 20, 4);
  EXPECT_EQ(last, 6.0f);

  const absl::Span<const std::byte> half = checkpoint->Bytes(*checkpoint->Find("half"));
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(half.data()), half.size()), "abcdef");
  EXPECT_EQ(checkpoint->Find("half")->dtype, DType::kBFloat16);
  EXPECT_EQ(checkpoint->Find("scalar")->dtype, DType::kFloat16);
  EXPECT_TRUE(checkpoint->Find("scalar")->shape.empty());
  EXPECT_EQ(checkpoint->Bytes(*checkpoint->Find("nothing")).size(), 0u);
  EXPECT_EQ(checkpoint->Find("small")->dtype, DType::kFloat8E4M3);
  EXPECT_FALSE(checkpoint->Find("buffer")->loadable);
  EXPECT_EQ(checkpoint->Find("buffer")->dtype_name, "I64");
  EXPECT_EQ(checkpoint->Find("absent"), nullptr);
  EXPECT_TRUE(checkpoint->CheckUnchanged().ok());
}

TEST_F(SafetensorsTest, AdviceOnAnyRangeLeavesTheBytesAsTheyAre) {
  SafetensorsWriter writer;
  writer.Add("a", "F32", {5000}, std::string(20'000, 'a'));
  writer.Add("b", "F32", {5000}, std::string(20'000, 'b'));
  writer.WriteTo(dir_.File("model.safetensors"));
  const std::unique_ptr<Checkpoint> checkpoint = OpenOrDie();
  for (const char* name : {"a", "b"}) {
    const TensorInfo& info = *checkpoint->Find(name);
    for (const uint64_t begin : {0, 1, 4096, 19'999, 20'000, 90'000}) {
      checkpoint->WillNeed(info, begin, begin + 10'000);
      checkpoint->DoneWith(info, begin, begin + 10'000);
    }
    for (const std::byte byte : checkpoint->Bytes(info)) {
      ASSERT_EQ(static_cast<char>(byte), *name);
    }
  }
}

TEST_F(SafetensorsTest, ReadsTheFilesOfAnIndex) {
  WriteTensor("model-00001-of-00002.safetensors", "a", 1);
  WriteTensor("model-00002-of-00002.safetensors", "b", 2);
  WriteTensor("consolidated.safetensors", "a", 3);  // not of the index: not opened
  WriteIndex(
      {{"a", "model-00001-of-00002.safetensors"}, {"b", "model-00002-of-00002.safetensors"}});
  const std::unique_ptr<Checkpoint> checkpoint = OpenOrDie();
  EXPECT_EQ(checkpoint->files().size(), 2u);
  EXPECT_EQ(checkpoint->Find("b")->file, 1u);
  float value = 0;
  std::memcpy(&value, checkpoint->Bytes(*checkpoint->Find("b")).data(), 4);
  EXPECT_EQ(value, 2.0f);
}

TEST_F(SafetensorsTest, WithoutAnIndexEveryFileIsRead) {
  WriteTensor("x.safetensors", "a", 1);
  WriteTensor("y.safetensors", "b", 2);
  EXPECT_EQ(OpenOrDie()->files().size(), 2u);
  WriteTensor("z.safetensors", "a", 3);
  EXPECT_THAT(Message(OpenError()),
              AllOf(HasSubstr("z.safetensors"), HasSubstr("tensor a"), HasSubstr("x.safetensors")));
}

TEST_F(SafetensorsTest, ASymlinkedFileIsRead) {
  TempDir blobs;
  SafetensorsWriter writer;
  writer.Add("a", "F32", {1}, FloatBytes({1}));
  writer.WriteTo(blobs.File("blob"));
  std::filesystem::create_symlink(blobs.File("blob"), dir_.File("model.safetensors"));
  EXPECT_NE(OpenOrDie()->Find("a"), nullptr);
}

TEST_F(SafetensorsTest, AnIndexThatDoesNotHoldIsRefused) {
  WriteTensor("one.safetensors", "a", 1);
  WriteTensor("two.safetensors", "b", 1);
  WriteIndex({{"a", "one.safetensors"}, {"b", "three.safetensors"}});
  EXPECT_THAT(Message(OpenError()), AllOf(HasSubstr("index.json"), HasSubstr("three.safetensors")));
  EXPECT_EQ(OpenError().code(), absl::StatusCode::kFailedPrecondition);
  WriteIndex({{"a", "one.safetensors"}, {"c", "two.safetensors"}});
  EXPECT_THAT(Message(OpenError()), AllOf(HasSubstr("index.json"), HasSubstr("tensor c")));
  WriteIndex({{"a", "two.safetensors"}, {"b", "one.safetensors"}});  // swapped
  EXPECT_THAT(Message(OpenError()), HasSubstr("tensor a"));
}

TEST_F(SafetensorsTest, AnIndexCannotLeaveTheDirectory) {
  WriteTensor("one.safetensors", "a", 1);
  for (const nlohmann::json& name :
       {nlohmann::json("../one.safetensors"), nlohmann::json("/etc/one.safetensors"),
        nlohmann::json("sub/one.safetensors"), nlohmann::json(".safetensors"),
        nlohmann::json("..safetensors"), nlohmann::json(""), nlohmann::json("one.bin"),
        nlohmann::json("a\\b.safetensors"), nlohmann::json(std::string("one\0.safetensors", 16)),
        nlohmann::json(7), nlohmann::json(nullptr),
        nlohmann::json(std::string(300, 'x') + ".safetensors")}) {
    WriteIndex({{"a", name}});
    EXPECT_THAT(Message(OpenError()), HasSubstr("plain name")) << name;
  }
  for (const char* text : {"{}", "{\"weight_map\":[]}", "{\"weight_map\":{}}", "[", "",
                           "{\"weight_map\":{\"a\":\"x.safetensors\",\"a\":\"y.safetensors\"}}"}) {
    WriteFileOrDie(dir_.File("model.safetensors.index.json"), text);
    EXPECT_THAT(Message(OpenError()), HasSubstr("index.json")) << text;
  }
}

TEST_F(SafetensorsTest, NothingToReadIsNotFound) {
  EXPECT_EQ(OpenError().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(OpenError()), HasSubstr("model.safetensors"));
  EXPECT_EQ(Checkpoint::Open(dir_.File("absent")).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(SafetensorsTest, WhatIsNotAFileIsRefused) {
  std::filesystem::create_directory(dir_.File("model.safetensors"));
  EXPECT_THAT(Message(OpenError()), HasSubstr("regular file"));
  std::filesystem::remove(dir_.File("model.safetensors"));
  ASSERT_EQ(::mkfifo(dir_.File("model.safetensors").c_str(), 0600), 0);
  EXPECT_THAT(Message(OpenError()), HasSubstr("regular file"));
}

TEST_F(SafetensorsTest, AFileThatShrinksOrChangesIsFound) {
  WriteTensor("model.safetensors", "a", 1);
  const std::unique_ptr<Checkpoint> checkpoint = OpenOrDie();
  std::filesystem::resize_file(dir_.File("model.safetensors"), 20);
  EXPECT_THAT(Message(checkpoint->CheckUnchanged()),
              AllOf(HasSubstr("model.safetensors"), HasSubstr("changed")));
}

TEST_F(SafetensorsTest, DigestFollowsNamesDTypesShapesAndValues) {
  const auto digest = [&](const std::string& name, std::string_view dtype,
                          const std::vector<int64_t>& shape, char fill) {
    SafetensorsWriter writer;
    writer.Add(name, dtype, shape, std::string(8, fill));
    writer.WriteTo(dir_.File("model.safetensors"));
    return *OpenOrDie()->Digest();
  };
  const uint64_t base = digest("a", "F32", {2, 1}, 'x');
  EXPECT_EQ(digest("a", "F32", {2, 1}, 'x'), base);
  EXPECT_NE(digest("a", "F32", {2, 1}, 'y'), base);
  EXPECT_NE(digest("b", "F32", {2, 1}, 'x'), base);
  EXPECT_NE(digest("a", "F32", {1, 2}, 'x'), base);
  EXPECT_NE(digest("a", "F16", {2, 2}, 'x'), base);
}

}  // namespace
}  // namespace lockstep
