#include "worker/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/memory_model.h"
#include "tests/fakes/temp_dir.h"
#include "worker/backend/cpu/half.h"
#include "worker/weight_pieces.h"

namespace lockstep {
namespace {

using testing::HasSubstr;

std::string Golden(const std::string& name) {
  return std::string(LOCKSTEP_SOURCE_DIR) + "/tests/golden/" + name;
}

struct Loaded {
  ModelConfig config;
  std::unique_ptr<Checkpoint> checkpoint;
};

Loaded Open(const std::string& name) {
  Loaded l;
  l.config = *LoadModelConfig(Golden(name));
  l.checkpoint = *Checkpoint::Open(Golden(name));
  return l;
}

float ValueAt(const std::byte* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) {
    float v;
    std::memcpy(&v, data + 4 * i, 4);
    return v;
  }
  uint16_t bits;
  std::memcpy(&bits, data + 2 * i, 2);
  return dtype == DType::kFloat16 ? cpu::ToFloat(cpu::Float16{bits})
                                  : cpu::ToFloat(cpu::BFloat16{bits});
}

float Rounded(float v, DType dtype) {
  if (dtype == DType::kFloat16) return cpu::ToFloat(cpu::ToFloat16(v));
  if (dtype == DType::kBFloat16) return cpu::ToFloat(cpu::ToBFloat16(v));
  return v;
}

const TensorInfo* FindAny(const Checkpoint& checkpoint, const TensorSlice& slice) {
  if (const TensorInfo* info = checkpoint.Find(slice.name)) return info;
  for (const std::string& name : slice.alternatives) {
    if (const TensorInfo* info = checkpoint.Find(name)) return info;
  }
  return nullptr;
}

// Every element of every local tensor, looked up in the checkpoint one by one.
void ExpectHolds(const Weights& weights, const Checkpoint& checkpoint, const ShardPlan& plan,
                 DType dtype) {
  for (const LocalTensor& local : plan.tensors) {
    const WeightTensor* t = weights.Find(local.name);
    ASSERT_NE(t, nullptr) << local.name;
    ASSERT_EQ(t->dtype, local.is_matrix ? dtype : DType::kFloat32) << local.name;
    int64_t row = 0;
    for (const TensorSlice& slice : local.slices) {
      const TensorInfo* info = FindAny(checkpoint, slice);
      ASSERT_NE(info, nullptr) << slice.name;
      const std::byte* bytes = checkpoint.Bytes(*info).data();
      for (int64_t r = slice.row_begin; r < slice.row_end; ++r, ++row) {
        for (int64_t c = slice.col_begin; c < slice.col_end; ++c) {
          const float stored = ValueAt(bytes, info->dtype, r * slice.cols + c);
          ASSERT_EQ(ValueAt(t->data, t->dtype, row * t->cols + c - slice.col_begin),
                    Rounded(stored, t->dtype))
              << local.name << " " << row << "," << c;
        }
      }
    }
    for (; row < t->rows; ++row) {
      for (int64_t c = 0; c < t->cols; ++c) {
        ASSERT_EQ(ValueAt(t->data, t->dtype, row * t->cols + c), 0.0f)
            << "padding of " << local.name;
      }
    }
  }
}

TEST(WeightsTest, EveryRankHoldsItsSlicesInEveryDType) {
  ThreadPool pool(2);
  for (const char* name : {"llama", "llama2_mha_sharded", "llama_mqa_bf16", "llama_v5_f16", "opt",
                           "opt_post_norm_projected", "gemma3_v5_bf16"}) {
    const Loaded model = Open(name);
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      for (const int64_t tp_size : {1, 4}) {
        for (int64_t rank = 0; rank < tp_size; ++rank) {
          const ShardPlan plan = *MakeShardPlan(model.config, tp_size, rank);
          int64_t done = -1, total = 0;
          WeightOptions options{.dtype = dtype, .progress = [&](int64_t d, int64_t t) {
                                  EXPECT_GT(d, done);
                                  done = d;
                                  total = t;
                                }};
          auto weights = Weights::Load(*model.checkpoint, plan, options, &pool);
          ASSERT_TRUE(weights.ok()) << name << ": " << weights.status();
          ExpectHolds(**weights, *model.checkpoint, plan, dtype);
          EXPECT_EQ((*weights)->allocated_bytes(), WeightBytes(plan, dtype, ""));
          EXPECT_EQ(done, total);
          EXPECT_EQ(total, (*weights)->allocated_bytes());
          EXPECT_FALSE((*weights)->phases().empty());
        }
      }
    }
  }
}

TEST(WeightsTest, ReadsOnlyItsOwnBytes) {
  ThreadPool pool(1);
  const Loaded model = Open("llama");
  int64_t whole = 0;
  for (const auto& [name, info] : model.checkpoint->tensors())
    whole += static_cast<int64_t>(info.num_bytes);
  const ShardPlan one = *MakeShardPlan(model.config, 1, 0);
  EXPECT_EQ(
      (*Weights::Load(*model.checkpoint, one, {.dtype = DType::kFloat32, .progress = {}}, &pool))
          ->checkpoint_bytes(),
      whole);
  int64_t sum = 0, replicated = 0;
  for (int64_t rank = 0; rank < 2; ++rank) {
    const ShardPlan plan = *MakeShardPlan(model.config, 2, rank);
    for (const LocalTensor& t : plan.tensors) {
      if (!t.is_matrix && rank == 1) replicated += t.rows * 4;
    }
    sum += (*Weights::Load(*model.checkpoint, plan, {.dtype = DType::kBFloat16, .progress = {}},
                           &pool))
               ->checkpoint_bytes();
  }
  EXPECT_EQ(sum, whole + replicated);
}

TEST(WeightsTest, NamesAMissingTensorAndItsFile) {
  ThreadPool pool(1);
  const Loaded model = Open("llama");
  ShardPlan plan = *MakeShardPlan(model.config, 1, 0);
  plan.tensors.back().slices[0].name = "model.nothing.weight";
  plan.tensors.back().slices[0].alternatives = {"nothing.weight"};
  const auto weights = Weights::Load(*model.checkpoint, plan, {}, &pool);
  EXPECT_EQ(weights.status().code(), absl::StatusCode::kNotFound);
  const std::string message(weights.status().message());
  EXPECT_THAT(message, HasSubstr("\"model.nothing.weight\" (nor \"nothing.weight\")"));
  EXPECT_THAT(message, HasSubstr("llama/model.safetensors"));
}

TEST(WeightsTest, NamesATensorOfAnotherShape) {
  ThreadPool pool(1);
  const Loaded model = Open("llama");
  ModelConfig config = model.config;
  config.intermediate_size += 8;
  const ShardPlan plan = *MakeShardPlan(config, 1, 0);
  const auto weights = Weights::Load(*model.checkpoint, plan, {}, &pool);
  EXPECT_EQ(weights.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(weights.status().message()),
              HasSubstr("\"model.layers.0.mlp.gate_proj.weight\" has shape [96, 64]; config.json "
                        "asks for [104, 64]"));
}

TEST(WeightsTest, AFileThatShrankIsAnErrorAndNotASignal) {
  const TempDir directory;
  const std::string& dir = directory.path();
  std::filesystem::copy(Golden("llama"), dir);
  auto checkpoint = Checkpoint::Open(dir);
  ASSERT_TRUE(checkpoint.ok());
  std::filesystem::resize_file(dir + "/model.safetensors", 5000);
  ThreadPool pool(1);
  const ShardPlan plan = *MakeShardPlan(*LoadModelConfig(dir), 1, 0);
  const auto weights = Weights::Load(**checkpoint, plan, {}, &pool);
  ASSERT_FALSE(weights.ok());
  EXPECT_THAT(std::string(weights.status().message()), HasSubstr("model.safetensors"));
}

// Read as another type they would be noise: a head that was quantised, parts of one matrix that
// were and others that were not.
TEST(WeightPiecesTest, FloatsOf8BitsAreReadWhereTheyAreExpectedAlone) {
  const TensorInfo wide{.dtype = DType::kBFloat16, .dtype_name = "BF16", .shape = {2, 4}};
  const TensorInfo narrow{.dtype = DType::kFloat8E4M3, .dtype_name = "F8_E4M3", .shape = {2, 4}};
  const auto slice = [](const char* name) {
    return TensorSlice{
        .name = name, .alternatives = {}, .rows = 2, .cols = 4, .row_end = 2, .col_end = 4};
  };
  ShardPlan plan;
  plan.tensors = {{.name = "matrix", .rows = 4, .cols = 4, .slices = {slice("q"), slice("k")}}};
  const auto cut = [&](DType as, const TensorInfo& q, const TensorInfo& k) {
    return CutIntoPieces(
               plan, [&](const LocalTensor&) { return as; },
               [&](const TensorSlice& s) -> absl::StatusOr<const TensorInfo*> {
                 return s.name == "q" ? &q : &k;
               })
        .status();
  };
  EXPECT_TRUE(cut(DType::kBFloat16, wide, wide).ok());
  EXPECT_TRUE(cut(DType::kFloat8E4M3, narrow, narrow).ok());
  for (const auto& refused :
       {cut(DType::kBFloat16, narrow, narrow), cut(DType::kBFloat16, wide, narrow),
        cut(DType::kFloat8E4M3, narrow, wide)}) {
    EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(refused.message()), HasSubstr("float8"));
  }
}

TEST(WeightsTest, RefusesADTypeItCannotKeep) {
  ThreadPool pool(1);
  const Loaded model = Open("llama");
  const ShardPlan plan = *MakeShardPlan(model.config, 1, 0);
  const auto weights =
      Weights::Load(*model.checkpoint, plan, {.dtype = DType::kFloat8E4M3, .progress = {}}, &pool);
  EXPECT_EQ(weights.status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(WeightsTest, DummyRanksHoldPiecesOfOneModel) {
  ThreadPool one(1), two(2);
  const ModelConfig config = *LoadModelConfig(Golden("gemma3"));
  const ShardPlan whole_plan = *MakeShardPlan(config, 1, 0);
  const auto whole = *Weights::Dummy(whole_plan, config, {}, &one);
  // A stored tensor's value at (row, col), out of the whole model's fused ones.
  const auto value = [&](const std::string& name, int64_t row, int64_t col) {
    for (const LocalTensor& local : whole_plan.tensors) {
      int64_t first = 0;
      for (const TensorSlice& slice : local.slices) {
        if (slice.name == name) {
          const WeightTensor* t = whole->Find(local.name);
          return ValueAt(t->data, t->dtype, (first + row) * t->cols + col);
        }
        first += slice.row_end - slice.row_begin;
      }
    }
    ADD_FAILURE() << name;
    return 0.0f;
  };
  for (int64_t rank = 0; rank < 4; ++rank) {
    const ShardPlan plan = *MakeShardPlan(config, 4, rank);
    const auto weights = *Weights::Dummy(plan, config, {}, &two);
    EXPECT_EQ(weights->checkpoint_bytes(), 0);
    for (const LocalTensor& local : plan.tensors) {
      const WeightTensor* t = weights->Find(local.name);
      int64_t row = 0;
      for (const TensorSlice& slice : local.slices) {
        for (int64_t r = slice.row_begin; r < slice.row_end; ++r, ++row) {
          for (int64_t c = slice.col_begin; c < slice.col_end; ++c) {
            ASSERT_EQ(ValueAt(t->data, t->dtype, row * t->cols + c - slice.col_begin),
                      value(slice.name, r, c))
                << local.name;
          }
        }
      }
    }
  }
}

// A uniform spread has a mean and a variance; tensors of one value, or all alike, do not.
TEST(WeightsTest, DummyValuesAreSpreadAsTheirKindAsks) {
  ThreadPool pool(1);
  for (const char* name : {"llama_biased_linear_rope", "gemma3"}) {
    const ModelConfig config = *LoadModelConfig(Golden(name));
    const ShardPlan plan = *MakeShardPlan(config, 1, 0);
    const auto weights = *Weights::Dummy(plan, config, {}, &pool);
    std::set<std::pair<float, float>> beginnings;
    for (const LocalTensor& local : plan.tensors) {
      SCOPED_TRACE(absl::StrCat(name, ", ", local.name));
      const WeightTensor* t = weights->Find(local.name);
      const int64_t count = t->rows * t->cols;
      const bool bias = local.name.ends_with(".bias");
      const bool is_norm = !local.is_matrix && !bias;
      const double center = is_norm && !config.norm_weight_plus_one ? 1.0 : 0.0;
      const double width = local.is_matrix ? std::sqrt(3.0 / static_cast<double>(t->cols))
                           : bias          ? 0.05
                                           : 0.1;
      double sum = 0, squares = 0;
      for (int64_t i = 0; i < count; ++i) {
        const double off = ValueAt(t->data, t->dtype, i) - center;
        ASSERT_LE(std::abs(off), width * (1 + 1e-6));
        sum += off;
        squares += off * off;
      }
      // Five standard deviations of the mean of so many; of their squares, about twice that.
      const double n = static_cast<double>(count);
      EXPECT_NEAR(sum / n, 0, 5 * width / std::sqrt(3 * n));
      EXPECT_NEAR(squares / n, width * width / 3, 2 * width * width / std::sqrt(n));
      EXPECT_TRUE(beginnings
                      .emplace((ValueAt(t->data, t->dtype, 0) - center) / width,
                               (ValueAt(t->data, t->dtype, 1) - center) / width)
                      .second);
    }
  }
}

// One float8 matrix "w" of 6 x 4 and what is given beside it.
struct StoredScale {
  std::string dtype = "F32";
  std::vector<int64_t> shape;
  std::vector<float> values;
};
std::unique_ptr<Checkpoint> WriteFp8(const std::string& scale_name, const StoredScale& scale) {
  const TempDir dir;  // what is mapped outlives its name
  std::string data;
  for (char byte = 0; byte < 24; ++byte) data.push_back(byte);
  for (const float v : scale.values) {
    if (scale.dtype == "F32") data.append(reinterpret_cast<const char*>(&v), 4);
    if (scale.dtype != "F32") {
      const uint16_t bits =
          scale.dtype == "BF16" ? cpu::ToBFloat16(v).bits : cpu::ToFloat16(v).bits;
      data.append(reinterpret_cast<const char*>(&bits), 2);
    }
  }
  const std::string header =
      absl::StrCat(R"({"w":{"dtype":"F8_E4M3","shape":[6,4],"data_offsets":[0,24]},")", scale_name,
                   R"(":{"dtype":")", scale.dtype, R"(","shape":[)",
                   absl::StrJoin(scale.shape, ","), R"(],"data_offsets":[24,)", data.size(), "]}}");
  const uint64_t length = header.size();
  std::ofstream out(dir.File("model.safetensors"), std::ios::binary);
  out.write(reinterpret_cast<const char*>(&length), 8);
  out << header << data;
  out.close();
  auto checkpoint = Checkpoint::Open(dir.path());
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  return checkpoint.ok() ? *std::move(checkpoint) : nullptr;
}

// Rows 2 to 4 of the matrix, columns 1 and 2.
TensorSlice PartOfFp8() {
  return {.name = "other.w",
          .alternatives = {"w"},
          .rows = 6,
          .cols = 4,
          .row_begin = 2,
          .row_end = 5,
          .col_begin = 1,
          .col_end = 3};
}

TEST(Fp8WeightsTest, AScaleIsOfTheTensorOrOfEachRow) {
  const std::vector<float> each = {0.5f, 1.0f, 2.0f, 4.0f, 8.0f, 16.0f};
  for (const char* dtype : {"F32", "BF16", "F16"}) {
    for (const auto& shape : std::vector<std::vector<int64_t>>{{}, {1}, {1, 1}}) {
      const auto checkpoint = WriteFp8("w_scale", {dtype, shape, {0.25f}});
      const auto scales = ReadScales(*checkpoint, PartOfFp8());
      ASSERT_TRUE(scales.ok()) << scales.status();
      EXPECT_EQ(*scales, std::vector<float>(3, 0.25f)) << dtype;
    }
    for (const auto& shape : std::vector<std::vector<int64_t>>{{6}, {6, 1}}) {
      const auto checkpoint = WriteFp8("w_scale", {dtype, shape, each});
      const auto scales = ReadScales(*checkpoint, PartOfFp8());
      ASSERT_TRUE(scales.ok()) << scales.status();
      EXPECT_EQ(*scales, (std::vector<float>{2.0f, 4.0f, 8.0f})) << dtype;
    }
  }
}

TEST(Fp8WeightsTest, NamesAScaleThatIsMissingOrOfAnotherKind) {
  const auto missing = WriteFp8("w_scale_inv", {"F32", {1}, {1.0f}});
  EXPECT_THAT(
      std::string(ReadScales(*missing, PartOfFp8()).status().message()),
      HasSubstr("\"other.w_scale\" is missing; supported: one scale a tensor or one a row"));
  for (const auto& shape : std::vector<std::vector<int64_t>>{{4}, {1, 6}, {3, 2}, {6, 1, 1}}) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    const auto checkpoint = WriteFp8("w_scale", {"F32", shape, std::vector<float>(count, 1.0f)});
    const auto scales = ReadScales(*checkpoint, PartOfFp8());
    EXPECT_EQ(scales.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(scales.status().message()),
                HasSubstr(absl::StrCat("\"w_scale\" is F32 of shape [", absl::StrJoin(shape, ", "),
                                       "]; supported: one scale, or 6 of them")));
  }
}

TEST(Fp8WeightsTest, StoredBytesArriveAsTheyAreWhereFloat8IsTaken) {
  const auto checkpoint = WriteFp8("w_scale", {"F32", {}, {1.0f}});
  const TensorSlice slice = PartOfFp8();
  EXPECT_THAT(std::string(FindChecked(*checkpoint, slice).status().message()),
              HasSubstr("weights are read as float32, float16 and bfloat16"));
  ShardPlan plan;
  plan.tensors.push_back({.name = "w", .rows = 3, .cols = 2, .slices = {slice}, .is_matrix = true});
  const auto pieces = CutIntoPieces(
      plan, [](const LocalTensor&) { return DType::kFloat8E4M3; },
      [&](const TensorSlice& s) { return FindChecked(*checkpoint, s, /*takes_fp8=*/true); });
  ASSERT_TRUE(pieces.ok()) << pieces.status();
  std::vector<std::byte> got;
  int64_t stored = 0;
  for (const WeightPiece& piece : *pieces) {
    std::vector<std::byte> rows(static_cast<size_t>(piece.bytes()));
    CopyPiece(*checkpoint, piece, rows.data());
    got.insert(got.end(), rows.begin(), rows.end());
    stored += piece.stored_bytes();
  }
  std::vector<std::byte> wanted;
  for (const int byte : {9, 10, 13, 14, 17, 18}) wanted.push_back(std::byte(byte));
  EXPECT_EQ(got, wanted);
  EXPECT_EQ(stored, 6) << "no byte of another rank";
}

}  // namespace
}  // namespace lockstep
