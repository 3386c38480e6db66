#include "kernels/embed.h"
#include "tests/kernels/device_rows.h"

namespace lockstep::kernels {
namespace {

class Ints : public DeviceRows<int32_t> {
 public:
  explicit Ints(const std::vector<int32_t>& values)
      : DeviceRows<int32_t>(static_cast<int64_t>(values.size())) {
    PutBits(values);
  }
};

template <typename T>
class EmbedTest : public testing::Test {};
using Types = testing::Types<float, __half, __nv_bfloat16>;
TYPED_TEST_SUITE(EmbedTest, Types);

TYPED_TEST(EmbedTest, TakesLocalRowsAndLeavesZerosForTheRest) {
  using T = TypeParam;
  constexpr int kFirst = 100, kLocal = 20, kStride = 6;
  for (const int dim : {1, 7, 8, 100, 512, 4096, 4104}) {
    for (const int shift : {0, 1}) {
      std::vector<float> table = RandomValues<T>(kLocal * dim, 1);
      table[3 * dim] = -0.0f;
      const DeviceRows<T> rows(table, shift);
      // Slots 0, 1, 2; row 3 is padding; tokens of other ranks on both sides.
      const std::vector<int32_t> token_table = {0,  0,   103, 0, 0, 0,  //
                                                99, 119, 120, 0, 0, 0,  //
                                                0,  0,   0,   0, 0, 100};
      const std::vector<int32_t> slots = {0, 1, 1, -1, 1, 2}, positions = {2, 0, 1, 0, 2, 5};
      const std::vector<int32_t> wanted = {103, -1, 119, -1, -1, 100};
      const Ints tokens(token_table), slot(slots), position(positions);
      const int n = static_cast<int>(slots.size());
      const DeviceRows<T> out(n * dim, shift);
      EmbedRowsArgs args;
      args.type = TypeOf<T>();
      args.table = rows.get();
      args.first_vocab = kFirst;
      args.local_vocab = kLocal;
      args.dim = dim;
      args.tokens = tokens.get();
      args.tokens_stride = kStride;
      args.rows = {.slot = slot.get(), .position = position.get()};
      args.num_rows = n;
      args.out = out.get();
      ASSERT_CUDA(EmbedRows({}, args));
      ASSERT_CUDA(cudaDeviceSynchronize());
      out.ExpectGuards("embedding");
      const std::vector<float> got = out.Values();
      for (int r = 0; r < n; ++r) {
        for (int i = 0; i < dim; ++i) {
          const float want = wanted[r] < 0 ? 0.0f : table[(wanted[r] - kFirst) * dim + i];
          ASSERT_EQ(got[r * dim + i], want) << "row " << r << " of width " << dim;
          ASSERT_FALSE(got[r * dim + i] == 0.0f && std::signbit(got[r * dim + i])) << "-0";
        }
      }
    }
  }
}

TEST(GatherRows, CopiesBitsOfEveryTypeByIndex) {
  for (const Type type : {Type::kF32, Type::kF16, Type::kBF16, Type::kE4M3}) {
    const int64_t element = static_cast<int64_t>(TypeBytes(type));
    for (const int width : {1, 3, 16, 1000, 4096}) {
      std::vector<uint8_t> bytes(5 * width * element);
      std::mt19937 generator(7);
      for (uint8_t& b : bytes) b = static_cast<uint8_t>(generator());
      DeviceRows<uint8_t> in(static_cast<int64_t>(bytes.size()));
      in.PutBits(bytes);
      const std::vector<int32_t> index = {4, 0, -1, 4};
      const Ints device_index(index);
      const DeviceRows<uint8_t> out(4 * width * element);
      ASSERT_CUDA(GatherRows({}, {.type = type,
                                  .in = in.get(),
                                  .index = device_index.get(),
                                  .num_rows = 4,
                                  .width = width,
                                  .out = out.get()}));
      ASSERT_CUDA(cudaDeviceSynchronize());
      out.ExpectGuards("gathered");
      const std::vector<uint8_t> got = out.Bits();
      for (int r = 0; r < 4; ++r) {
        for (int64_t i = 0; i < width * element; ++i) {
          const uint8_t want = index[r] < 0 ? 0 : bytes[index[r] * width * element + i];
          ASSERT_EQ(got[r * width * element + i], want);
        }
      }
    }
  }
}

TEST(GatherRows, LeavesZerosForRowsThatAreNotHeld) {
  const int width = 24;
  std::vector<float> values;
  for (int i = 0; i < 10 * width; ++i) values.push_back(static_cast<float>(i + 1));
  const DeviceRows<float> in(values);
  const std::vector<int32_t> index = {9, 0, 3, 4, 5, 7, -1, 2};
  const Ints device_index(index);
  const struct {
    HeldRows held;
    std::vector<int32_t> rows;
  } cases[] = {{{}, {0, 2, 3, 4, 5, 7, 9}},
               {{.of = 3, .rank = 1}, {4, 7}},
               {{.of = 1, .rank = 0, .begin = {2, 7}, .end = {5, 8}}, {2, 3, 4, 7}},
               {{.of = 1, .rank = 0, .begin = {0, 0}, .end = {0, 0}}, {}}};
  for (const auto& [held, rows] : cases) {
    const DeviceRows<float> out(static_cast<int64_t>(index.size()) * width);
    ASSERT_CUDA(GatherRows({}, {.type = Type::kF32,
                                .in = in.get(),
                                .index = device_index.get(),
                                .num_rows = static_cast<int>(index.size()),
                                .width = width,
                                .out = out.get(),
                                .held = held}));
    ASSERT_CUDA(cudaDeviceSynchronize());
    out.ExpectGuards("gathered");
    const std::vector<float> got = out.Values();
    for (size_t i = 0; i < index.size(); ++i) {
      const bool present = std::find(rows.begin(), rows.end(), index[i]) != rows.end();
      for (int c = 0; c < width; ++c)
        ASSERT_EQ(got[i * width + c], present ? values[index[i] * width + c] : 0.0f) << index[i];
    }
  }
}

TEST(AppendTokens, WritesAfterThePositionAndNowhereElse) {
  constexpr int kSlots = 200, kStride = 4;
  const Ints tokens(std::vector<int32_t>(kSlots * kStride, 7));
  std::vector<int32_t> slots, positions, sampled, want(kSlots * kStride, 7);
  for (int i = 0; i < kSlots; ++i) {
    slots.push_back(i % 5 == 0 ? -1 : kSlots - 1 - i);
    positions.push_back(i % 4);
    sampled.push_back(i % 7 == 0 ? -1 : 1000 + i);
    if (slots[i] >= 0 && sampled[i] >= 0 && positions[i] + 1 < kStride) {
      want[slots[i] * kStride + positions[i] + 1] = sampled[i];
    }
  }
  const Ints slot(slots), position(positions), sample(sampled);
  ASSERT_CUDA(AppendTokens({}, {.tokens = tokens.get(),
                                .tokens_stride = kStride,
                                .slot = slot.get(),
                                .position = position.get(),
                                .sampled = sample.get(),
                                .count = kSlots}));
  ASSERT_CUDA(cudaDeviceSynchronize());
  tokens.ExpectGuards("tokens");
  EXPECT_EQ(tokens.Bits(), want);
}

}  // namespace
}  // namespace lockstep::kernels
