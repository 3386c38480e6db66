#include "worker/kv_scales.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "tests/fakes/safetensors_writer.h"
#include "tests/fakes/temp_dir.h"

namespace lockstep {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

struct Stored {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<float> values;
};

absl::StatusOr<std::vector<KvScales>> Read(const std::vector<Stored>& tensors,
                                           int64_t num_layers = 2) {
  const TempDir dir;
  SafetensorsWriter writer;
  for (const Stored& t : tensors) writer.Add(t.name, "F32", t.shape, FloatBytes(t.values));
  writer.WriteTo(dir.File("model.safetensors"));
  const auto checkpoint = Checkpoint::Open(dir.path());
  if (!checkpoint.ok()) return checkpoint.status();
  return ReadKvScales(**checkpoint, num_layers);
}

std::string Error(const Stored& tensor) {
  const auto scales = Read({tensor});
  EXPECT_FALSE(scales.ok());
  EXPECT_THAT(std::string(scales.status().message()),
              AllOf(HasSubstr(tensor.name), HasSubstr("model.safetensors"),
                    HasSubstr("--kv-cache-dtype auto")));
  return std::string(scales.status().message());
}

TEST(KvScalesTest, ACheckpointWithoutScalesHasNone) {
  const auto scales = Read({{"model.layers.0.self_attn.k_proj.weight_scale", {1}, {3.0f}},
                            {"model.layers.0.mlp.k_scale", {1}, {3.0f}},
                            {"model.layers.0.self_attn.q_scale", {1}, {3.0f}},
                            {"model.layers.x.self_attn.k_scale", {1}, {3.0f}},
                            {"k_scale", {1}, {3.0f}},
                            {"self_attn.k_scale", {1}, {3.0f}},
                            {"model.layers.2.self_attn.k_scale", {1}, {3.0f}}});  // not the model's
  ASSERT_TRUE(scales.ok()) << scales.status();
  EXPECT_THAT(*scales, IsEmpty());
}

TEST(KvScalesTest, ALayersScalesHaveManyNames) {
  const auto scales = Read({{"model.layers.0.self_attn.k_scale", {1}, {0.25f}},
                            {"model.layers.0.self_attn.v_scale", {}, {0.5f}},
                            {"model.layers.1.self_attn.k_proj.k_scale", {1}, {2.0f}},
                            {"model.layers.1.self_attn.v_proj.v_scale", {1, 1}, {4.0f}},
                            {"language_model.model.layers.2.self_attn.attn.v_scale", {1}, {8.0f}},
                            {"model.decoder.layers.3.self_attn.kv_scale", {1}, {16.0f}}},
                           5);
  ASSERT_TRUE(scales.ok()) << scales.status();
  EXPECT_THAT(*scales, ElementsAre(KvScales{0.25f, 0.5f}, KvScales{2.0f, 4.0f},
                                   KvScales{1.0f, 8.0f}, KvScales{16.0f, 16.0f}, KvScales{}));
}

TEST(KvScalesTest, SixteenBitsWillDo) {
  const TempDir dir;
  SafetensorsWriter writer;
  writer.Add("model.layers.0.self_attn.k_scale", "BF16", {1}, std::string("\xc0\x3f", 2));  // 1.5
  writer.Add("model.layers.0.self_attn.v_scale", "F16", {1}, std::string("\x00\x42", 2));   // 3
  writer.WriteTo(dir.File("model.safetensors"));
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto scales = ReadKvScales(**checkpoint, 1);
  ASSERT_TRUE(scales.ok()) << scales.status();
  EXPECT_THAT(*scales, ElementsAre(KvScales{1.5f, 3.0f}));
}

TEST(KvScalesTest, WhatIsNoScaleIsNamed) {
  const std::string name = "model.layers.1.self_attn.v_scale";
  EXPECT_THAT(Error({name, {2}, {1.0f, 2.0f}}), HasSubstr("one scale a layer"));
  EXPECT_THAT(Error({name, {0}, {}}), HasSubstr("one scale a layer"));
  for (const float bad : {0.0f, -1.0f, std::numeric_limits<float>::infinity(), std::nanf(""),
                          std::numeric_limits<float>::denorm_min()}) {
    EXPECT_THAT(Error({name, {1}, {bad}}), HasSubstr("above 0"));
  }
  const TempDir dir;
  SafetensorsWriter writer;
  writer.Add(name, "I64", {1}, std::string(8, '\1'));
  writer.WriteTo(dir.File("model.safetensors"));
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_THAT(std::string(ReadKvScales(**checkpoint, 2).status().message()),
              AllOf(HasSubstr(name), HasSubstr("I64")));
}

}  // namespace
}  // namespace lockstep
